"""The user-defined method of the documentation: at most thirty lines, no other change."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hetero_fl.algorithms import (
    FML,
    Algorithm,
    FedAvg,
    FedAvgM,
    FedBN,
    FedProx,
    FedRep,
    HeteroFL,
    Hybrid,
    Items,
    local_fit,
    register_algorithm,
    upload_model,
)
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import Batch, Context, ModelViews, Supervised
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import ItemSpec, Payload
from hetero_fl.core.plan import Plan
from hetero_fl.experiment import run
from hetero_fl.utils.errors import UserError
from tests.support import documented_method
from tests.support.calls import record_results
from tests.support.cases import each_case
from tests.support.federations import MIXED, config, rounds_of, same_bits

PAGE = Path(__file__).parents[2] / "docs" / "how_to" / "own_method.md"


def documented_file(name: str) -> str:
    """Return the code of a file on the page."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return next(block for block in blocks if block.startswith(f"# {name}.py\n"))


@each_case(("name", "limit"), {"median": 30, "rules": 25, "companion": 45}.items())
def test_documented_file_is_short(name: str, limit: int) -> None:
    lines = [line for line in documented_file(name).splitlines()[1:] if line.strip()]

    assert len(lines) <= limit


def test_documented_scalar_takes_five_lines() -> None:
    _, _, method = documented_file("norms").partition("class ")

    assert len(method.splitlines()) <= 5


def test_documented_method_matches_the_docs() -> None:
    code = inspect.getsource(documented_method).split('"""', 2)[2].strip()
    assert code in documented_file("median")


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Write a file of the page, and return the reference to a class in it."""

    def write(name: str, class_name: str) -> str:
        module = f"documented_{name}"
        (tmp_path / f"{module}.py").write_text(documented_file(name), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        return f"python:{module}:{class_name}"

    return write


def test_documented_common_model_is_averaged_over_all_architectures(
    documented: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = rounds_of(config(documented("companion", "Companion"), MIXED), num_rounds=0)
    seen = record_results(monkeypatch, rounds.link, "decode_upload")

    record = rounds.run_round()

    weights = torch.tensor([float(payload.item("common").weight) for payload in seen])
    assert weights.unique().numel() > 1
    for name, tensor in rounds.server.models["common"].items():
        sent = torch.stack([payload["common"][name] for payload in seen])
        mean = (sent * weights.view(-1, *[1] * (sent.ndim - 1))).sum(0) / weights.sum()
        assert torch.allclose(tensor, mean, atol=1e-6)
    assert all(set(payload) == {"common"} for payload in seen)
    for scores in record["logged"].values():
        assert set(scores) == {"model balanced_accuracy", "common balanced_accuracy"}
    received = rounds.link.broadcast(rounds.federation.client_infos["site_2"])
    assert same_bits(received["common"], rounds.server.models["common"])


def test_documented_scalar_and_rule(documented: Callable[[str, str], str]) -> None:
    rule = {"rule": documented("rules", "MedianOfMeans")}
    rounds = rounds_of(
        config(documented("norms", "HeadNorm"), "mlp", aggregation=rule), num_rounds=0
    )

    record = rounds.run_round()

    assert all(logged["head norm"] > 0 for logged in record["logged"].values())


class Regularized(FedAvg):
    beta: float = 0.1

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        items: Items = yield from super().train(client, received)
        return items


@each_case(
    ("bases", "message"),
    [
        ((Hybrid, FML), "Both: the setting 'beta' of Hybrid replaces that of FML"),
        ((Regularized, FML), "Both: the setting 'beta' of Regularized replaces that of FML"),
        ((FedRep, FedProx), "Both: the hook 'local_training' of FedRep replaces that of FedProx"),
        ((FedAvg, FML), "Both: the hook 'train' of FedAvg replaces that of FML"),
        ((FedBN, HeteroFL), "Both: the hook 'shared' of FedBN replaces that of HeteroFL"),
    ],
)
def test_bases_that_replace_each_other_are_refused(bases: Any, message: str) -> None:
    with pytest.raises(TypeError) as error:
        type("Both", bases, {"__module__": __name__})

    assert str(error.value) == f"{message}; define it in Both"


@each_case("bases", [(Regularized, FedProx), (FedBN, FedProx), (FedAvgM, FedProx)])
def test_bases_with_separate_or_cooperative_hooks_are_accepted(bases: Any) -> None:
    assert type("Both", bases, {"__module__": __name__})().title


@pytest.mark.slow
def test_documented_method_runs_by_name_and_by_reference(tmp_path: Path) -> None:
    assert "median_teacher" in register_algorithm
    by_name = run(config("median_teacher", MIXED), out=tmp_path / "a")
    by_reference = run(
        config("python:tests.support.documented_method:MedianTeacher", MIXED), out=tmp_path / "b"
    )
    assert by_name.summary["global"] == by_reference.summary["global"]
    assert by_name.summary["communication"]["up_bytes"] > 0


def test_documented_method_sends_median_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = rounds_of(config("median_teacher", MIXED, rounds=1), num_rounds=0)
    seen = record_results(monkeypatch, rounds.link, "decode_upload")
    rounds.run_round()
    expected = np.median([p["logits"].numpy() for p in seen], axis=0)
    assert np.allclose(rounds.server.state["teacher"], expected, atol=1e-6)


def test_invalid_setting_is_refused() -> None:
    with pytest.raises(UserError, match=r"algorithm\.epochs"):
        rounds_of(
            config("median_teacher", MIXED, algorithm={"name": "median_teacher", "epochs": 0})
        )


class SharedCopy(Algorithm):
    """FedAvg whose clients exchange a copy of their own model, which is in another slot."""

    shared = {"copy": None}
    downloads = {"copy": ItemSpec("params")}
    uploads = {"copy": ItemSpec("params")}

    def models(self, client: ClientInfo) -> dict[str, ModelSpec]:
        return {"model": client.arch, "copy": client.arch}

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        client.load("model", client.models["copy"])
        yield local_fit(client)
        client.load("copy", client.models["model"])
        return upload_model(self, client)


def test_default_hooks_exchange_the_model_of_another_slot() -> None:
    models = ["cnn_bn_small", "mlp"]
    own = rounds_of(config(f"python:{__name__}:SharedCopy", models, clients=4))
    fedavg = rounds_of(config("fedavg", models, clients=4))

    broadcast = own.link.broadcast(own.federation.client_infos["site_1"])
    assert list(broadcast.items_by_name) == ["copy"]
    assert own.server.models.keys() == fedavg.server.models.keys()
    for group, model in fedavg.server.models.items():
        assert same_bits(own.server.models[group], model)


@dataclass(frozen=True)
class Focal(Supervised):
    """A user-defined local objective: easy examples count less (Lin et al. 2017, focal loss)."""

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> torch.Tensor:
        plain = super().loss(nets, batch, context)
        return plain * (1 - torch.exp(-plain.detach())) ** 2


def test_custom_objective_matches_reference() -> None:
    own = {"objective": f"python:{__name__}:Focal", "optimizer": {"name": "sgd", "lr": 0.05}}
    changed = rounds_of(config("fedavg", clients__defaults=own, rounds=1))
    plain = rounds_of(config("fedavg", clients__defaults={"optimizer": own["optimizer"]}, rounds=1))
    (group,) = plain.server.models
    assert not same_bits(plain.server.models[group], changed.server.models[group])
    for wrong in (
        "python:tests.support.federations:config",
        "python:tests.support.federations:Nothing",
        "focal",
    ):
        with pytest.raises(UserError, match="objective"):
            rounds_of(config("fedavg", clients__defaults={"objective": wrong}), num_rounds=0)
