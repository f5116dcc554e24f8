"""Private runs: noise, refused settings, the privacy ledger, and the end of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from hetero_fl.algorithms.averaging import CONTROL, Scaffold
from hetero_fl.algorithms.hybrid import Hybrid
from hetero_fl.communication.protocol import Message
from hetero_fl.config.protection import PrivacyConfig
from hetero_fl.core.objectives import Supervised
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Item, Payload
from hetero_fl.core.plan import ClassSums, Fit, Predict, Rows
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.experiment import prepare, run
from hetero_fl.federation.store import PrivateState
from hetero_fl.privacy.accounting import epsilon_of_history
from hetero_fl.privacy.dp_sgd import PrivacyBackend, step_charge
from hetero_fl.privacy.noise import KeyedNoiseSource
from hetero_fl.utils.errors import UserError
from tests.support.calls import record_calls
from tests.support.federations import broadcasts, config, rounds_of, same_bits

RECORD = {"noise_multiplier": 1.0, "delta": 1e-4, "accountant": "rdp"}
CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-4}
CPU = torch.device("cpu")


def sent_by(rounds: Any, clients: list[str]) -> dict[str, Payload]:
    """Return what clients upload in the first round."""
    bodies = broadcasts(rounds, clients)
    messages = {client: Message("train", body, 0) for client, body in bodies.items()}
    replies = rounds.executor.runtime.run(messages)
    return {client: Payload.decode(reply.body) for client, reply in replies.items()}


def update(rounds: Any, upload: Payload) -> torch.Tensor:
    """Return the difference of an uploaded model from the only model of the server."""
    (start,) = rounds.server.models.values()
    return torch.cat([(t - start[n]).flatten() for n, t in upload["model"].items()])


def private(
    method: str, privacy: dict[str, Any], models: Any = "cnn_gn_small", **changes: Any
) -> dict[str, Any]:
    return config(method, models=models, privacy=privacy, **changes)


def client_of(source: dict[str, Any]) -> Participant:
    return prepare(source).federation.client("site_1", PrivateState(), 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["local", "fedprox", "scaffold", "fedproto", "fd", "fml", "fedgen", "hybrid", "ditto", "feddf"],
)
def test_methods_run_with_private_examples(method: str) -> None:
    """Compare serial and batched runs, which use equal noise."""
    found = []
    for executor in ("serial", "batched"):
        source = private(
            method, RECORD, clients=2, runtime={"threads": 1, "executor": executor}, rounds=2
        )
        rounds = rounds_of(source)
        found.append(rounds.server.models)
    for slot, tensors in found[0].items():
        assert all(
            torch.allclose(t, found[1][slot][n], atol=1e-3)
            for n, t in tensors.items()
            if t.is_floating_point()
        )


def test_records_contain_epsilon_and_run_stops_at_target(tmp_path: Path) -> None:
    """Stop before the round that would exceed the target."""
    source = private(
        "fedavg",
        {**RECORD, "target_epsilon": 5.0},
        rounds=6,
    )
    ended = run(source, out=tmp_path / "run")
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    spent = [line["privacy"]["epsilon"] for line in lines]
    prepared = prepare(source)
    budget = prepared.budget
    assert spent == sorted(spent) and spent[-1] <= 5.0 < budget.epsilon(len(spent) + 1)
    assert 0 < len(lines) < 6
    assert ended.summary["privacy"] == {"epsilon": spent[-1], "delta": 1e-4, "unit": "record"}
    assert "stopped after round" in (tmp_path / "run" / "log.txt").read_text()
    # Publishing a loss would be a release.
    assert all(not line["train_loss"] for line in lines)
    # The ledger agrees with the clients' settings.
    n = [
        prepared.federation.client_infos[client_id].num_rows
        for client_id in prepared.federation.client_infos
    ]
    by_hand = max(
        epsilon_of_history(((1.0, 16 / k, len(lines) * round(k / 16)),), 1.0, 1e-4, "rdp")
        for k in n
    )
    assert spent[-1] == pytest.approx(by_hand)


def test_noise_for_target_epsilon_is_recorded(tmp_path: Path) -> None:
    source = private("hybrid", {"target_epsilon": 6.0, "delta": 1e-4, "accountant": "rdp"})
    prepared = prepare(source)
    assert prepared.config.privacy is not None and prepared.budget is not None
    assert 5.9 < prepared.budget.epsilon(2) <= 6.0
    # Label counts are charged once for hybrid; fedavg does not read them.
    assert all(
        any(scale == 4.0 and steps == 1 for scale, _, steps in h)
        for h in prepared.budget.histories[-1]
    )
    statistics = prepare(private("fedproto", RECORD, rounds=3)).budget
    assert all((4.0, 1.0, 3) in history for history in statistics.histories[-1])
    plain = prepare(private("fedavg", RECORD)).budget
    assert plain is not None and all(scale == 1.0 for h in plain.histories[-1] for scale, _, _ in h)


def guard(client: Participant, **changes: Any) -> PrivacyBackend:
    privacy = PrivacyConfig(**{**RECORD, "statistics_clip": 1.0, **changes})
    return PrivacyBackend(make_backend(DeviceMemory(CPU)), privacy, KeyedNoiseSource(0), [client])


def test_private_rows_are_read_only_in_steps() -> None:
    client = client_of(private("fedavg", RECORD))
    fit = Fit({"model": None}, batch_size=16, objective=Supervised())
    charge = step_charge(client, fit, PrivacyConfig(**RECORD))
    keeper = guard(client)
    with pytest.raises(UserError, match="outside of its steps"):
        client.data("train", None)
    with pytest.raises(UserError, match="a method that predicts private rows"):
        keeper.run([(client, Predict("model"))])
    assert len(keeper.run([(client, Predict("model", Rows("proxy")))])[0]) == 60
    (report,) = keeper.run([(client, fit)])
    assert charge.rate == 16 / client.num_rows and report.steps == charge.steps


def test_class_sums_are_clipped_and_noised() -> None:
    """Draw often: means of clipped rows, deviations √2·4·z and that times the clip."""
    client = client_of(private("fedavg", RECORD))
    columns = client.data("train", None)
    (features,) = make_backend(DeviceMemory(CPU)).run(
        [(client, Predict("model", readout="features"))]
    )
    rows = features * (0.5 / features.norm(dim=1, keepdim=True)).clamp(max=1)
    plain = torch.zeros(10, rows.shape[1]).index_add_(0, columns["y"], rows)
    keeper = guard(client, statistics_clip=0.5)
    step = ClassSums("model", readout="features")
    draws = [keeper.run([(client, step)])[0][0] for _ in range(60)]
    noise = torch.stack(draws) - plain
    expected = 2**0.5 * 4 * 0.5
    assert abs(float(noise.std()) / expected - 1) < 4 / (2 * noise.numel()) ** 0.5
    assert abs(float(noise.mean())) < 4 * expected / noise.numel() ** 0.5
    assert bool((keeper.run([(client, step)])[0][1] >= 0).all())


def test_non_finite_row_is_excluded_from_class_sums() -> None:
    client = client_of(private("fedproto", RECORD))
    columns = client.data("train", None)
    columns = {**columns, "x": torch.cat([columns["x"][:1] * float("inf"), columns["x"][1:]])}
    client.data = lambda name, through: columns
    sums, counts = guard(client).run([(client, ClassSums("model", readout="features"))])[0]
    assert bool(sums.isfinite().all()) and bool(counts.isfinite().all())


def test_reading_rows_while_creating_a_plan_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read rows in a plain `train` function before it returns its generator."""
    rounds = rounds_of(private("fedavg", RECORD), num_rounds=0)
    method = rounds.algorithm
    train = type(method).train

    def eager(self: Any, client: Participant, got: Payload) -> Any:
        client.data("train", None)
        return train(self, client, got)

    monkeypatch.setattr(type(method), "train", eager)
    with pytest.raises(UserError, match="outside of its steps"):
        rounds.run_round()


def test_label_counts_are_noised_once() -> None:
    prepared = prepare(private("hybrid", RECORD))
    known = prepared.federation.label_counts("site_1")
    true = prepared.data.label_counts("site_1")
    assert torch.equal(known, prepared.federation.label_counts("site_1"))
    assert not torch.equal(known, true) and float((known - true).abs().max()) < 4 * 5


# Client-level privacy
def test_no_noise_and_large_clip_equal_fedavg() -> None:
    """Include all clients with equal weights, so that clipping and denominator have no effect."""
    plain = rounds_of(
        config(
            "fedavg", models="cnn_gn_small", algorithm={"name": "fedavg", "weighting": "uniform"}
        )
    )
    noiseless = {**CLIENT, "noise_multiplier": 1e-9, "clip": 1e3}
    source = private("fedavg", noiseless, algorithm={"name": "fedavg", "weighting": "uniform"})
    found = rounds_of(source)
    for slot, tensors in plain.server.models.items():
        assert all(
            torch.allclose(t, found.server.models[slot][n], atol=1e-5) for n, t in tensors.items()
        )


def test_server_noise_has_the_expected_scale() -> None:
    """Clip updates to zero in many rounds: changes follow N(0, (z·C/expected)²).

    The scale does not depend on the cohort. The group of one client has a different expectation.
    """
    source = private(
        "fedavg", {**CLIENT, "clip": 1e-3, "noise_multiplier": 500.0}, clients=4, rounds=12
    )
    source["clients"]["per_round"] = 2
    source["clients"]["groups"].append(
        {"name": "lone", "count": 1, "model": {"name": "mlp", "hidden": [24]}}
    )
    rounds = rounds_of(source, num_rounds=0)
    history = {slot: [dict(t)] for slot, t in rounds.server.models.items()}
    for _ in range(12):
        rounds.run_round()
        for slot, tensors in rounds.server.models.items():
            history[slot].append(dict(tensors))
    expected = {slot: 0.5 / (2 / 5 * (1 if "mlp" in slot else 4)) for slot in history}
    for slot, models in history.items():
        steps = torch.cat([(b[n] - a[n]).flatten() for a, b in pairwise(models) for n in a])
        assert abs(float(steps.std()) / expected[slot] - 1) < 5 / (2 * len(steps)) ** 0.5


def test_updates_are_clipped_to_their_bound() -> None:
    rounds = rounds_of(private("fedavg", {**CLIENT, "clip": 0.01}), num_rounds=0)
    upload = sent_by(rounds, ["site_1"])["site_1"]
    assert float(update(rounds, upload).norm()) == pytest.approx(0.01, rel=1e-4)
    assert upload.item("model").weight == 1.0 and upload.report == {}


def test_shared_tensors_with_different_starts_move_by_bounded_updates() -> None:
    """Start a shared head from different values in two architectures.

    A participating client moves it by at most its clip over the expected number.
    """
    models = [{"name": "mlp", "hidden": [32, 24]}, {"name": "mlp", "hidden": [16, 24]}]
    quiet = {**CLIENT, "noise_multiplier": 1e-9, "clip": 0.1}
    for secure in ({}, {"channel__secure_sum": {}}):
        rounds = rounds_of(
            private("fedavg", quiet, models, clients=5, clients__common=["head."], **secure),
            num_rounds=0,
        )
        heads = [dict(model) for model in rounds.server.models.values()]
        assert float((heads[0]["head.weight"] - heads[1]["head.weight"]).norm()) > 1
        failing(rounds, "site_2")
        rounds.run_round()
        for before, model in zip(heads, rounds.server.models.values(), strict=True):
            moved = torch.cat(
                [(model[n] - before[n]).flatten() for n in before if n.startswith("head.")]
            )
            assert 0 < float(moved.norm()) < 0.1


def failing(rounds: Any, client: str) -> None:
    """Let this client's training fail."""
    site = rounds.executor.runtime
    release = site.privacy.release_upload

    def released(participant: Participant, *rest: Any) -> Payload:
        upload = release(participant, *rest)
        if participant.participant_id == client:
            upload = Payload({n: replace(upload.item(n), weight=-1.0) for n in upload})
        return upload

    object.__setattr__(site.privacy, "release_upload", released)


def test_rows_and_class_sums_are_noised_as_sums() -> None:
    for method, name in (("fedmd", "teacher"), ("fedproto", "prototypes")):
        quiet = rounds_of(
            private(method, {**CLIENT, "noise_multiplier": 1e-9, "clip": 1e3}), num_rounds=1
        )
        plain = rounds_of(config(method, models="cnn_gn_small"), num_rounds=1)
        a, b = quiet.server.state[name], plain.server.state[name]
        assert torch.allclose(a, b, atol=1e-4)
        loud = rounds_of(private(method, {**CLIENT, "clip": 1e3}), num_rounds=1)
        assert not torch.allclose(loud.server.state[name], a, atol=1e-2)


def test_votes_select_the_majority_class() -> None:
    """Without relevant noise, the teacher is the majority of first choices."""
    privacy = {**CLIENT, "noise_multiplier": 1e-9, "votes": True}
    found = rounds_of(private("fedmd", privacy, clients=5), num_rounds=0)
    uploads = sent_by(found, found.sample_cohort(0)).values()
    sent = [upload["logits"] for upload in uploads]
    # The bound for any rows.
    assert all(float(votes.norm()) == pytest.approx(1.0, rel=1e-5) for votes in sent)
    ballots = torch.stack([votes.argmax(-1) for votes in sent])
    found.run_round()
    teacher = found.server.state["teacher"]
    most, second = torch.nn.functional.one_hot(ballots, 10).sum(0).topk(2).values.unbind(-1)
    clear, majority = most > second, torch.nn.functional.one_hot(ballots, 10).sum(0).argmax(-1)
    assert bool(clear.any()) and torch.equal(teacher.argmax(-1)[clear], majority[clear])
    assert torch.allclose(teacher.exp().sum(-1), torch.ones(len(teacher)))


def test_adaptive_clip_converges_to_quantile_and_is_checkpointed() -> None:
    privacy = {
        **CLIENT,
        "noise_multiplier": 1e-3,
        "clip": 100.0,
        "adaptive_clip": {"noise": 1e-2, "lr": 1.0},
    }
    rounds = rounds_of(private("fedavg", privacy, rounds=12), num_rounds=12)
    bound = 100.0 * rounds.link.privacy.factors["model"]
    # Updates of one epoch have norms of about one.
    assert 0.01 < bound < 5
    again = rounds_of(private("fedavg", privacy, rounds=12), num_rounds=6)
    later = rounds_of(private("fedavg", privacy, rounds=12), num_rounds=0)
    later.executor.store = again.store
    later.load_state_dict(again.state_dict())
    for _ in range(6):
        later.run_round()
    assert later.link.privacy.factors == rounds.link.privacy.factors
    assert all(same_bits(t, later.server.models[s]) for s, t in rounds.server.models.items())


def test_adaptive_clip_splits_the_noise_budget() -> None:
    """Noise on sum and counts together costs as much as `noise_multiplier` alone."""
    privacy = {**CLIENT, "noise_multiplier": 0.8, "adaptive_clip": {"noise": 0.6}}

    sums = rounds_of(private("fedavg", privacy), num_rounds=0).link.privacy

    # Counts change by 1/2.
    spent = sums.update_noise_multiplier() ** -2 + (2 * 0.6) ** -2
    assert spent == pytest.approx(0.8**-2)


def test_poisson_cohorts_vary_in_size_and_cost_less() -> None:
    changes: dict[str, Any] = {"clients": 6, "rounds": 8, "clients__per_round": 2}
    poisson = prepare(
        private("fedavg", {**CLIENT, "poisson_cohorts": True, "accountant": "rdp"}, **changes)
    )
    fixed = prepare(private("fedavg", CLIENT, **changes))
    rounds = poisson.make_trainer()
    sizes = {len(rounds.sample_cohort(r)) for r in range(40)}
    assert len(sizes) > 2 and min(sizes) < 2 < max(sizes)
    assert poisson.budget is not None and fixed.budget is not None
    assert (
        poisson.budget.epsilon(8)
        == epsilon_of_history(((1.0, 2 / 6, 8),), 1.0, 1e-4, "rdp")
        < epsilon_of_history(((1.0, 1.0, 8),), 1.0, 1e-4)
    )
    empty = next(r for r in range(200) if not rounds.sample_cohort(r))
    rounds.completed = empty
    before = {n: t.clone() for n, t in next(iter(rounds.server.models.values())).items()}
    # No client participates, but the noise is added.
    rounds.run_round()
    timed = rounds_of(
        private("fedavg", {**CLIENT, "poisson_cohorts": True}, devices={}, **changes), num_rounds=0
    )
    timed.completed = empty
    assert timed.run_round()["counts"]["invited"] == 0
    after = next(iter(rounds.server.models.values()))
    assert all(not torch.equal(before[n], t) for n, t in after.items())


# Local privacy
def test_local_noise_is_added_to_uploads() -> None:
    """Use sensitivity twice the bound (replacement), and √3 for three items."""
    source = private(
        "hybrid",
        {
            "unit": "local",
            "noise_multiplier": 3.0,
            "delta": 1e-4,
            "clip": {"model": 1e-6, "logits": 1e-6},
        },
    )
    rounds = rounds_of(source, num_rounds=0)
    assert set(rounds.algorithm.uploads) == {"model", "logits", "counts"}
    upload = sent_by(rounds, ["site_1"])["site_1"]
    expected = 2 * 3.0 * 3**0.5 * 1e-6
    # float32 has few bits left next to the weights.
    assert abs(float(update(rounds, upload).std()) / expected - 1) < 0.2
    logits = upload["logits"]
    assert abs(float(logits.std()) / expected - 1) < 5 / (2 * logits.numel()) ** 0.5
    assert isinstance(upload.item("logits"), Item) and upload.item("logits").weight == 1.0


ARCHITECTURES = ["cnn_gn_small", {"name": "mlp", "hidden": [12]}, "linear"]


def test_server_steps_do_not_reveal_participants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distill into an architecture of one client, sampled or not."""
    distill = Mock(side_effect=lambda *_, **__: iter(()))
    monkeypatch.setattr(Hybrid, "distill_into_groups", distill)
    rounds = rounds_of(private("hybrid", CLIENT, ARCHITECTURES), num_rounds=0)
    rounds.sample_cohort = lambda round_idx: ["site_1", "site_2"]  # type: ignore[method-assign]

    rounds.run_round()

    _, _, senders, _ = distill.call_args.args
    infos = rounds.federation.client_infos.values()
    assert {sender.arch.spec_id for sender in senders} == {info.arch.spec_id for info in infos}


def test_control_variates_are_scaled_by_the_expected_number_of_senders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = private("scaffold", CLIENT, "linear", clients__per_round=2)
    trainers = [rounds_of(source, num_rounds=0), rounds_of(source, num_rounds=0)]
    uploads = record_calls(monkeypatch, Scaffold, "aggregate", lambda method, server, sent: sent)
    for trainer, cohort in zip(trainers, (["site_1", "site_2"], ["site_1"]), strict=True):
        trainer.sample_cohort = lambda round_idx, cohort=cohort: cohort  # type: ignore[method-assign]
        trainer.run_round()

    for sent in uploads:
        (tensors,) = sent.counts_by_group(CONTROL).values()
        assert set(tensors.values()) == {2.0}
    assert len(uploads) == 2
