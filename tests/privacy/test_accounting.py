"""ε compared with the accountants of Opacus and with the definition."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest

from hetero_fl.privacy.accounting import (
    MIN_NOISE_MULTIPLIER,
    PrivacyCharge,
    add_charges,
    epsilon_of_history,
    gaussian_delta,
    gaussian_epsilon,
    opacus_accountants,
    solve_noise_multiplier,
    worst_epsilon,
)
from tests.support.cases import each_case


def of_opacus(name: str, schedule: list[tuple[float, float, int]], delta: float) -> float:
    """Return ε of Opacus' accountant after every step."""
    accountant: Any = opacus_accountants()[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for z, rate, steps in schedule:
            for _ in range(steps):
                accountant.step(noise_multiplier=z, sample_rate=rate)
        return float(accountant.get_epsilon(delta=delta))


@each_case(("name", "accountant"), [("PRVAccountant", "prv"), ("RDPAccountant", "rdp")])
def test_epsilon_matches_opacus(name: str, accountant: str) -> None:
    history = add_charges(
        add_charges((), [PrivacyCharge(0.1, 30)]),
        [PrivacyCharge(0.1, 30), PrivacyCharge(1.0, scale=8.0)],
    )
    assert history == ((1.0, 0.1, 60), (8.0, 1.0, 1))
    assert epsilon_of_history(history, 1.2, 1e-5, accountant) == of_opacus(
        name, [(1.2, 0.1, 60), (9.6, 1.0, 1)], 1e-5
    )


def test_gaussian_composition_is_exact() -> None:
    """Compare with the formula; the PRV accountant of Opacus exceeds it by at most 0.01."""
    exact = epsilon_of_history(((1.0, 1.0, 12),), 2.0, 1e-5)
    assert exact == gaussian_epsilon(math.sqrt(12) / 2.0, 1e-5)
    assert 0 <= of_opacus("PRVAccountant", [(2.0, 1.0, 12)], 1e-5) - exact < 0.02
    # By definition, δ = ∫ max(0, p − e^ε q) for N(μ, 1) and N(0, 1).
    mu, eps, step = 0.8, 1.1, 1e-3
    points = [-12 + i * step for i in range(24_000)]
    density = [
        math.exp(-((x - mu) ** 2) / 2) / math.sqrt(2 * math.pi)
        - math.exp(eps) * math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        for x in points
    ]
    assert gaussian_delta(mu, eps) == pytest.approx(
        sum(max(0.0, d) for d in density) * step, abs=1e-6
    )
    assert gaussian_delta(mu, gaussian_epsilon(mu, 1e-6)) == pytest.approx(1e-6, rel=1e-6)
    assert gaussian_epsilon(1e-9, 1e-5) == 0.0


@pytest.mark.slow
@each_case("accountant", ["prv", "rdp"])
def test_noise_multiplier_meets_target_epsilon(accountant: str) -> None:
    histories = [((1.0, 0.2, 30), (8.0, 1.0, 1)), ((1.0, 0.1, 60),)]
    z = solve_noise_multiplier(histories, 3.0, 1e-5, accountant)
    found = worst_epsilon(histories, z, 1e-5, accountant)
    assert found == max(epsilon_of_history(h, z, 1e-5, accountant) for h in histories)
    assert 2.98 < found <= 3.0
    assert worst_epsilon(histories, 0.99 * z, 1e-5, accountant) > 3.0


@each_case("accountant", ["prv", "rdp"])
def test_noise_multiplier_has_a_minimum(accountant: str) -> None:
    history = ((1.0, 1.0, 1),)
    small = epsilon_of_history(history, 0.045, 1e-5, accountant)
    above = epsilon_of_history(history, 1.01 * MIN_NOISE_MULTIPLIER, 1e-5, accountant)

    assert solve_noise_multiplier([history], 1e9, 1e-5, accountant) == MIN_NOISE_MULTIPLIER
    assert solve_noise_multiplier([history], small, 1e-5, accountant) == MIN_NOISE_MULTIPLIER
    assert solve_noise_multiplier([history], above, 1e-5, accountant) == pytest.approx(
        1.01 * MIN_NOISE_MULTIPLIER, abs=2e-4
    )
    assert solve_noise_multiplier([()], 1.0, 1e-5, accountant) == MIN_NOISE_MULTIPLIER


def test_epsilon_without_steps_is_zero() -> None:
    assert epsilon_of_history((), 1.0, 1e-5) == 0.0
    assert worst_epsilon([], 1.0, 1e-5) == 0.0
