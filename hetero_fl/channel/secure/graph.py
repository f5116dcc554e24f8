"""Who shares masks with whom: everybody with everybody, or a sparse random graph (Bell et al. 2020, SecAgg+).

Clients stand in a circle in an order that the server draws; each is a neighbour of the k/2 on either side (a Harary graph with
random labels, their section 3). A client's cost then grows with k, which grows with the logarithm of the cohort.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

COLLUDING = 0.2  # share of clients that tell the server what they know, against whom a graph is still safe
SECURITY, CORRECTNESS = (
    40,
    20,
)  # bits: chances of 2^-40 that an upload shows, of 2^-20 that an allowed dropout ends a round


def threshold_of(members: int) -> int:
    """Holders that put a secret together again, of the members of a neighbourhood: more than half of them, so that no two
    sets of holders could give both secrets of a client even to a server that tells each of them another story."""
    return members // 2 + 1


def degree(cohort: int, survivors: int, asked: int | None = None) -> int:
    """Neighbours of each client: as many as asked for, else as the bound asks for; cohort − 1 (everybody) where that is no
    fewer."""
    if asked is not None:
        return min(asked, cohort - 1)
    return next((k for k in range(2, cohort - 1, 2) if _safe(cohort, survivors, k)), cohort - 1)


def neighbourhoods(clients: Sequence[int], degree: int) -> dict[int, list[int]]:
    """Each client with its neighbours, ascending, itself among them. The order is drawn from the operating system: who could
    foresee it could surround a client."""
    if degree >= len(clients) - 1:
        return {client: sorted(clients) for client in clients}
    circle = list(clients)
    random.SystemRandom().shuffle(circle)
    half = degree // 2
    return {
        client: sorted(circle[(place + step) % len(circle)] for step in range(-half, half + 1))
        for place, client in enumerate(circle)
    }


def _safe(cohort: int, survivors: int, k: int) -> bool:
    """Whether k neighbours do, for every client at once: fewer than t colluding ones; honest survivors that stay connected
    (no k/2 in a row that collude or drop out); t that stay. t of Bell et al.'s theorem 3.10 is more than half here."""
    colluding, dropping, t = math.ceil(COLLUDING * cohort), cohort - survivors, threshold_of(k + 1)
    shown = _tail(cohort - 1, colluding, k, t)
    apart = min(1.0, (colluding + dropping) / cohort) ** (k // 2)
    lost = _tail(cohort - 1, dropping, k, k + 1 - t + 1)
    return cohort * max(shown, apart) <= 2.0**-SECURITY and cohort * lost <= 2.0**-CORRECTNESS


def _tail(total: int, marked: int, drawn: int, least: int) -> float:
    """Chance of `least` or more marked ones among those drawn without replacement (hypergeometric)."""
    ways = _log_choose(total, drawn)
    return math.fsum(
        math.exp(_log_choose(marked, i) + _log_choose(total - marked, drawn - i) - ways)
        for i in range(max(least, drawn - (total - marked)), min(marked, drawn) + 1)
    )


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
