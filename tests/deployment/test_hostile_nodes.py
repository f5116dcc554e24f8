"""Nodes that answer anything at all lose their part in the round; no other node is affected."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hetero_fl.algorithms import register_algorithm
from hetero_fl.core.payload import Item, Payload
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Examples
from hetero_fl.data.preprocessing import Preprocess
from hetero_fl.data.splits import RowSelection
from hetero_fl.deployment import validation
from hetero_fl.deployment.messages import (
    FORM,
    ReadyHead,
    RequestRefusedError,
    decode_body,
    message,
    read,
)
from hetero_fl.deployment.transport import Envelope, Handle
from hetero_fl.deployment.validation import (
    evaluation_tree,
    read_data_info,
    read_evaluation,
    read_settings,
)
from hetero_fl.experiment.preparation import prepare
from hetero_fl.reporting.plots import clients
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.serialization import encode
from tests.support.cases import each_case
from tests.support.deployments import Federation, small
from tests.support.federations import broadcasts
from tests.support.nodes import Clock

Change = Callable[[Envelope], Envelope]


def head(**changes: Any) -> Change:
    return lambda e: Envelope(
        {n: v for n, v in {**e.head, **changes}.items() if v is not None}, e.body
    )


def body(data: bytes) -> Change:
    return lambda e: Envelope({**e.head, "check": hashlib.sha256(data).hexdigest()}, data)


def payload(change: Callable[[dict[str, Item]], dict[str, Any]]) -> Change:
    """Change the items of an upload; its checksum stays correct."""

    def changes(e: Envelope) -> Envelope:
        sent = Payload.decode(e.body)
        return body(Payload(change(dict(sent.items_by_name)), sent.report).encode())(e)

    return changes


def tensors(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Change:
    def changes(items: dict[str, Item]) -> dict[str, Any]:
        model = items["model"]
        return {"model": replace(model, values={n: change(n, t) for n, t in model.values.items()})}

    return payload(changes)


def tree(**changes: Any) -> Change:
    """Replace the fields of all items of an upload, without the checks of `Payload`."""

    def changes_(e: Envelope) -> Envelope:
        items = Payload.decode(e.body).items_by_name
        result = {
            n: {"values": i.values, "weight": i.weight, "kind": i.kind, **changes}
            for n, i in items.items()
        }
        return body(encode({"items": result, "report": {}}, "hetero_fl payload 1"))(e)

    return changes_


def one_huge(name: str, tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[0] = -2e18
    return changed


UPLOADS: dict[str, tuple[Change, str]] = {
    "another answer": (head(ask="quite another"), "quite another"),
    "no answer": (lambda e: Envelope(), "None"),
    "many words": (head(ask="refused", why="no\n" * 10_000), "no no no"),
    "a reason that is a number": (head(ask="refused", why=7), "7"),
    "another task's": (head(task="0" * 64), "answer: expected task "),
    "no state": (head(state=None), "the answer cannot be read: 'done': state"),
    "a state that is a path": (
        head(state="../../../etc/passwd"),
        "'done': state: must match ^([0-9a-f]{64})?$, got '../../../etc/passwd'",
    ),
    "a state that is a number": (
        head(state=5),
        "the answer cannot be read: 'done': state: expected a string, got 5",
    ),
    "a kind that is a number": (head(what=1.5), "the answer cannot be read: 'done': what"),
    "a checksum that is none": (head(check="zz"), "the answer cannot be read"),
    "another checksum": (head(check="0" * 64), "checksum mismatch"),
    "a checksum that is true": (head(check=True), "the answer cannot be read"),
    "nothing": (body(b""), "upload refused: expected at least 8 bytes, got 0"),
    "junk": (body(b"\x08" + b"\0" * 7 + b"{" * 8), "upload refused: malformed"),
    "a long header": (body(b"\xff" * 64), "upload refused: the declared header is longer"),
    "a tree of something else": (
        body(encode([1, 2], FORM)),
        "upload refused: expected ",
    ),
    "NaN": (tensors(lambda n, t: t * math.nan if t.is_floating_point() else t), "is not finite"),
    "infinity": (
        tensors(lambda n, t: t + math.inf if t.is_floating_point() else t),
        "is not finite",
    ),
    "huge values": (
        tensors(lambda n, t: torch.full_like(t, 3.4e38)),
        "expected magnitudes of at most 1e+18, got 3.4e+38",
    ),
    "one huge value": (
        tensors(one_huge),
        "expected magnitudes of at most 1e+18, got 2e+18",
    ),
    "other shapes": (tensors(lambda n, t: t.flatten()), "expected shape"),
    "other types": (tensors(lambda n, t: t.double()), "dtype"),
    "huge": (tensors(lambda n, t: torch.zeros(3_000_000)), "expected "),
    "other tensors": (
        payload(lambda i: {"model": Item({"x": torch.zeros(1)}, 1.0, "params")}),
        "unexpected tensor names",
    ),
    "one tensor": (
        payload(lambda i: {"model": Item(torch.zeros(1), 1.0, "params")}),
        "expected tensors by name",
    ),
    "another item": (payload(lambda i: {**i, "more": torch.zeros(1)}), "not expected"),
    "another kind": (
        payload(lambda i: {"model": replace(i["model"], kind="update")}),
        "expected kind 'params', got 'update'",
    ),
    "a negative weight": (tree(weight=-1.0), "weight"),
    "an endless weight": (tree(weight=math.inf), "weight"),
    "a huge weight": (tree(weight=1.7e308), "expected a weight from 0 to 1e+18"),
    "a weight above the rows": (tree(weight=1e17), "item 'model': weight must be <= "),
    "no item": (payload(lambda i: {}), "item 'model': missing"),
    "another exchange": (head(what="unmask"), "expected a reply to 'train', got 'unmask'"),
    "a weight that is text": (tree(weight="much"), "weight"),
    "a kind unknown": (tree(kind="thing"), "unknown kind"),
    "values that are text": (tree(values="all"), "expected a tensor or tensors by name"),
}


def by_turn(ask: str, changes: list[Change]) -> Callable[[Handle], Handle]:
    """Apply the n-th change to the answer to the n-th request of this kind."""

    def between(handle: Handle) -> Handle:
        left = list(changes)

        def handles(envelope: Envelope) -> Envelope:
            answer = handle(envelope)
            return (
                left.pop(0)(answer)
                if envelope.head.get("what", envelope.head["ask"]) == ask
                else answer
            )

        return handles

    return between


def test_hostile_uploads_are_dropped(tmp_path: Path) -> None:
    """Send one kind of hostile upload in each round."""
    count = len(UPLOADS)
    federation = Federation(tmp_path)
    run_config = small(models="linear", rounds=count, evaluation__every=count)
    run = federation.serve(
        run_config, {"site_3": by_turn("train", [change for change, _ in UPLOADS.values()])}
    )
    assert run.summary["rounds_completed"] == count
    for (name, (_, expected)), record in zip(UPLOADS.items(), run.metrics, strict=True):
        assert list(record["failed"]) == ["site_3"] and expected in record["failed"]["site_3"], (
            name,
            record["failed"],
        )
        assert len(record["failed"]["site_3"]) < 500 and "\n" not in record["failed"]["site_3"]
    assert set(run.metrics[-1]["clients"]) == {"site_1", "site_2", "site_3"}


def test_reply_of_another_exchange_is_dropped_in_asynchronous_runs(tmp_path: Path) -> None:
    runtime = {"mode": "async", "threads": 1, "executor": "serial"}
    changes = [head(what="unmask"), *[head()] * 9]

    run = Federation(tmp_path).serve(
        small(models="linear", rounds=1, runtime=runtime), {"site_3": by_turn("train", changes)}
    )

    line = "upload refused: expected a reply to 'train', got 'unmask'"
    assert run.metrics[0]["failed"] == {"site_3": line}


def reading(change: Callable[[dict[str, Any]], Any]) -> Change:
    def changes(e: Envelope) -> Envelope:
        tree = copy.deepcopy(decode_body(e))
        changed = change(tree)
        return Envelope(e.head, message("x", tree if changed is None else changed).body)

    return changes


def scores(**changes: Any) -> Change:
    return reading(lambda t: t["scores"]["personal"].update(changes))


READINGS: dict[str, tuple[Change, str]] = {
    "nothing": (lambda e: Envelope(e.head), "'done':"),
    "junk": (lambda e: Envelope(e.head, b"x" * 100), "'done':"),
    "another answer": (head(ask="junk"), "junk"),
    "a list": (reading(lambda t: [1, 2]), "evaluation: expected"),
    "nothing of it": (reading(lambda t: {}), "evaluation: scores: missing"),
    "more of it": (reading(lambda t: t.update(more=1)), "evaluation: more: unknown key"),
    "NaN": (scores(accuracy=math.nan), "expected a finite number"),
    "better than all": (scores(accuracy=1.5), "accuracy: must be <= 1.000000001, got 1.5"),
    "endless": (scores(loss=math.inf), "expected a finite number"),
    "a negative loss": (scores(loss=-1.0), "got -1"),
    "a loss beyond squares": (scores(loss=1e200), "must be <= 1000000000000000000, got 1e+200"),
    "a loss beyond sums": (scores(loss=1.7e308), "must be <= 1000000000000000000, got 1.7e+308"),
    "an integer of a thousand bits": (
        scores(loss=2**1000),
        "must be <= 1000000000000000000, got 1",
    ),
    "text": (scores(accuracy="<script>"), "accuracy: expected a number"),
    "a number without end": (scores(accuracy=10**400), "accuracy: expected a number"),
    "true": (scores(accuracy=True), "accuracy: expected a number"),
    "a score of its own": (scores(mine=1.0), "evaluation: scores.personal.mine: unknown key"),
    "scores of something else": (
        reading(lambda t: t["scores"].update(other={})),
        "scores.other: unknown key",
    ),
    "scores that are none": (
        reading(lambda t: t.update(scores=3)),
        "scores: expected a mapping",
    ),
    "a trigger": (reading(lambda t: t.update(triggered=0.5)), "triggered: expected null"),
    "a confusion": (
        reading(lambda t: t.update(confusion={"personal": [[1, 2], [3, 4]]})),
        "confusion.personal.0: expected at least 10 entries",
    ),
    "a calibration": (
        reading(lambda t: t.update(calibration={"personal": {"ece": 0.1}})),
        "calibration.personal.confidence: missing",
    ),
    "many baselines": (
        reading(
            lambda t: t.update(
                baselines={"personal": {str(i): t["scores"]["personal"] for i in range(99)}}
            )
        ),
        "expected at most 32 entries",
    ),
    "a forecast": (
        reading(
            lambda t: t.update(forecast={"time": [], "truth": [], "predicted": [], "baselines": {}})
        ),
        "forecast: expected only for time series without privacy",
    ),
    "a model": (
        reading(lambda t: t.update(model=torch.zeros(9, dtype=torch.uint8))),
        "model: expected a safetensors file with a header",
    ),
    "a model that is text": (
        reading(lambda t: t.update(model="x")),
        "model: expected Tensor",
    ),
}


def test_hostile_evaluations_are_dropped_and_counted(tmp_path: Path) -> None:
    """Send one kind in each round, the last one with all that a report shows."""
    count = len(READINGS)
    federation = Federation(tmp_path)
    # Each evaluation takes place once.
    run_config = small(
        models="linear", rounds=count, evaluation__every=1, output__best_models=False
    )
    run = federation.serve(
        run_config, {"site_3": by_turn("read", [change for change, _ in READINGS.values()])}
    )
    assert run.summary["rounds_completed"] == count
    for (name, (_, reason)), record in zip(READINGS.items(), run.metrics, strict=True):
        assert set(record["clients"]) == {"site_1", "site_2"}, name
        assert list(record["absent"]) == ["site_3"] and reason in record["absent"]["site_3"], (
            name,
            record["absent"],
        )
    assert not (run.path / "models" / "site_3.safetensors").exists()
    json.loads(
        (run.path / "summary.json").read_text(),
        parse_constant=lambda name: pytest.fail(f"found {name}"),
    )


FORECAST: dict[str, Any] = {
    "time": [1e9, 2e9],
    "truth": [[1.0, 2.0]],
    "predicted": [[-1.5, 1e6]],
    "baselines": {"persistence": [[0.0, 0.0]]},
}


@each_case(
    ("changes", "expected"),
    [
        ({"time": [1e9, 1.7e308]}, "got 1.7e+308"),
        ({"time": [-1e30, 1e9]}, "got -1e+30"),
        ({"truth": [[1.0, 1.7e308]]}, "got 1.7e+308"),
        ({"predicted": [[1.0, -1.7e308]]}, "got -1.7e+308"),
        ({"baselines": {"persistence": [[1.0, 2**1000]]}}, "must be <= 1000000000000000000, got 1"),
        ({"truth": [[1.0]]}, "truth.0: expected at least 2 entries"),
    ],
)
def test_forecast_is_bounded(changes: dict[str, Any], expected: str) -> None:
    federation = dated_federation()

    assert validation._read_forecast(FORECAST, federation) == FORECAST
    with pytest.raises(RequestRefusedError, match=re.escape(expected)):
        validation._read_forecast({**FORECAST, **changes}, federation)
    with pytest.raises(RequestRefusedError, match="expected only for time series without privacy"):
        validation._read_forecast(FORECAST, dated_federation(dated=False))


def dated_federation(dated: bool = True) -> Any:
    """Make a federation whose common test set is a regression with or without times."""
    examples = Examples(
        torch.zeros(4, 2), torch.zeros(4, 1), time=torch.arange(4) if dated else None
    )
    data = SimpleNamespace(public_sets={"common_test": RowSelection(examples, torch.arange(4))})
    return SimpleNamespace(task=Task("regression", 1), data=data, privacy=None)


def test_server_finishes_run_if_plots_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "plot_client_scores", lambda *content: math.log10(0))
    run_config = small(models="linear", rounds=1, output__plots=True, output__report=True)

    run = Federation(tmp_path).serve(run_config)

    assert run.summary["rounds_completed"] == 1 and (run.path / "details.json").exists()
    assert (run.path / "report.html").exists() and not (run.path / "plots" / "clients.png").exists()
    assert "the plot 'clients' cannot be drawn: ValueError" in (run.path / "log.txt").read_text()


# Before the first round


@each_case(
    ("settings", "expected"),
    [
        (
            {"epochs": 1000},
            "settings.epochs: unknown key",
        ),
        ({"data": {"path": "/etc/passwd"}}, "settings.data: unknown key"),
        (
            {"model": "python:os:system"},
            "model: expected code that the server's configuration names, got python:os:system",
        ),
        ({"model": {"name": "python:os:system"}}, "settings: model.name: expected code that"),
        ({"model": 3}, "model"),
        ({"shares": ["everything"]}, "shares"),
    ],
)
def test_nodes_may_change_only_permitted_settings(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(RequestRefusedError, match=expected):
        read_settings({"settings": settings}, ())
    assert read_settings({"settings": {"model": "python:os:system"}}, ("python:os:system",))
    assert read_settings({"settings": {"shares": ["predictions"]}}, ()) == {
        "shares": ["predictions"]
    }


def test_what_nodes_say_is_read() -> None:
    large = {"settings": {"preprocess": {"resize": 2000}}}
    rows = {"train": 9, "validation": 2, "test": 3}

    told = {"rows": rows, "hash": "a" * 64, "labels": None, "mean": None, "std": None}
    assert read_data_info(told, 3).counts == rows
    own_view = {**told, "mean": 0.5, "std": 1.0}
    assert read_data_info(own_view, 3, Preprocess()).counts == rows
    assert read_settings(large, (), largest=2000) == large["settings"]
    for state in ("", "a" * 64):
        assert read(ReadyHead, {"state": state, "shared_key": ""}, "ready").state == state


@pytest.mark.parametrize(
    ("ask", "change", "expected"),
    [
        (
            "terms",
            reading(lambda t: t["rows"].update(train=-5)),
            "site_3: data report: ",
        ),
        ("terms", lambda e: Envelope(e.head, b"junk"), "site_3: 'told':"),
        (
            "hello",
            reading(lambda t: t.update(settings={"epochs": 99})),
            "client 'site_3': report of the site: settings.epochs: unknown key",
        ),
        (
            "hello",
            reading(lambda t: t.update(settings={"preprocess": {"resize": 30_000}})),
            "client 'site_3': settings: preprocess.resize: must be <= 1024, got 30000",
        ),
        (
            "hello",
            reading(lambda t: t.update(settings={"preprocess": {"columns": ["a\x1b[2J\u202e"]}})),
            "unknown name 'a\\x1b[2J\\u202e'",
        ),
        (
            "hello",
            lambda e: Envelope({**e.head, "client": "\x1b[2J" * 99}, e.body),
            "no node connected within 300 s for site_3",
        ),
        (
            "hello",
            lambda e: Envelope({**e.head, "torch": "x" * 10_000}, e.body),
            "no node connected within 300 s for site_3",
        ),
        (
            "join",
            lambda e: Envelope({"ask": ["ready"]}, b""),
            "site_3: the node refused the run: ",
        ),  # type: ignore[dict-item]
    ],
)
def test_junk_before_first_round_names_its_sender(
    ask: str, change: Change, expected: str, tmp_path: Path, clock: Clock
) -> None:
    def always(handle: Handle) -> Handle:
        return lambda e: change(handle(e)) if e.head["ask"] == ask else handle(e)

    with pytest.raises((RunFailedError, UserError)) as caught:
        Federation(tmp_path).serve(
            small(models="linear"), {"site_3": always}, log=clock.after(3, [])
        )
    assert str(caught.value).isprintable() and "site_3" in str(caught.value)
    assert expected in str(caught.value) and len(str(caught.value)) < 600


def test_node_that_claims_to_have_joined_is_asked_for_its_report(tmp_path: Path) -> None:
    def claiming(handle: Handle) -> Handle:
        def handles(envelope: Envelope) -> Envelope:
            answer = handle(envelope)
            if envelope.head["ask"] != "hello":
                return answer
            return Envelope({**answer.head, "session": envelope.head["session"]}, answer.body)

        return handles

    run = Federation(tmp_path).serve(small(models="linear", rounds=1), {"site_3": claiming})

    assert not run.metrics[0]["failed"]


def evaluate_client(rounds: Any) -> Any:
    """Evaluate a client's model, with all details."""
    body = broadcasts(rounds, ["site_1"], for_evaluation=True)["site_1"]
    return rounds.executor.evaluate(["site_1"], lambda client: body, 1, True)


# A model's metadata


@pytest.fixture(scope="module")
def model_evaluation() -> Any:
    """Yield a site's reading at the end of a run, the federation and the method."""
    prepared = prepare(small(models="linear", rounds=1))
    rounds = prepared.make_trainer()
    rounds.run_round()
    ((_, tree),) = evaluate_client(rounds)
    yield tree, rounds.federation, rounds.algorithm
    rounds.executor.close()


def with_changed_header(evaluation: Any, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Return the reading with the metadata of its model changed."""
    length = int.from_bytes(evaluation.model[:8], "little")
    header = json.loads(evaluation.model[8 : 8 + length])
    about = json.loads(header["__metadata__"]["hetero_fl"])
    change(about)
    header["__metadata__"]["hetero_fl"] = json.dumps(about)
    changed = json.dumps(header).encode()
    changed += b" " * (-len(changed) % 8)
    model = len(changed).to_bytes(8, "little") + changed + evaluation.model[8 + length :]
    return evaluation_tree(replace(evaluation, model=model))


METADATA = "model: the metadata differ from those in the configuration"


@each_case(
    ("change", "expected"),
    [
        (lambda a: a.update(columns=["python:os:system"]), METADATA),
        (lambda a: a.update(categories=[["python:os:system", ["a"]]]), METADATA),
        (lambda a: a.update(zzz="python:os:system"), METADATA),
        (lambda a: a.update(columns=["x"] * 1000), METADATA),
        (
            lambda a: a["architecture"].update(zzz="python:os:system"),
            METADATA,
        ),
        (
            lambda a: a["architecture"].update(name="python:os:system"),
            METADATA,
        ),
        (lambda a: a.update(architecture=3), METADATA),
        (
            lambda a: a["task"].update(unit="\x1b[2J"),
            METADATA,
        ),
        (lambda a: a["task"].update(zzz=1), METADATA),
        (
            lambda a: a["preprocess"].update({"python:os:system": 1}),
            METADATA,
        ),
        (lambda a: a["preprocess"].update(zzz=1), METADATA),
        (
            lambda a: a["preprocess"].update(resize=10**6),
            METADATA,
        ),
        (
            lambda a: a["preprocess"].update(resize="x"),
            METADATA,
        ),
        (
            lambda a: a["preprocess"].update(resize=-1),
            METADATA,
        ),
        (
            lambda a: a["preprocess"].update(mean="a", std="b"),
            METADATA,
        ),
        (
            lambda a: a["preprocess"].update(mean=math.nan),
            METADATA,
        ),
        (
            lambda a: a["preprocess"].update(spans=[[0, 10**9]]),
            METADATA,
        ),
        (
            lambda a: a["preprocess"].update(blocks=[[1, 2, 3]]),
            METADATA,
        ),
        (lambda a: a.update(preprocess=[]), METADATA),
        (
            lambda a: a.update(log_prior=["a"] * a["task"]["outputs"]),
            "log_prior.0: expected a number",
        ),
        (
            lambda a: a.update(log_prior=[math.nan] * a["task"]["outputs"]),
            "expected a finite number",
        ),
        (lambda a: a.update(log_prior=[1.0] * 3), "log_prior: expected at least 10 entries"),
        (lambda a: a.update(log_prior="abcdefghij"), "log_prior: expected a list"),
        (lambda a: a.pop("log_prior"), "log_prior: missing"),
    ],
)
def test_unexpected_metadata_is_refused(
    change: Callable[[dict[str, Any]], Any], expected: str, model_evaluation: Any
) -> None:
    tree, federation, method = model_evaluation

    with pytest.raises(RequestRefusedError, match=re.escape(expected)):
        read_evaluation(with_changed_header(tree, change), "site_1", federation, method)


# Honest ones


@pytest.mark.parametrize(
    "method",
    ["hybrid", "fml", "fedkd", "heterofl", "fedmrl", "fedgen", "lg_fedavg", "ditto", "fedgkt"],
)
def test_valid_evaluations_of_every_task_are_accepted(method: str, tmp_path: Path) -> None:
    """Evaluate with all details and the model itself, as a site does."""
    prepared = prepare(small(method, "cnn_gn_small", rounds=1))
    if method not in register_algorithm:
        pytest.skip(f"{method} is none of this release's")
    rounds = prepared.make_trainer()
    rounds.run_round()
    found = evaluate_client(rounds)
    (tree,) = [r for _, r in found]
    received = read_evaluation(evaluation_tree(tree), "site_1", rounds.federation, rounds.algorithm)
    assert received == tree and received.model and received.confusion
    rounds.executor.close()
