"""Alignment and sharpening of the teacher: the rules, limit cases, and every method."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hetero_fl.aggregation import Uploads
from hetero_fl.aggregation.teachers import align_to_labels
from hetero_fl.algorithms import register_algorithm
from hetero_fl.algorithms.distillation import LABELS, TEACHER, ProxyDistillation
from hetero_fl.core.plan import Fit
from hetero_fl.core.task import Task
from hetero_fl.experiment import prepare
from hetero_fl.federation.synchronous import SynchronousTrainer
from hetero_fl.utils.errors import UserError
from tests.algorithms.test_regression import settings, slopes
from tests.support.federations import MIXED, config, rounds_of, same_bits

pytestmark = pytest.mark.usefixtures("float64")


def frequencies(counts: Tensor) -> Tensor:
    return ((counts + 1) / (counts + 1).sum()).log()


def run_rounds(
    method: str, rounds: int = 1, changes: dict[str, Any] | None = None, **own: Any
) -> SynchronousTrainer:
    source = config(method, MIXED, 4, **(changes or {}))
    source["algorithm"].update({"align": 0.0, **own})
    return rounds_of(source, num_rounds=rounds)


def counts_of(rounds: SynchronousTrainer, *ids: str) -> Tensor:
    return sum(
        (
            rounds.federation.label_counts(client_id)
            for client_id in ids or rounds.federation.client_infos
        ),
        torch.zeros(10),
    )


# The rule


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_alignment_matches_reference(balanced: bool, strength: float) -> None:
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


@pytest.mark.parametrize("balanced", [True, False])
def test_repeated_alignment_converges_to_frequencies(
    balanced: bool,
) -> None:
    z = 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    log_q = frequencies(torch.tensor([40.0, 3, 10, 10]))
    for _ in range(2000):
        z = align_to_labels(z, log_q, 0.5, balanced)
    read = z + log_q if balanced else z
    assert torch.allclose(read.softmax(1).mean(0), log_q.exp(), atol=1e-10)
    assert torch.allclose(align_to_labels(z, log_q, 1.0, balanced), z, atol=1e-9)


def test_unpredicted_class_is_recovered() -> None:
    # Thirty rows of three classes.
    own = torch.eye(3).repeat_interleave(10, 0)
    # The third class has its highest score on its rows, but is never ranked first.
    z = 4 * own + torch.tensor([0.0, 0.0, -5.0])
    even = torch.full((3,), 1 / 3).log()
    assert z.argmax(1).bincount(minlength=3).tolist() == [20, 10, 0]
    assert align_to_labels(z, even, 0.5, True).argmax(1).equal(own.argmax(1))


def test_extreme_logits_give_no_nan() -> None:
    z = torch.tensor([[1e4, 0.0, -1e4], [1e4, 0.0, 0.0]])
    assert align_to_labels(z, torch.full((3,), 1 / 3).log(), 1.0, True).isfinite().all()


# Federations


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("fedmd", {}),
        ("fedmd", {"logit_adjustment": True, "teacher": "contrast"}),
        ("fedmd", {"prior_correction": True}),
        ("hybrid", {}),
        ("hybrid", {"logit_adjustment": False, "teacher": "mean"}),
        ("hybrid", {"proxy_rows": 20}),
        ("ds_fl", {"sharpen": "none"}),
        ("ds_fl", {"sharpen": "none", "teacher": "contrast", "logit_adjustment": True}),
        ("ds_fl", {"sharpen": "none", "bits": 4}),
    ],
)
def test_first_teacher_is_the_aligned_plain_teacher(method: str, own: dict[str, Any]) -> None:
    plain, moved = run_rounds(method, **own), run_rounds(method, align=0.5, **own)
    log_q = frequencies(counts_of(moved))
    is_adjusted = own.get("logit_adjustment", method == "hybrid")
    balanced = is_adjusted or "prior_correction" in own
    expected = align_to_labels(plain.server.state[TEACHER], log_q, 0.5, balanced)
    actual = moved.server.state[TEACHER]
    assert torch.allclose(actual.log_softmax(1), expected.log_softmax(1), atol=1e-9)
    assert not torch.allclose(actual, plain.server.state[TEACHER], atol=0.01)


@pytest.fixture
def distilled(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Teachers that the server distills into its models, in order."""
    seen: list[Tensor] = []
    at_server = ProxyDistillation.server_fit

    def spied(self: ProxyDistillation, server: Any, slot: str, teacher: Tensor, *rest: Any) -> Fit:
        seen.append(teacher)
        return at_server(self, server, slot, teacher, *rest)

    monkeypatch.setattr(ProxyDistillation, "server_fit", spied)
    return seen


# FedDF evaluates the models of the other clients. FedMD distills at the server only into a student.
WITH_STUDENT: dict[str, Any] = {
    "clients__overrides": [{"match": "site_2", "shares": ["predictions", "statistics"]}],
    "server__model": "linear",
}


@pytest.mark.parametrize("method", ["feddf", "fedmd", "hybrid"])
@pytest.mark.parametrize("teacher", ["mean", "contrast"])
def test_server_distills_aligned_teacher(
    method: str, teacher: str, distilled: list[Tensor]
) -> None:
    run_rounds(method, changes=WITH_STUDENT, teacher=teacher)
    plain = distilled.pop()
    distilled.clear()
    moved = run_rounds(method, changes=WITH_STUDENT, teacher=teacher, align=1.0)
    expected = align_to_labels(plain, frequencies(counts_of(moved)), 1.0, method == "hybrid")
    assert len(distilled) == (1 if method == "fedmd" else 3) and all(
        torch.allclose(t, expected, atol=1e-9) for t in distilled
    )


@pytest.mark.parametrize("method", ["feddf", "fedmd", "hybrid"])
@pytest.mark.parametrize("align", [0.0, 0.5])
def test_server_distills_sharpened_teacher(
    method: str, align: float, distilled: list[Tensor]
) -> None:
    plain = run_rounds(method, changes=WITH_STUDENT)
    log_q = frequencies(counts_of(plain))
    p = align_to_labels(distilled.pop(), log_q, align, method == "hybrid").softmax(1)
    distilled.clear()
    run_rounds(method, changes=WITH_STUDENT, align=align, sharpen="era", era_temperature=0.2)
    assert distilled and all(torch.allclose(t, p / 0.2, atol=1e-9) for t in distilled)
    distilled.clear()
    run_rounds(method, changes=WITH_STUDENT, align=align, sharpen="power", beta=2.0)
    squared = p.square() / p.square().sum(1, keepdim=True)
    assert distilled and all(torch.allclose(t.softmax(1), squared, atol=1e-9) for t in distilled)


def test_ds_fl_sharpens_aligned_probabilities() -> None:
    """Check softmax(log p + b), sharpened, with b computed from the unsharpened teacher."""
    plain = run_rounds("ds_fl", sharpen="none").server.state[TEACHER].softmax(1)
    moved = run_rounds("ds_fl", align=0.5)
    p = align_to_labels(plain.log(), frequencies(counts_of(moved)), 0.5, False).softmax(1)
    assert torch.allclose(moved.server.state[TEACHER].softmax(1), (p / 0.1).softmax(1), atol=1e-9)


def test_class_without_votes_keeps_teacher_finite() -> None:
    assert run_rounds("ds_fl", 2, align=0.5, bits=1).server.state[TEACHER].isfinite().all()


def test_partially_requested_cache_is_not_aligned() -> None:
    words = "align cannot be combined with cache_life"
    with pytest.raises(UserError, match=words):
        prepare(config("ds_fl", MIXED, algorithm__align=0.5, algorithm__cache_life=2))


def test_multilabel_teacher_is_not_aligned() -> None:
    method = register_algorithm["ds_fl"](align=1.0)
    server = run_rounds("ds_fl", 0).server
    many = replace(server, task=Task("multilabel", 10), state={LABELS: torch.arange(10.0)})
    p = torch.rand(60, 10, generator=torch.Generator().manual_seed(4))
    assert method.align_mean(many, Uploads(specs=method.uploads), p) is p


def test_absolute_error_of_sharpened_logits_is_refused() -> None:
    words = "sharpen cannot be combined with distance=mae"
    with pytest.raises(UserError, match=words):
        prepare(config("fedmd", MIXED, algorithm__distance="mae", algorithm__sharpen="era"))


def test_regression_teacher_is_not_sharpened() -> None:
    method = register_algorithm["fedmd"](sharpen="era")
    server = replace(run_rounds("fedmd", 0).server, task=Task("regression", 1))
    z = torch.randn(60, 1, generator=torch.Generator().manual_seed(4))
    assert method.teacher_from_mean(server, Uploads(specs=method.uploads), z) is z


def test_label_counts_accumulate_over_uploads() -> None:
    silent = [{"match": "site_2", "shares": ["parameters", "predictions"]}]
    rounds = run_rounds(
        "hybrid", 0, {"clients__per_round": 2, "clients__overrides": silent, "rounds": 3}, align=0.5
    )
    expected = torch.zeros(10)
    for _ in range(3):
        cohort = rounds.run_round()["cohort"]
        expected = expected + counts_of(
            rounds, *(client_id for client_id in cohort if client_id != "site_2")
        ) * any(client_id != "site_2" for client_id in cohort)
        assert torch.equal(rounds.server.state[LABELS], expected)
    assert expected.sum() > 0


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
        assert (
            method == "feddf" or "counts" not in run_rounds(method, 0).algorithm.uploads
            # Declared items share the noise.
        )


def test_regression_is_not_aligned() -> None:
    runs = [
        prepare(settings("hybrid", True, align=align), dataset=slopes()).make_trainer()
        for align in (0.0, 1.0)
    ]
    for run in runs:
        run.run_round()
    plain, moved = (run.server.state[TEACHER] for run in runs)
    assert torch.equal(plain, moved) and runs[0].traffic.up == runs[1].traffic.up


@pytest.mark.parametrize("method", ["hybrid", "fedmd", "ds_fl"])
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
