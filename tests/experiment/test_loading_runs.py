"""Runs of objects that a program opens again: in the same program, and after a restart."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

import hetero_fl as hfl
from hetero_fl.utils.errors import UserError
from tests.support.mistakes import refusal
from tests.support.python_federations import QUIET, Digits, images

ROWS = np.zeros((3, 8, 8), np.uint8)


class Net(nn.Module):
    """A network whose classifier is not its last submodule."""

    def __init__(self, slope: float = 0.1, width: int = 16) -> None:
        super().__init__()
        self.cls = nn.Linear(width, 3)
        self.body = nn.Linear(64, width)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.leaky_relu(self.body(x.flatten(1)), self.slope)
        return self.cls(hidden)  # type: ignore[no-any-return]


def federation(model: Any, **settings: Any) -> hfl.Federation:
    clients = [
        hfl.Client("inst", model, images(60, 1), **settings),
        hfl.Client("clinic", "mlp", images(60, 2)),
    ]
    return hfl.Federation(clients, test=images(30, 3), proxy=images(30, 4)[0])


def trained_before_a_restart(path: Path, model: Any, **settings: Any) -> Tensor:
    """Train a run whose objects the program does not keep, and return predictions."""
    trained = federation(model, **settings)
    run = trained.train(hfl.FedMD(), rounds=1, out=path, overrides=QUIET)
    expected = run.predict("inst", ROWS)
    del trained, run
    gc.collect()
    return expected


@pytest.mark.parametrize("name", ["evaluate", "export", "audit", "join"])
def test_functions_keep_the_temporary_directory_of_a_run(name: str, tmp_path: Path) -> None:
    kept = federation(Net(), head="cls")

    def train() -> hfl.Run:
        return kept.train(hfl.FedMD(), rounds=1, overrides=QUIET)

    # Nothing else refers to the run, so its directory is deleted if the function drops the run.
    calls: dict[str, Any] = {
        "evaluate": lambda: hfl.evaluate(train(), images(30, 5), allow_code=True),
        "export": lambda: hfl.export(train(), "inst", "safetensors", out=tmp_path, allow_code=True),
        "audit": lambda: hfl.audit(train(), attack="membership", shadows=0, allow_code=True),
        "join": lambda: hfl.join(
            train(), images(40, 5), out=tmp_path, patients=[10], seeds=[0], allow_code=True
        ),
    }
    assert calls[name]()


def test_permission_of_a_call_is_not_kept_by_the_run(tmp_path: Path) -> None:
    path = federation(Digits).train(hfl.FedMD(), rounds=1, out=tmp_path / "run").path
    run = hfl.Run.load(path)

    assert hfl.evaluate(run, images(30, 5), "inst", allow_code=True)["inst"]
    with pytest.raises(UserError, match="names code"):
        hfl.audit(run, attack="membership", shadows=0)


@pytest.mark.parametrize("model", [Net(), Net], ids=["module", "class"])
def test_module_is_passed_again_after_a_restart(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "run"
    expected = trained_before_a_restart(path, Net(), head="cls")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = hfl.Run.load(path, models={"inst": model})

    assert run.predict("inst", ROWS).equals(expected)
    assert isinstance(run.model("inst"), Net)
    assert hfl.evaluate(run, images(30, 5))["inst"]["accuracy"] is not None
    assert hfl.export(run, "inst", "safetensors")["inst"].model.is_file()


def test_missing_module_is_named_with_the_call_that_passes_it(tmp_path: Path) -> None:
    path = tmp_path / "run"
    trained_before_a_restart(path, Net(), head="cls")
    run = hfl.Run.load(path)
    advice = f"Run.load({str(path)!r}, models={{'inst': Net()}})"

    uses: list[Any] = [
        lambda: run.model("inst"),
        lambda: run.predict("inst", ROWS),
        lambda: hfl.evaluate(run, images(30, 5)),
        lambda: hfl.export(run, "inst"),
        lambda: hfl.audit(run, attack="membership", shadows=0),
        lambda: hfl.join(run, images(40, 5), out=tmp_path / "join"),
    ]
    for use in uses:
        with pytest.raises(UserError) as caught:
            use()
        assert str(caught.value).endswith(advice)
    assert run.models["inst"].tensors["head.weight"].shape == (3, 16)
    assert run.predict("clinic", ROWS).shape == (3, 3)


def test_importable_class_is_permitted_or_passed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    expected = trained_before_a_restart(path, Digits)

    with pytest.raises(UserError, match="Digits") as caught:
        hfl.Run.load(path).model("inst")

    assert "pass allow_code=True to run it" in str(caught.value)
    permissions: list[dict[str, Any]] = [
        {"allow_code": True},
        {"models": {"inst": Digits}},
        {"models": {"inst": Digits(3)}},
    ]
    for permission in permissions:
        assert hfl.Run.load(path, **permission).predict("inst", ROWS).equals(expected)


UNSUITABLE: list[tuple[Any, str]] = [
    ({"inst": nn.Sequential(nn.Flatten(), nn.Linear(64, 3))}, "'inst': does not fit"),
    ({"inst": Net(width=7)}, "'inst': does not fit the saved model: 'backbone"),
    (Net(), "models: expected modules keyed by client id, got Net"),
    ({"inst": 3}, "'inst': does not fit the saved model: model: expected a torch.nn.Module"),
    ({"clinic": Net()}, "'clinic': the saved model is mlp, which needs no module"),
    ({"instt": Net()}, "no model of 'instt'; did you mean 'inst'?"),
]


def test_unsuitable_module_is_refused_or_used_with_a_warning(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    trained_before_a_restart(tmp_path / "run", Net(), head="cls")

    for models, message in UNSUITABLE:
        with subtests.test(message=message):
            refused = refusal(hfl.Run.load, tmp_path / "run", models=models)
            assert refused.startswith("models: ") and message in refused
    with pytest.warns(UserWarning, match="'inst': Net differs from the module of the run"):
        run = hfl.Run.load(tmp_path / "run", models={"inst": Net(slope=0.5)})
    assert run.predict("inst", ROWS).shape == (3, 3)


def test_transform_is_found_when_the_federation_is_created_again(tmp_path: Path) -> None:
    def double(x: Tensor) -> Tensor:
        return 2 * x

    settings: Any = {"preprocess": hfl.Preprocess(transform=double)}
    path = tmp_path / "run"
    expected = trained_before_a_restart(path, "mlp", **settings)
    run = hfl.Run.load(path)
    del settings, double
    gc.collect()

    with pytest.raises(UserError, match=r"transform: .*; create the federation from objects again"):
        run.predict("inst", ROWS)

    def double(x: Tensor) -> Tensor:
        return 2 * x

    again = federation("mlp", preprocess=hfl.Preprocess(transform=double))
    assert run.predict("inst", ROWS).equals(expected) and again
