"""Privacy accounting: the (ε, δ) of composed Gaussian mechanisms.

Sampled Gaussian mechanisms are composed by the accountants of opacus (PRV: Gopi et al. 2021; RDP:
Mironov et al. 2019). Without sampling, the composition of Gaussian mechanisms is a Gaussian
mechanism, whose ε is computed exactly (Balle and Wang 2018, theorem 8).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hetero_fl.utils.errors import UserError

# Relative tolerance of the noise multiplier that is solved for.
TOLERANCE = 1e-3
# Smallest noise multiplier considered; for smaller ones ε is in the thousands.
MIN_NOISE_MULTIPLIER = 0.05


@dataclass(frozen=True, order=True)
class PrivacyCharge:
    """Privacy charge of one or more Gaussian mechanisms.

    The noise has the standard deviation scale·z·sensitivity, where z is the noise multiplier of the
    run.

    Args:
        rate: Probability with which each row is in the Poisson sample of a mechanism. A rate of 1
            means no sampling.
        steps: Number of mechanisms, such as training steps. Default: 1.
        scale: Factor on the noise multiplier z. Default: 1.
        once: Name of a release that is charged only the first time. If empty, the release is
            charged each time.
    """

    rate: float
    steps: int = 1
    scale: float = 1.0
    once: str = ""


# Charges of one participant as sorted tuples (scale, rate, steps).
History = tuple[tuple[float, float, int], ...]


def add_charges(history: History, charges: Iterable[PrivacyCharge]) -> History:
    """Return a participant's history with additional charges.

    The steps of charges with equal scale and rate are added up. `PrivacyCharge.once` is ignored, so
    the caller must leave out releases that have already been charged.

    Args:
        history: Previous charges of the participant. An empty tuple is an empty history.
        charges: Additional charges.

    Example:
        >>> from hetero_fl.privacy.accounting import PrivacyCharge, add_charges
        >>> history = add_charges((), [PrivacyCharge(rate=0.1, steps=5)])
        >>> add_charges(history, [PrivacyCharge(rate=0.1, steps=2)])
        ((1.0, 0.1, 7),)
    """
    steps = {(scale, rate): n for scale, rate, n in history}
    for charge in charges:
        at = (charge.scale, charge.rate)
        steps[at] = steps.get(at, 0) + charge.steps
    return tuple(sorted((scale, rate, n) for (scale, rate), n in steps.items()))


def epsilon_of_history(history: History, z: float, delta: float, accountant: str = "prv") -> float:
    """Compute the ε of a participant's history.

    Args:
        history: Charges of the participant.
        z: Noise multiplier of the run.
        delta: δ of the guarantee.
        accountant: Accountant of opacus, "prv" or "rdp". Without sampling, "prv" uses an exact
            formula.

    Returns:
        The value of ε, which is 0 for an empty history.

    Raises:
        UserError: If the accountant is required and opacus is not installed.
    """
    return epsilon_of_mechanisms(
        tuple((scale * z, rate, steps) for scale, rate, steps in history), delta, accountant
    )


def worst_epsilon(
    histories: Iterable[History], z: float, delta: float, accountant: str = "prv"
) -> float:
    """Return the largest ε of several histories.

    The PRV accountant takes half a second per history. The RDP accountant is much faster and
    returns an upper bound. Histories are therefore evaluated in descending order of this bound
    until none of the remaining histories can have the largest ε.

    Args:
        histories: Histories of participants.
        z: Noise multiplier of the run.
        delta: δ of the guarantee.
        accountant: Accountant of opacus, "prv" or "rdp".

    Returns:
        The largest ε, or 0 if there are no histories.

    Raises:
        UserError: If the accountant is required and opacus is not installed.
    """
    bounds = sorted(
        (
            (epsilon_of_history(h, z, delta, _fast_accountant(h, accountant)), h)
            for h in set(histories)
        ),
        reverse=True,
    )
    largest = 0.0
    for bound, history in bounds:
        if bound <= largest:
            break
        largest = max(largest, min(bound, epsilon_of_history(history, z, delta, accountant)))
    return largest


def solve_noise_multiplier(
    histories: Iterable[History], target: float, delta: float, accountant: str = "prv"
) -> float:
    """Return the smallest noise multiplier at which no history exceeds the target ε.

    Args:
        histories: Histories of participants.
        target: Largest permitted ε.
        delta: δ of the guarantee.
        accountant: Accountant of opacus, "prv" or "rdp".

    Returns:
        The noise multiplier with a relative tolerance of 1e-3, rounded up to four decimal places.
        It is at least `MIN_NOISE_MULTIPLIER`, also if all histories are empty.

    Raises:
        UserError: If the accountant is required and opacus is not installed.
    """
    # Histories with large costs come first, so that too small a multiplier is noticed early.
    ordered = sorted(set(histories), key=_rough_cost, reverse=True)

    def suffices(z: float, is_exact: bool = True) -> bool:
        """Return whether all histories meet the target, which is certain if a fast bound does."""
        return all(
            epsilon_of_history(h, z, delta, _fast_accountant(h, accountant)) <= target
            or (is_exact and epsilon_of_history(h, z, delta, accountant) <= target)
            for h in ordered
        )

    high = MIN_NOISE_MULTIPLIER
    while not suffices(high, is_exact=False):
        high *= 2
    low = high / 2
    while low >= MIN_NOISE_MULTIPLIER and suffices(low):
        high = low
        low = high / 2
    while high > MIN_NOISE_MULTIPLIER and high - low > TOLERANCE * high:
        middle = (low + high) / 2
        if suffices(middle):
            high = middle
        else:
            low = middle
    return math.ceil(high * 1e4) / 1e4


def _fast_accountant(history: History, accountant: str) -> str:
    """Return the name of a fast accountant that computes an upper bound of ε.

    Without sampling, "prv" is fast, because `epsilon_of_mechanisms` uses an exact formula.
    """
    return accountant if all(rate == 1 for _, rate, _ in history) else "rdp"


def _rough_cost(history: History) -> float:
    """Return the sum of squared sampling rates over variances, with which ε grows."""
    return sum(steps * (rate / scale) ** 2 for scale, rate, steps in history)


@lru_cache(maxsize=4096)
def epsilon_of_mechanisms(mechanisms: History, delta: float, accountant: str = "prv") -> float:
    """Compute the ε of a composition of Gaussian mechanisms.

    Args:
        mechanisms: Sorted tuples (noise multiplier, rate, steps).
        delta: δ of the guarantee.
        accountant: Accountant of opacus, "prv" or "rdp". Without sampling, "prv" uses an exact
            formula.

    Returns:
        The value of ε, which is 0 if there are no mechanisms.

    Raises:
        UserError: If the accountant is required and opacus is not installed.
    """
    if not mechanisms:
        return 0.0
    if accountant == "prv" and all(rate == 1 for _, rate, _ in mechanisms):
        return gaussian_epsilon(
            math.sqrt(sum(steps / noise**2 for noise, _, steps in mechanisms)), delta
        )
    accountants = opacus_accountants()
    with warnings.catch_warnings():
        # opacus warns if the optimal RDP order is the smallest or largest one.
        warnings.simplefilter("ignore")
        if accountant == "rdp":
            orders = accountants["RDPAccountant"].DEFAULT_ALPHAS
            spent = sum(_rdp_of_step(noise, rate) * steps for noise, rate, steps in mechanisms)
            rdp = accountants["analysis"].rdp
            return float(rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)[0])
        prv = accountants["PRVAccountant"]()
        prv.history = list(mechanisms)
        return float(prv.get_epsilon(delta=delta))


@lru_cache(maxsize=4096)
def _rdp_of_step(noise: float, rate: float) -> Any:
    """Return the Rényi divergence of one step at each default order of opacus."""
    accountants = opacus_accountants()
    orders = accountants["RDPAccountant"].DEFAULT_ALPHAS
    rdp = accountants["analysis"].rdp
    return rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=orders)


def opacus_accountants() -> dict[str, Any]:
    """Return the attributes of the module `opacus.accountants`, keyed by name.

    Raises:
        UserError: If opacus is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus import accountants
    except ImportError:
        raise UserError(
            "privacy: accounting needs opacus; run pip install 'hetero_fl[privacy]'"
        ) from None
    return vars(accountants)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Compute the smallest δ at which a Gaussian mechanism is (ε, δ)-differentially private.

    The result is δ = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) (Balle and Wang 2018, theorem 8).

    Args:
        mu: Sensitivity divided by the standard deviation of the noise, greater than 0.
        epsilon: ε of the guarantee.
    """
    first = mu / 2 - epsilon / mu
    second = -mu / 2 - epsilon / mu
    tail = 0.5 * math.erfc(-second / math.sqrt(2))
    product = math.exp(epsilon + math.log(tail)) if tail > 0 else 0.0
    return 0.5 * math.erfc(-first / math.sqrt(2)) - product


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Compute the smallest ε at which a Gaussian mechanism is (ε, δ)-differentially private.

    Args:
        mu: Sensitivity divided by the standard deviation of the noise.
        delta: δ of the guarantee.

    Example:
        >>> from hetero_fl.privacy.accounting import gaussian_epsilon
        >>> round(gaussian_epsilon(mu=1.0, delta=1e-5), 3)
        4.377
    """
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low = 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        low = high
        high = 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        if gaussian_delta(mu, middle) <= delta:
            high = middle
        else:
            low = middle
    return high
