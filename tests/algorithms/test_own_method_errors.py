"""Mistakes in user-defined methods: one line names the place, the mistake and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hetero_fl.algorithms import FedAvg, average_models, local_fit, upload_model
from hetero_fl.cli import main
from hetero_fl.core.objectives import Batch, ModelViews, Objective, Supervised
from hetero_fl.core.payload import Item, ItemSpec
from hetero_fl.core.plan import Fit, Predict, Rows
from hetero_fl.experiment import prepare, run
from hetero_fl.federation.dry_run import check_user_method
from hetero_fl.federation.synchronous import SynchronousTrainer
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.support.cases import each_case
from tests.support.federations import config, rounds_of, same_bits


def own(**hooks: Callable[..., Any]) -> SynchronousTrainer:
    """Return a federation with a FedAvg that overrides some hooks."""
    rounds = rounds_of(config("fedavg", "mlp"), num_rounds=0)
    method = type("Mine", (FedAvg,), hooks)()
    rounds.algorithm = rounds.executor.runtime.algorithm = rounds.expectations.algorithm = method
    rounds.expectations.is_user_method = True
    return rounds


def dry_run(**hooks: Callable[..., Any]) -> None:
    """Run the hooks without computing, as before every run of a user-defined method."""
    prepared = prepare(config("fedavg", "mlp"))
    check_user_method(type("Mine", (FedAvg,), hooks)(), prepared.federation)


def agregate(self: Any, server: Any, uploads: Any) -> Any:
    yield from ()


def deployed(self: Any) -> bool:
    return True


def weights_of(self: Any, client: Any) -> float:
    return 1.0


def fit_forgotten(self: Any, client: Any, got: Any) -> Any:
    yield from self.deploy(client, got)
    local_fit(client)
    return upload_model(self, client)


def fit_spelt_out(self: Any, client: Any, got: Any) -> Any:
    yield from self.deploy(client, got)
    replace(local_fit(client), epochs=1)
    return upload_model(self, client)


def fit_kept(self: Any, client: Any, got: Any) -> Any:
    yield from self.deploy(client, got)
    steps = [local_fit(client), Predict("model")]
    yield steps[1]
    return upload_model(self, client)


def no_yield_at_all(self: Any, client: Any, got: Any) -> Any:
    local_fit(client)
    return upload_model(self, client)


def sub_plan_forgotten(self: Any, client: Any, got: Any) -> Any:
    self.deploy(client, got)
    yield local_fit(client)
    return upload_model(self, client)


def super_forgotten(self: Any, client: Any, got: Any) -> Any:
    yield local_fit(client)
    FedAvg.train(self, client, got)
    return upload_model(self, client)


def test_unused_plan_is_reported() -> None:
    for train, below, name in (
        (sub_plan_forgotten, 1, "self.deploy"),
        (super_forgotten, 2, "FedAvg.train"),
    ):
        line = train.__code__.co_firstlineno + below

        with pytest.raises(UserError) as error:
            dry_run(train=train)

        assert str(error.value) == (
            f"{train.__name__} ({__file__}, line {line}): the plan {name}(…) is created "
            "but never run; write `yield from` before it"
        )


def create_fit(server: Any) -> None:
    Fit({next(iter(server.models)): None}, None, Rows("proxy"))  # type: ignore[arg-type]


def aggregate_with_unused_fit(self: Any, server: Any, uploads: Any) -> Any:
    yield from FedAvg.aggregate(self, server, uploads)
    create_fit(server)


def test_steps_may_be_created_before_yielding() -> None:
    elsewhere = Predict("model", Rows("proxy"))

    def train(self: Any, client: Any, got: Any) -> Any:
        later, plan = Predict("model"), self.deploy(client, got)
        yield from plan
        first = local_fit(client)
        yield replace(first, epochs=1)
        yield [later, elsewhere]
        return upload_model(self, client)

    dry_run(train=train)
    assert own(train=train).run_round()["failed"] == {}
    assert elsewhere == Predict("model", Rows("proxy"))


NON_STEPS: list[tuple[Any, str]] = [
    (
        lambda self, c, got: self.deploy(c, got),
        r"yields the plan deploy\(…\); write `yield from`",
    ),
    (
        lambda self, c, got: {"model": None},
        r"expected a step \(Fit, .*\) or a list of steps, got dict",
    ),
    (
        lambda self, c, got: [local_fit(c), None],
        r"expected a step \(Fit, .*\) or a list of steps, got NoneType",
    ),
]


def test_yielding_a_non_step_is_reported(subtests: pytest.Subtests) -> None:
    for yielded, words in NON_STEPS:

        def train(self: Any, client: Any, got: Any, yielded: Any = yielded) -> Any:
            yield yielded(self, client, got)

        place = r"train \(.*test_own_method_errors\.py, line \d+\)"
        with (
            subtests.test(words=words),
            pytest.raises(UserError, match=f"{place}: {words}"),
        ):
            own(train=train).run_round()


def train_unknown_slot(self: Any, client: Any, got: Any) -> Any:
    yield local_fit(client, train={"modle": None})
    return upload_model(self, client)


def predict_unknown_slot(self: Any, client: Any, got: Any) -> Any:
    yield Predict("modle")
    return upload_model(self, client)


FIT = "a Fit is created but never yielded and has no effect; write `yield` before it$"
PLACE = rf"\({re.escape(__file__)}, line \d+\)"
SLOT = "site_1 has no model 'modle'; choose from 'model', or return it from `models`$"
HOOKS: list[tuple[dict[str, Any], str]] = [
    ({"agregate": agregate}, r"^agregate: unknown hook 'agregate'; did you mean 'aggregate'\?$"),
    ({"weights_of": weights_of}, r"unknown hook 'weights_of'; did you mean 'weight_of'\?$"),
    ({"train": fit_forgotten}, f"^Mine.train: {FIT}"),
    ({"train": fit_spelt_out}, f"^Mine.train: {FIT}"),
    ({"train": fit_kept}, f"^Mine.train: {FIT}"),
    ({"train": no_yield_at_all}, f"^Mine.train: {FIT}"),
    ({"aggregate": aggregate_with_unused_fit}, r"^Mine\.aggregate: a Fit is created but never yie"),
    ({"train": train_unknown_slot}, f"^train_unknown_slot {PLACE}: {SLOT}"),
    ({"train": predict_unknown_slot}, f"^predict_unknown_slot {PLACE}: {SLOT}"),
]


def test_mistaken_hook_is_refused_before_the_run(subtests: pytest.Subtests) -> None:
    for hooks, words in HOOKS:
        with subtests.test(words=words), pytest.raises(UserError, match=words):
            dry_run(**hooks)
    dry_run(deployed=deployed, _agregate=deployed)


def test_unshared_item_is_refused_before_the_run() -> None:
    def train(self: Any, client: Any, got: Any) -> Any:
        items = yield from FedAvg.train(self, client, got)
        return {**items, "counts": Item(client.counts, kind="counts")}

    uploads = {**FedAvg.uploads, "counts": ItemSpec("counts")}
    source = config("fedavg", "mlp")
    source["clients"]["overrides"] = [{"match": "site_2", "shares": ["parameters"]}]
    method = type("Mine", (FedAvg,), {"train": train, "uploads": uploads})()
    words = (
        r"^Mine\.train: 'counts' needs statistics, but site_2 shares parameters; check `may_share` "
        "before creating the item$"
    )

    with pytest.raises(UserError, match=words):
        check_user_method(method, prepare(source).federation)


def test_unshared_tensors_are_refused() -> None:
    def train(self: Any, client: Any, got: Any) -> Any:
        yield local_fit(client)
        return {"model": Item(dict(client.models["model"]), 1.0, "params")}

    source = config("fedavg", "mlp")
    source["clients"]["defaults"]["shares"] = ["backbone"]
    method = type("Mine", (FedAvg,), {"train": train})()

    with pytest.raises(
        UserError, match=r"'model' contains head\.weight, but site_1 shares backbone"
    ):
        check_user_method(method, prepare(source).federation)


class RefusesClients(FedAvg):
    def configure(self, clients: Any) -> Any:
        raise ValueError("not these clients")


class WrongModels(FedAvg):
    def models(self, client: Any) -> Any:
        return {"model": client.architecture_}


def test_exception_in_configure_or_models_is_located() -> None:
    for method, words in (
        (RefusesClients, "in configure: ValueError: not these clients"),
        (WrongModels, "in models: AttributeError: "),
    ):
        with pytest.raises(RunFailedError, match=rf"^{re.escape(__file__)}:\d+, {words}"):
            prepare(config(f"python:{__name__}:{method.__name__}", "mlp"))


def test_objective_error_lists_available_columns_and_models() -> None:
    batch = Batch(x=torch.zeros(1), y=torch.zeros(1))

    assert getattr(batch, "teacher", None) is None
    with pytest.raises(AttributeError, match="no column 'teacher', only 'x', 'y'; add it with"):
        batch.teacher  # noqa: B018
    with pytest.raises(KeyError, match="no model 'own', only none; name it in `train` or"):
        ModelViews()["own"]


def aggregate_without_yield(self: Any, server: Any, uploads: Any) -> None:
    average_models(server, uploads)


def test_hook_without_yield_may_return_directly() -> None:
    rounds = own(aggregate=aggregate_without_yield)
    before = {slot: dict(tensors) for slot, tensors in rounds.server.models.items()}

    rounds.run_round()

    assert any(not same_bits(before[slot], rounds.server.models[slot]) for slot in before)


def test_hook_without_yield_may_return_a_plan() -> None:
    def train(self: Any, client: Any, got: Any) -> Any:
        return FedAvg.train(self, client, got)

    assert own(train=train).run_round()["failed"] == {}


class PlainDeploy(FedAvg):
    def deploy(self, client: Any, received: Any) -> None:
        client.load("model", received["model"])


def source(method: type, **changes: Any) -> dict[str, Any]:
    """Return a configuration that runs a method of this file."""
    return config(f"python:{__name__}:{method.__name__}", "mlp", **changes)


class Undeclared(FedAvg):
    def train(self, client: Any, received: Any) -> Any:
        items = yield from super().train(client, received)
        return {"modle": items["model"]}


class WrongKind(FedAvg):
    uploads = {"model": ItemSpec("params"), "seen": ItemSpec("counts")}

    def train(self, client: Any, received: Any) -> Any:
        items = yield from super().train(client, received)
        return {**items, "seen": client.counts}


class Number(FedAvg):
    def train(self, client: Any, received: Any) -> Any:
        yield from super().train(client, received)
        return {"model": 0.5}


class NoReturn(FedAvg):
    def train(self, client: Any, received: Any) -> Any:
        yield from super().train(client, received)


class NoBroadcast(FedAvg):
    def broadcast(self, server: Any, recipient: Any) -> Any:
        super().broadcast(server, recipient)


class Forgotten(FedAvg):
    def train(self, client: Any, received: Any) -> Any:
        yield from self.deploy(client, received)
        local_fit(client)
        return upload_model(self, client)


WRONG_ITEMS: list[tuple[Any, str]] = [
    (
        Undeclared,
        "Undeclared.train: item 'modle' is not declared in `uploads`; did you mean 'model'?",
    ),
    (
        WrongKind,
        "WrongKind.train: item 'seen': expected kind 'counts' as declared, got 'rows'; "
        "return Item(values, weight, 'counts')",
    ),
    (Number, "Number.train: item 'model': expected a tensor or tensors by name, got float"),
    (NoReturn, "NoReturn.train: expected a dictionary of items as return value, got NoneType"),
    (
        NoBroadcast,
        "NoBroadcast.broadcast: expected a dictionary of items as return value, got NoneType",
    ),
    (Forgotten, "Forgotten.train: a Fit is created but never yielded"),
    (PlainDeploy, "PlainDeploy.deploy: expected a generator, got NoneType"),
]


@each_case(("method", "words"), WRONG_ITEMS)
def test_client_items_are_checked_before_training(method: Any, words: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        run(source(method), out=tmp_path / "run")
    assert words in str(error.value) and not (tmp_path / "run").exists()


class WrongShape(FedAvg):
    """A method whose item shape depends on private rows."""

    uploads = {"model": ItemSpec("params"), "seen": ItemSpec("counts")}

    def train(self, client: Any, received: Any) -> Any:
        items = yield from super().train(client, received)
        seen = client.counts[client.counts > 0]
        return {**items, "seen": Item(seen, kind="counts")}


def test_unexpected_item_shape_is_reported() -> None:
    with pytest.raises(
        RunFailedError,
        match=r"upload refused: item 'seen', values: expected shape \(0,\), got \(\d+,\)",
    ):
        rounds_of(source(WrongShape))


class Misspelt(FedAvg):
    def deploy(self, client: Any, received: Any) -> Any:
        client.load("model", received["modle"])
        yield from ()


class AsksForAnother(FedAvg):
    def aggregate(self, server: Any, uploads: Any) -> Any:
        yield from super().aggregate(server, uploads)
        server.state["teacher"] = uploads.mean("logits")


@dataclass(frozen=True)
class Clumsy(Supervised):
    def loss(self, nets: Any, batch: Any, context: Any) -> Any:
        return nets.model(batch.x).logits @ torch.zeros(3, 3)

    total_loss = Objective.total_loss


class ClumsyObjective(FedAvg):
    def train(self, client: Any, received: Any) -> Any:
        yield from self.deploy(client, received)
        yield local_fit(client, Clumsy(client.task.kind))
        return upload_model(self, client)


class StartFails(FedAvg):
    def setup(self, server: Any) -> None:
        server.state["x"] = 1 / 0


class OldAttribute(FedAvg):
    def weight_of(self, client: Any) -> float:
        return float(client.n)


class OldArgument(FedAvg):
    def train(self, client: Any, received: Any) -> Any:
        yield local_fit(client, given={"anchor": {}})
        return upload_model(self, client)


EXCEPTIONS: list[tuple[Any, str]] = [
    (
        OldAttribute,
        r"in weight_of: AttributeError: .*; Participant\.n is now Participant\.num_rows$",
    ),
    (OldArgument, r"in train: TypeError: .*; Fit\.given is now Fit\.context$"),
    (
        Misspelt,
        r"in deploy: MissingItemError: item 'modle' was not sent; received 'model'; "
        r"did you mean 'model'\?$",
    ),
    (
        AsksForAnother,
        r"in aggregate: MissingItemError: item 'logits' is not declared in `uploads`; "
        r"choose from model$",
    ),
    (ClumsyObjective, r"in loss: RuntimeError: .*mat1 and mat2 shapes .*$"),
    (StartFails, r"in setup: ZeroDivisionError: division by zero$"),
]


def test_exception_in_custom_method_is_located(subtests: pytest.Subtests) -> None:
    for method, words in EXCEPTIONS:
        expected = rf"^{re.escape(__file__)}:\d+, {words}"
        with subtests.test(method=method.__name__), pytest.raises(RunFailedError, match=expected):
            rounds_of(source(method))


def test_traceback_is_logged_and_exit_status_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(source(AsksForAnother)))
    assert (
        main(
            ["--config", str(path), "--out", str(tmp_path / "run"), "--allow-code"], command="train"
        )
        == 1
    )
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith("failed: ")
    assert "in aggregate: MissingItemError" in last_line
    log = (tmp_path / "run" / "log.txt").read_text()
    assert (
        last_line in log
        and "Traceback (most recent call last)" in log
        and 'uploads.mean("logits")' in log
    )


def test_internal_error_is_not_translated() -> None:
    rounds = rounds_of(config("fedavg", "mlp"), num_rounds=0)
    rounds.store = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        rounds.run_round()
