"""The initial phase of FedMD and KT-pFL: its epochs, once per client, no effect when disabled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_fl.algorithms import register_algorithm
from hetero_fl.algorithms.requirements import describe_needs, format_needs
from hetero_fl.core.objectives import Supervised
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Item, Payload
from hetero_fl.core.plan import Fit, Plan
from hetero_fl.engine.batches import index_batches
from hetero_fl.experiment import prepare, run
from hetero_fl.federation.synchronous import SynchronousTrainer
from hetero_fl.reporting.rendering import render
from hetero_fl.reporting.report import report_facts
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import UserError
from tests.algorithms.test_kt_pfl import T, follow
from tests.engine.test_vectorized_runs import agree
from tests.references.local_training import clients, largest_difference, module, train
from tests.support import asynchronous_runs
from tests.support.federations import MIXED, config, rounds_of, same_bits
from tests.support.workers import outcome, rounds_on, setup_of, shared_process_pool

ON = {"initial_phase": True, "initial_private_epochs": 2}
PHASE = ("initial public", "initial private")


def federation(
    method: str = "fedmd", clients: int = 4, per_round: int = 2, **changes: Any
) -> dict[str, Any]:
    """Return a run that samples clients, so that they first participate in different rounds."""
    settings = {"name": method, **ON, **({"initial_public_epochs": 3} if method == "fedmd" else {})}
    labels = method == "fedmd"
    source = config(
        method, MIXED, clients, rounds=4, clients__per_round=per_round, data__proxy__labels=labels
    )
    return {**source, "algorithm": {**settings, **changes}}


def watched(rounds: SynchronousTrainer) -> Counter[str]:
    """Count how often each client starts a fit of each label, as in `site_1: initial private`."""
    seen: Counter[str] = Counter()
    rounds.executor.runtime.listener = lambda line: seen.update([line])  # type: ignore[attr-defined]
    return seen


def step_through(
    model: nn.Module, x: Tensor, y: Tensor, batch: int, epochs: int, where: tuple[Any, ...]
) -> None:
    """Train epochs of SGD with momentum on cross-entropy, in batches drawn with that key."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for rows in index_batches(
        len(y), Fit({}, Supervised(), epochs=epochs, batch_size=batch), where
    ):
        sgd.zero_grad()
        F.cross_entropy(model(x[rows]).logits, y[rows]).backward()
        sgd.step()


def cross_entropy(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(model(x).logits, y)


@pytest.mark.usefixtures("float64")
def test_fedmd_first_round_matches_reference() -> None:
    """Expect labeled proxy rows, then private rows, then the usual round, for new clients only."""
    rounds = rounds_of(federation(), num_rounds=0)
    taken_part: set[str] = set()
    kinds = set()
    for index in range(4):
        before, teacher = clients(rounds), rounds.server.state.get("teacher")
        cohort = rounds.run_round()["cohort"]
        for client_id in cohort:
            client, model = (
                before[client_id],
                module(before[client_id].arch["model"], before[client_id].models["model"]),
            )
            public, own = client.data("proxy", None), client.data("train", None)
            if client_id not in taken_part:
                step_through(
                    model,
                    public["x"],
                    public["y"],
                    32,
                    3,
                    (0, index, client_id, "initial public", 0),
                )
                step_through(
                    model, own["x"], own["y"], 16, 2, (0, index, client_id, "initial private", 0)
                )
            if teacher is not None:
                digest(model, public["x"], teacher, (0, index, client_id, "digest", 0))
            train(client, list(model.parameters()), cross_entropy(model))
            assert largest_difference(rounds.store.get(client_id).models["model"], model) < 1e-9, (
                index,
                client_id,
            )
            kinds.add((client_id in taken_part, teacher is None))
        taken_part |= set(cohort)
    # Both kinds of first round occurred.
    assert kinds == {(False, True), (False, False), (True, False)}


def digest(model: nn.Module, x: Tensor, teacher: Tensor, where: tuple[Any, ...]) -> None:
    """Train one epoch toward the consensus: KL · T² with T = 2."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for rows in index_batches(len(x), Fit({}, Supervised(), batch_size=32), where):
        sgd.zero_grad()
        log_q, p = (model(x[rows]).logits / 2).log_softmax(1), (teacher[rows] / 2).softmax(1)
        (F.kl_div(log_q, p, reduction="batchmean") * 4).backward()
        sgd.step()


@pytest.mark.usefixtures("float64")
def test_kt_pfl_first_round_matches_reference() -> None:
    """Expect private rows first, then the mixture if there is one, then the usual epochs."""
    rounds = rounds_of(federation("kt_pfl", temperature=T), num_rounds=0)
    taken_part: set[str] = set()
    late = 0
    for index in range(3):
        before, state = clients(rounds), dict(rounds.server.state)
        cohort = rounds.run_round()["cohort"]
        for client_id in cohort:
            client, model = (
                before[client_id],
                module(before[client_id].arch["model"], before[client_id].models["model"]),
            )
            own = client.data("train", None)
            if client_id not in taken_part:
                step_through(
                    model, own["x"], own["y"], 16, 2, (0, index, client_id, "initial private", 0)
                )
                late += index > 0
            if "senders" in state:
                place = {name: i for i, name in enumerate(state["seen"])}
                weights = torch.ones(len(state["senders"]))
                if client_id in place:
                    weights = state["coefficients"][
                        place[client_id], [place[name] for name in state["senders"]]
                    ]
                mixed = ((weights / weights.sum())[:, None, None] * state["predictions"]).sum(0)
                follow(
                    model,
                    client.data("proxy", None)["x"],
                    mixed,
                    (0, index, client_id, "digest", 0),
                )
            train(client, list(model.parameters()), cross_entropy(model))
            assert largest_difference(rounds.store.get(client_id).models["model"], model) < 1e-9, (
                index,
                client_id,
            )
        taken_part |= set(cohort)
    assert late


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedmd", "kt_pfl"])
def test_disabled_initial_phase_changes_nothing(method: str) -> None:
    plain = rounds_of(config(method, MIXED))
    off = rounds_of(
        config(
            method,
            MIXED,
            algorithm={"name": method, "initial_phase": False},
            data__proxy__labels=True,
        )
    )
    on = rounds_of(
        config(method, MIXED, algorithm={"name": method, **ON}, data__proxy__labels=True)
    )

    for client_id in plain.federation.client_infos:
        assert plain.store.encoded(client_id) == off.store.encoded(client_id)
        assert not same_bits(
            plain.store.get(client_id).models["model"], on.store.get(client_id).models["model"]
        )
        assert "initial_phase" not in plain.store.get(client_id).state


@pytest.mark.parametrize("method", ["fedmd", "kt_pfl"])
def test_each_client_runs_it_once_in_its_first_round(method: str) -> None:
    rounds = rounds_of(federation(method), num_rounds=0)
    seen = watched(rounds)
    taken_part: Counter[str] = Counter()
    labels = PHASE if method == "fedmd" else PHASE[1:]

    for _ in range(4):
        taken_part.update(rounds.run_round()["cohort"])
        for client_id in rounds.federation.client_infos:
            assert [seen[f"{client_id}: {label}"] for label in labels] == [
                min(1, taken_part[client_id])
            ] * len(labels)

    assert max(taken_part.values()) > 1


def test_refused_first_upload_repeats_it() -> None:
    rounds = rounds_of(federation(per_round=4), num_rounds=0)
    seen = watched(rounds)
    spoil_first_upload(rounds, "site_1")

    assert list(rounds.run_round()["failed"]) == ["site_1"]
    rounds.run_round()
    rounds.run_round()

    counts = [seen[f"{name}: initial private"] for name in rounds.federation.client_infos]
    assert counts == [2, 1, 1, 1]


def spoil_first_upload(rounds: SynchronousTrainer, client_id: str) -> None:
    """Put a NaN into a client's upload of the first round."""
    method = type(rounds.algorithm)

    def train(self: Any, client: Participant, got: Payload) -> Plan[Any]:
        items = yield from method.train(self, client, got)
        if client.participant_id == client_id and client.round_context.round_idx == 0:
            spoiled = items["logits"].values.clone()
            spoiled[0, 0] = float("nan")
            items["logits"] = Item(spoiled, items["logits"].weight, "rows")
        return items

    rounds.algorithm = type("Spoiled", (method,), {"train": train})(**rounds.algorithm.model_dump())
    rounds.executor.runtime.algorithm = rounds.expectations.algorithm = rounds.algorithm  # type: ignore[attr-defined]


def test_proxy_labels_are_not_needed_without_public_epochs() -> None:
    source = federation(initial_public_epochs=0)
    source["data"]["proxy"]["labels"] = False
    rounds = rounds_of(source, num_rounds=0)
    seen = watched(rounds)

    (first, *_) = rounds.run_round()["cohort"]

    assert seen[f"{first}: initial private"] == 1 and seen[f"{first}: initial public"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedmd", "kt_pfl"])
def test_worker_processes_match_one_process(method: str) -> None:
    setup = setup_of(federation(method, per_round=3))
    expected = outcome(rounds_on(setup, None))
    with shared_process_pool(setup, 2) as pool:
        pool.take(setup)
        for size in (1, 2):
            assert outcome(rounds_on(setup, pool, size)) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["fedmd", "kt_pfl"])
def test_batched_run_matches_serial_run(method: str) -> None:
    agree({**federation(method, clients=6, per_round=6), "rounds": 3})


def test_asynchronous_run_has_it_once_per_client() -> None:
    source = asynchronous_runs.source(
        "fedmd", algorithm=federation()["algorithm"], data__proxy__labels=True, faults={}
    )
    session = asynchronous_runs.session(source)
    seen = watched(session)

    for _ in range(3):
        session.run_round()

    started = {line.partition(":")[0] for line in seen}
    assert len(started) > 2 and sum(seen.values()) > 3 * len(started)
    assert all(seen[f"{client_id}: initial private"] == 1 for client_id in started)


def test_requirements_are_declared() -> None:
    fedmd, kt_pfl = register_algorithm["fedmd"], register_algorithm["kt_pfl"]

    assert format_needs(describe_needs(fedmd())) == "proxy set"
    assert format_needs(describe_needs(fedmd(initial_phase=True))) == "labeled proxy set"
    assert (
        format_needs(describe_needs(fedmd(initial_phase=True, initial_public_epochs=0)))
        == "proxy set"
    )
    assert format_needs(describe_needs(kt_pfl(initial_phase=True))) == "proxy set, single uploads"
    assert any(
        "trains on the labels of the proxy set" in note for note in prepare(federation()).notes
    )


def test_report_names_use_of_proxy_labels(tmp_path: Path) -> None:
    off = {"name": "fedmd"}
    for settings, words in (
        (federation()["algorithm"], "clients train on once"),
        (off, "are never used"),
    ):
        source = {
            **federation(),
            "rounds": 1,
            "algorithm": settings,
            "output": {"plots": False, "report": False},
        }
        run(source, out=tmp_path / words.split()[0])
        written = RunDirectory(tmp_path / words.split()[0])
        facts = report_facts(written.summary(), written.details())
        assert f"60 rows, whose labels {words}" in render("report_story.html", **facts)


def test_unlabeled_proxy_set_and_privacy_are_refused() -> None:
    source = federation()
    source["data"]["proxy"]["labels"] = False
    with pytest.raises(
        UserError, match=r"^algorithm\.initial_phase=true .*data\.proxy\.labels is false"
    ) as error:
        prepare(source)
    assert "\n" not in str(error.value)

    private = {
        **federation("kt_pfl"),
        "privacy": {"noise_multiplier": 1.0, "delta": 1e-4, "accountant": "rdp"},
    }
    private["clients"]["groups"][0]["model"] = "mlp"
    with pytest.raises(
        UserError,
        match=r"^algorithm\.initial_phase=true cannot be combined with privacy\.unit=record",
    ) as error:
        prepare(private)
    assert "\n" not in str(error.value)
