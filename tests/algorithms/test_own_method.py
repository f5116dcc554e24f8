"""The user-defined method of the documentation: at most thirty lines, no other change."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from hetero_fl.algorithms import Algorithm, local_fit, register_algorithm, upload_model
from hetero_fl.algorithms.base import Items, SharedPart
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import Batch, Context, ModelViews, Supervised
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import ItemSpec, Payload
from hetero_fl.core.plan import Plan
from hetero_fl.experiment import run
from hetero_fl.utils.errors import UserError
from tests.support import documented_method
from tests.support.calls import record_results
from tests.support.federations import MIXED, config, rounds_of, same_bits


def test_documented_method_has_at_most_thirty_lines() -> None:
    lines = [line for line in inspect.getsource(documented_method).splitlines() if line.strip()]
    assert len(lines) <= 30


def test_documented_method_matches_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how_to" / "own_method.md").read_text(
        encoding="utf-8"
    )
    code = inspect.getsource(documented_method).split('"""', 2)[2].strip()
    assert code in page


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

    shared = SharedPart(slot="copy")
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
