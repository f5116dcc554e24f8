"""The estimated cost of a run compared with the traffic that the run counts."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import yaml

from hetero_fl.algorithms import FedAvg
from hetero_fl.cli import main
from hetero_fl.experiment import prepare, run
from hetero_fl.federation.cost import expected_cost
from hetero_fl.federation.expected import ExpectedUploads
from hetero_fl.reporting.formatting import format_bytes
from model_zoo import create_model
from tests.support.asynchronous_runs import source as paced
from tests.support.calls import record_results
from tests.support.cases import each_case
from tests.support.federations import TOP, config, rounds_of


def estimate_and_count(tmp_path: Any, source: dict[str, Any]) -> tuple[list[int], list[int]]:
    prepared = prepare(source)
    c = prepared.config
    cost = expected_cost(
        prepared.method, prepared.federation, c.rounds, c.clients.per_round, c.evaluation.every
    )
    assert cost.is_upper_bound == any(stage.topk for stage in c.channel.compress)
    counted = run(source, out=tmp_path / "run").summary["communication"]
    estimated = [cost.up.total(), cost.down.total() + cost.evaluation.total()]
    return estimated, [counted["up_bytes"], counted["down_bytes"]]


def small(method: str, **changes: Any) -> dict[str, Any]:
    models = ["mlp", {"name": "mlp", "hidden": [24]}]
    return config(method, models, clients=4, **changes)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize(
    ("clients", "share_every"), [("site_1", 1), ("site_[12]", 3), ("site_*", 3)]
)
def test_cost_with_sharing_and_evaluation_intervals(
    clients: str, share_every: int, every: int, tmp_path: Any
) -> None:
    now_and_then = {"match": clients, "share_every": share_every}
    source = small(
        "hybrid", rounds=6, evaluation={"every": every}, clients__overrides=[now_and_then]
    )
    estimated, counted = estimate_and_count(tmp_path, source)
    assert estimated == counted and min(counted) > 0


def test_cost_of_sizes_that_differ_between_rounds(tmp_path: Any) -> None:
    # Broadcasts grow with the uploads.
    source = small("ensemble", clients__per_round=2, rounds=4)
    estimated, counted = estimate_and_count(tmp_path, source)
    assert estimated == pytest.approx(counted, rel=0.1) and min(counted) > 0


def test_cost_is_an_upper_bound_for_learned_sizes(
    tmp_path: Any,
) -> None:
    source = small("fedkd", rounds=4, clients__per_round=3)
    prepared = prepare(source)
    cost = expected_cost(prepared.method, prepared.federation, 4, 3)
    assert cost.is_upper_bound
    counted = run(source, out=tmp_path / "run").summary["communication"]
    most = (cost.up.total(), cost.down.total() + cost.evaluation.total())
    assert counted["up_bytes"] < most[0] and counted["down_bytes"] < most[1]
    fml = rounds_of(small("fml", rounds=4, clients__per_round=3)).traffic
    # At most the uncompressed mentee, except for padding.
    assert most[0] < 1.1 * fml.up


@each_case(
    ("changes", "words"),
    [
        ({}, "about "),
        ({"devices": {"speed": 1e9}, "algorithm__name": "fedkd"}, "about "),
        ({"evaluation__patience": 3}, "at most "),
        ({"algorithm__name": "fedkd"}, "at most "),
        ({"algorithm__name": "python:tests.support.documented_method:MedianTeacher"}, "about "),
    ],
)
def test_check_reports_accuracy_of_the_cost(
    changes: dict[str, Any], words: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(small("fedavg", **changes)))
    assert main(["--config", str(path), "--check", "--allow-code"], command="train") == 0
    printed = capsys.readouterr().out
    (line,) = [text for text in printed.splitlines() if " in 2 rounds: " in text]
    assert line.startswith(words)
    total, per_round = re.findall(
        rf"{words}(\S+) kB in 2 rounds: .*; (\S+) kB per round", " ".join(printed.split())
    )[0]
    assert float(per_round) == pytest.approx(float(total) / 2, abs=0.1)


class Warming(FedAvg):
    """A method that uploads from its second round on."""

    def train(self, client: Any, received: Any) -> Any:
        items = yield from super().train(client, received)
        return items if client.round_context.round_idx >= 1 else {}


def test_cost_of_custom_method_may_depend_on_the_round() -> None:
    source = small(f"python:{__name__}:Warming", rounds=3)
    rounds = rounds_of(source, num_rounds=0)
    assert [rounds.run_round()["failed"] for _ in range(3)] == [{}] * 3
    cost = expected_cost(rounds.algorithm, rounds.federation, 3, every=1)
    assert cost.up.total() == rounds.traffic.up


def test_number_of_dry_runs_does_not_grow_with_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_results(monkeypatch, ExpectedUploads, "dry_run_upload")
    prepared = prepare(small("hybrid", clients__overrides=[{"match": "site_1", "share_every": 2}]))

    costs, counts = [], []
    for rounds in (4, 6, 60):
        calls.clear()
        costs.append(expected_cost(prepared.method, prepared.federation, rounds))
        counts.append(len(calls))

    assert counts[0] == counts[1] == counts[2] > 0
    for name in ("up", "down", "evaluation", "client_operations"):
        first, second, last = (getattr(cost, name).total() for cost in costs)
        # After the first rounds, two rounds add the same cost again.
        assert last - first == 28 * (second - first) > 0


# Asynchronous runs


@pytest.mark.slow
@each_case(
    ("channel", "method"),
    itertools.product([{}, TOP], ["hybrid", "fedmd", "fedbuff", "fedasync"]),
)
def test_asynchronous_cost_is_close_to_traffic(
    method: str, channel: dict[str, Any], tmp_path: Any
) -> None:
    run_config = paced(method, channel=channel, faults={})
    if method in ("fedbuff", "fedasync"):
        del run_config["runtime"]["buffer"]

    expected, counted = estimate_and_count(tmp_path, run_config)

    # Clients that are fast enough to upload twice are not known in advance.
    assert expected == pytest.approx(counted, rel=0.5) and any(counted) == (method != "local")


def test_check_of_asynchronous_run_names_omitted_costs(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(paced("fedavg")))

    assert main(["--config", str(path), "--check"], command="train") == 0

    printed = " ".join(capsys.readouterr().out.split())
    expected, _ = estimate_and_count(tmp_path, paced("fedavg"))
    assert f"about {format_bytes(sum(expected))} in 3 rounds: " in printed
    assert "asynchronous: estimated for clients of equal speed without failures" in printed


@each_case("mentee", ["cnn_bn_small", "mlp"])
def test_check_counts_models_added_by_a_method(
    mentee: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Count the averaged model at the server, and personal and shared models at clients."""
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(config("fml", algorithm={"name": "fml", "mentee": mentee})))
    assert main(["--config", str(path), "--check"], command="train") == 0
    printed = " ".join(capsys.readouterr().out.split())
    (at_server,) = re.findall(r"server memory for models: about (\S+) kB", printed)
    models = [create_model(name, 10, 1, 8) for name in ("cnn_bn_small", mentee)]
    num_values = sum(t.numel() for model in models for t in model.state_dict().values())
    assert float(at_server) == pytest.approx(4e-3 * num_values, rel=0.02)
