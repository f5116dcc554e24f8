"""What noised releases cost: (ε, δ) of everything that was computed from somebody's rows, composed.

Sampled Gaussian mechanisms are composed by opacus' accountants (PRV: Gopi et al. 2021; RDP: Mironov et al. 2019). Where
nothing is sampled, a composition of Gaussians is a Gaussian, whose ε is known exactly (Balle and Wang 2018, theorem 8).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hetero_fl.utils.errors import UserError

TIGHT = 1e-3  # of the noise that is solved for
GENTLE = 0.05  # least noise multiplier that is looked at: below it ε is in the thousands


@dataclass(frozen=True, order=True)
class PrivacyCharge:
    """`steps` Gaussian mechanisms on a Poisson sample of `rate`, with noise of `scale`·z times the sensitivity.

    `once`: the name of what is released a single time however often it is read.
    """

    rate: float
    steps: int = 1
    scale: float = 1.0
    once: str = ""


# (scale, rate, steps), sorted: what one participant has spent
History = tuple[tuple[float, float, int], ...]


def add_charges(history: History, charges: Iterable[PrivacyCharge]) -> History:
    """The history with these charges."""
    steps = {(scale, rate): n for scale, rate, n in history}
    for charge in charges:
        at = (charge.scale, charge.rate)
        steps[at] = steps.get(at, 0) + charge.steps
    return tuple(sorted((scale, rate, n) for (scale, rate), n in steps.items()))


def epsilon_of_history(history: History, z: float, delta: float, accountant: str = "prv") -> float:
    """ε of a history at noise multiplier z. Raises UserError if opacus is not installed."""
    return epsilon_of_mechanisms(
        tuple((scale * z, rate, steps) for scale, rate, steps in history), delta, accountant
    )


def worst_epsilon(
    histories: Iterable[History], z: float, delta: float, accountant: str = "prv"
) -> float:
    """The largest ε of several histories.

    PRV takes half a second a history, RDP a hundredth and is never below it: PRV is asked in the order of RDP until no
    other can be the largest.
    """
    known = sorted(
        (
            (epsilon_of_history(h, z, delta, _fast_accountant(h, accountant)), h)
            for h in set(histories)
        ),
        reverse=True,
    )
    largest = 0.0
    for bound, history in known:
        if bound <= largest:
            break
        largest = max(largest, min(bound, epsilon_of_history(history, z, delta, accountant)))
    return largest


def solve_noise_multiplier(
    histories: Iterable[History], target: float, delta: float, accountant: str = "prv"
) -> float:
    """The least noise multiplier, up to a thousandth of it, at which no history exceeds the target ε."""
    apart = set(histories)
    if not any(apart):
        return GENTLE

    def quickly(z: float) -> float:
        return max(epsilon_of_history(h, z, delta, _fast_accountant(h, accountant)) for h in apart)

    def exactly(z: float) -> float:
        return worst_epsilon(apart, z, delta, accountant)

    high = GENTLE
    while quickly(high) > target:
        high *= 2
    high = _smallest_multiplier(quickly, target, high / 2, high)
    low = high * 0.9  # PRV needs a little less than RDP says
    while low > GENTLE and exactly(low) <= target:
        high = low
        low = low * 0.9
    return math.ceil(_smallest_multiplier(exactly, target, low, high) * 1e4) / 1e4


def _fast_accountant(history: History, accountant: str) -> str:
    """The accountant that bounds a history at once: the exact formula where nothing is sampled, else RDP."""
    return accountant if all(rate == 1 for _, rate, _ in history) else "rdp"


def _smallest_multiplier(
    epsilon_at: Callable[[float], float], target: float, low: float, high: float
) -> float:
    """The least z between `low`, where too much is spent, and `high` with spent(z) up to the target (regula falsi in
    logarithms, Illinois form: ε costs time, and is nearly straight there)."""
    a = math.log(low)
    b = math.log(high)
    above, below = (math.log(max(epsilon_at(z), 1e-300) / target) for z in (low, high))
    real = below
    while math.exp(b) - math.exp(a) > TIGHT * math.exp(b) and real < -TIGHT and above > 0:
        middle = min(
            max(b - below * (b - a) / (below - above), a + 0.01 * (b - a)), b - 0.01 * (b - a)
        )
        found = math.log(max(epsilon_at(math.exp(middle)), 1e-300) / target)
        if found <= 0:
            b = middle
            below = found
            real = found
            above = above / 2
        else:
            a = middle
            above = found
            below = below / 2
    return math.exp(b)


@lru_cache(maxsize=4096)
def epsilon_of_mechanisms(mechanisms: History, delta: float, accountant: str = "prv") -> float:
    """Return ε of mechanisms with a noise multiplier each, `(noise, rate, steps)`, sorted.

    Raises:
        UserError: If opacus is not installed.
    """
    if not mechanisms:
        return 0.0
    if accountant == "prv" and all(rate == 1 for _, rate, _ in mechanisms):
        return gaussian_epsilon(
            math.sqrt(sum(steps / noise**2 for noise, _, steps in mechanisms)), delta
        )
    kinds = opacus_accountants()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on orders of RDP at the ends of their range
        if accountant == "rdp":
            return _rdp_epsilon(mechanisms, delta)
        made = kinds["PRVAccountant"]()
        made.history = list(mechanisms)
        return float(made.get_epsilon(delta=delta))


def _rdp_epsilon(mechanisms: History, delta: float) -> float:
    """Return ε by opacus' RDP accountant, whose divergences of a step are computed once for a run."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    spent = sum(_rdp_of_step(noise, rate) * steps for noise, rate, steps in mechanisms)
    return float(get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=spent, delta=delta)[0])


@lru_cache(maxsize=4096)
def _rdp_of_step(noise: float, rate: float) -> Any:
    """Return the Rényi divergence of one step at each of opacus' orders, shape `[orders]`."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = RDPAccountant.DEFAULT_ALPHAS
    return compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=orders)


def opacus_accountants() -> dict[str, Any]:
    """opacus' accountants by name. Raises UserError if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus import accountants
    except ImportError:
        raise UserError(
            "privacy: accounting needs opacus, which is not here; pip install 'hetero_fl[privacy]'"
        ) from None
    return vars(accountants)


# The Gaussian mechanism, exactly -------------------------------------------------------------------------------------
def gaussian_delta(mu: float, epsilon: float) -> float:
    """δ of a Gaussian mechanism of sensitivity over standard deviation μ at this ε (Balle and Wang 2018, theorem 8):
    Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ)."""
    first = mu / 2 - epsilon / mu
    second = -mu / 2 - epsilon / mu
    tail = 0.5 * math.erfc(-second / math.sqrt(2))
    product = math.exp(epsilon + math.log(tail)) if tail > 0 else 0.0
    return 0.5 * math.erfc(-first / math.sqrt(2)) - product


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The least ε of a Gaussian mechanism at this δ, to ten digits."""
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low = 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        low = high
        high = 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if gaussian_delta(mu, middle) <= delta else (middle, high)
    return high
