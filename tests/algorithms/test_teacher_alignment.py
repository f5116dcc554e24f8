"""Alignment and sharpening of the teacher: the rules, and clients that share no label counts."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hetero_fl.aggregation import Uploads
from hetero_fl.aggregation.teachers import align_to_labels
from hetero_fl.algorithms import register_algorithm
from hetero_fl.algorithms.distillation import LABELS, TEACHER
from hetero_fl.core.task import Task
from hetero_fl.experiment import prepare
from hetero_fl.federation.trainer import FederatedTrainer
from tests.algorithms.test_regression import settings, slopes
from tests.support.cases import each_case
from tests.support.federations import MIXED, config, rounds_of, same_bits

pytestmark = pytest.mark.usefixtures("float64")


def frequencies(counts: Tensor) -> Tensor:
    return ((counts + 1) / (counts + 1).sum()).log()


def run_rounds(
    method: str, rounds: int = 1, changes: dict[str, Any] | None = None, **own: Any
) -> FederatedTrainer:
    source = config(method, MIXED, 4, **(changes or {}))
    source["algorithm"].update({"align": 0.0, **own})
    return rounds_of(source, num_rounds=rounds)


# The rule


@each_case(("balanced", "strength"), itertools.product((True, False), (0.5, 1.0)))
def test_alignment_matches_reference(balanced: Any, strength: Any) -> None:
    z = 3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    q = [0.4, 0.3, 0.2, 0.1]
    shares = [0.0] * 4
    for row in z.tolist():
        weights = [math.exp(v) * (p if balanced else 1) for v, p in zip(row, q, strict=True)]
        shares = [s + w / sum(weights) / 6 for s, w in zip(shares, weights, strict=True)]
    expected = z + torch.tensor(
        [strength * math.log(p / s) for p, s in zip(q, shares, strict=True)]
    )
    assert torch.allclose(
        align_to_labels(z, torch.tensor(q).log(), strength, balanced), expected, atol=1e-12
    )


def test_extreme_logits_give_no_nan() -> None:
    z = torch.tensor([[1e4, 0.0, -1e4], [1e4, 0.0, 0.0]])
    assert align_to_labels(z, torch.full((3,), 1 / 3).log(), 1.0, True).isfinite().all()


# Federations


def test_multilabel_teacher_is_not_aligned() -> None:
    server = run_rounds("ds_fl", 0).server
    many = replace(server, task=Task("multilabel", 10), state={LABELS: torch.arange(10.0)})
    p = torch.rand(60, 10, generator=torch.Generator().manual_seed(4))
    plain, aligned = (
        method.teacher_from_mean(many, Uploads(specs=method.uploads), p)
        for method in (register_algorithm["ds_fl"](align=align) for align in (0.0, 1.0))
    )
    assert torch.equal(plain, aligned)


def test_regression_teacher_is_not_sharpened() -> None:
    method = register_algorithm["fedmd"](sharpen="era")
    server = replace(run_rounds("fedmd", 0).server, task=Task("regression", 1))
    z = torch.randn(60, 1, generator=torch.Generator().manual_seed(4))
    assert method.teacher_from_mean(server, Uploads(specs=method.uploads), z) is z


def test_cohort_without_counts_uses_earlier_counts() -> None:
    rounds = run_rounds("fedmd", 1, align=0.5)
    algorithm, server, known = rounds.algorithm, rounds.server, rounds.server.state[LABELS].clone()
    teacher = torch.randn(60, 10, generator=torch.Generator().manual_seed(3))
    actual = algorithm.align_teacher(server, Uploads(specs=algorithm.uploads), teacher)  # type: ignore[attr-defined]
    assert torch.equal(actual, align_to_labels(teacher, frequencies(known), 0.5, False))
    assert torch.equal(server.state[LABELS], known)


def test_no_label_counts_means_no_alignment() -> None:
    silent = {"clients__defaults__shares": ["parameters", "predictions"]}
    plain, moved = run_rounds("hybrid", 2, silent), run_rounds("hybrid", 2, silent, align=0.5)
    assert same_bits({"t": plain.server.state[TEACHER]}, {"t": moved.server.state[TEACHER]})


def test_counts_are_not_sent_without_alignment() -> None:
    for method in ("fedmd", "feddf", "hybrid", "ds_fl"):
        assert run_rounds(method, align=0.5).traffic.up > run_rounds(method).traffic.up
        assert LABELS not in run_rounds(method).server.state
        # Declared items share the noise.
        assert method == "feddf" or "counts" not in run_rounds(method, 0).algorithm.uploads


def test_regression_is_not_aligned() -> None:
    runs = [
        prepare(settings("hybrid", True, align=align), dataset=slopes()).make_trainer()
        for align in (0.0, 1.0)
    ]
    for run in runs:
        run.run_round()
    plain, moved = (run.server.state[TEACHER] for run in runs)
    assert torch.equal(plain, moved) and runs[0].traffic.up == runs[1].traffic.up


@each_case("method", ("hybrid", "ds_fl"))
def test_alignment_under_secure_aggregation(method: str) -> None:
    plain = run_rounds(method, 2, align=0.5)
    summed = run_rounds(method, 2, {"channel__secure_sum": {}}, align=0.5)
    assert torch.equal(plain.server.state[LABELS], summed.server.state[LABELS])
    assert torch.allclose(plain.server.state[TEACHER], summed.server.state[TEACHER], atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["record", "client", "local"])
def test_negative_noisy_counts_are_clipped_to_zero(unit: str) -> None:
    noise = {"unit": unit, "noise_multiplier": 3.0, "delta": 1e-4}
    rounds = rounds_of(config("hybrid", "cnn_gn_small", 4, privacy=noise, algorithm__align=0.5))
    assert bool(rounds.server.state[TEACHER].isfinite().all())
    counts = rounds.server.state[LABELS]
    # No client sends its true counts.
    assert not torch.allclose(counts, counts.round(), atol=1e-3)
    if unit == "client":
        # Stored unclipped, so that noise averages out over rounds.
        assert bool((counts < 0).any())


def test_noisy_counts_do_not_reveal_participation() -> None:
    """Let one client share counts: its cohorts and the others change the same server state."""
    only = [{"match": "site_[123]", "shares": ["parameters", "predictions"]}]
    noise = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-4, "poisson_cohorts": True}
    changes = {"clients__overrides": only, "clients__per_round": 2, "rounds": 4}
    rounds = rounds_of(
        config("fedmd", "cnn_gn_small", 4, privacy=noise, algorithm__align=0.5, **changes),
        num_rounds=0,
    )
    known, recorded = torch.zeros(10), []
    for _ in range(4):
        recorded.append("site_4" in rounds.run_round()["cohort"])
        assert not torch.equal(rounds.server.state[LABELS], known)
        known = rounds.server.state[LABELS].clone()
    assert set(recorded) == {True, False}


def test_missing_defense_of_label_counts_is_reported() -> None:
    rule = {"aggregation__predictions": "median"}
    line = "counts are summed without protection from malicious clients"
    assert line in prepare(config("fedmd", MIXED, 4, algorithm__align=0.5, **rule)).notes
    assert line not in prepare(config("fedmd", MIXED, 4, **rule)).notes
