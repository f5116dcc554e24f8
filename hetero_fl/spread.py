"""A metric over many clients: the mean, how far they are apart, the worst."""

from __future__ import annotations

import math
from collections.abc import Mapping

from hetero_fl.metrics import LARGEST_FIGURE, SMALLER_IS_BETTER


def spread(values: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | int | None]:
    """Over clients: for each metric m the mean as `m`, the population standard deviation `m_std`, and `m_worst`.

    The worst is the minimum, for errors and losses the maximum. Undefined values, and those beyond `LARGEST_FIGURE`, are left
    out and counted as `m_undefined` where there are any; a metric that is defined for no client has None in all three. The
    order of clients changes no bit.
    """
    found: dict[str, float | int | None] = {}
    for name in dict.fromkeys(name for scores in values.values() for name in scores):
        given = [scores.get(name) for scores in values.values()]
        known = [float(v) for v in given if v is not None and abs(v) <= LARGEST_FIGURE]
        if known:
            mean = math.fsum(known) / len(known)
            found[name] = mean
            found[f"{name}_std"] = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / len(known))
            found[f"{name}_worst"] = max(known) if name in SMALLER_IS_BETTER else min(known)
        else:
            found |= dict.fromkeys((name, f"{name}_std", f"{name}_worst"))
        if len(known) < len(given):
            found[f"{name}_undefined"] = len(given) - len(known)
    return found
