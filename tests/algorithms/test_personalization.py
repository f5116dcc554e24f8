"""FedBN, FedRep, FedBABU and Ditto: rounds, shared and personal tensors, limit cases."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.algorithms.personalization import PERSONAL
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import Participant, floating_tensors
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Rows
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.federation.synchronous import SynchronousTrainer
from model_zoo import SplitModel
from tests.references.local_training import clients, largest_difference, mean, module, train
from tests.support.federations import MIXED, config, deployed, rounds_of, same_bits

BN, MLP, GN = MIXED
Sent = dict[str, list[tuple[float, dict[str, Tensor]]]]


def received(
    rounds: SynchronousTrainer, client: Participant, travels: Any = lambda name: True
) -> torch.nn.Module:
    """Return the client's model in training mode after loading the server's tensors."""
    arch = client.arch["model"]
    sent = {
        n: t for n, t in floating_tensors(rounds.server.models[arch.spec_id]).items() if travels(n)
    }
    return module(arch, {**client.models["model"], **sent})


def entropy(model: torch.nn.Module) -> Any:
    return lambda x, y: F.cross_entropy(model(x).logits, y)


def compare(rounds: SynchronousTrainer, sent: Sent) -> None:
    """Compare the server's models with the means of the uploads."""
    for group, members in sent.items():
        assert largest_difference(rounds.server.models[group], mean(members)) < 1e-9


def is_norm(client: Participant) -> set[str]:
    """Return names of BatchNorm tensors, recognized by the running statistics next to them."""
    names = client.models["model"]
    return {n for n in names if n.rpartition(".")[0] + ".running_mean" in names}


@pytest.mark.usefixtures("float64")
def test_fedbn_round_matches_reference() -> None:
    rounds = rounds_of(config("fedbn", [BN, MLP], 4), num_rounds=2)
    sent: Sent = {}
    models = {}
    for client_id, client in clients(rounds).items():
        norm = is_norm(client)
        assert len(norm) == (15 if client.arch["model"].name == BN else 0)
        model = models[client_id] = received(rounds, client, lambda n, norm=norm: n not in norm)
        train(client, list(model.parameters()), entropy(model))
        state = {n: t for n, t in floating_tensors(model.state_dict()).items() if n not in norm}
        sent.setdefault(client.arch["model"].spec_id, []).append((client.num_rows, state))
    rounds.run_round()
    compare(rounds, sent)
    for client_id, client in clients(rounds).items():
        norm = is_norm(client)
        kept, state = (
            rounds.store.get(client_id).models.get("model", {}),
            models[client_id].state_dict(),
        )
        assert set(kept) == norm and all(
            torch.allclose(kept[n], state[n], rtol=0, atol=1e-9) for n in norm
        )


def test_fedbn_can_keep_only_statistics() -> None:
    """Check that scales and shifts are shared and running statistics stay local."""
    rounds = rounds_of(config("fedbn", BN, algorithm={"name": "fedbn", "keep": "statistics"}))
    fedavg = rounds_of(config("fedavg", BN))
    (group,) = rounds.server.models
    for client_id, client in clients(rounds).items():
        norm, learnt = is_norm(client), client.arch["model"].parameter_names
        kept = rounds.store.get(client_id).models["model"]
        assert set(kept) == norm - learnt
        assert same_bits(
            {n: rounds.server.models[group][n] for n in learnt},
            {n: fedavg.server.models[group][n] for n in learnt},
        )
    assert rounds.evaluate().server is None


def test_fedbn_without_batch_norm_equals_fedavg() -> None:
    for model, equal in ((GN, True), (BN, False)):
        fedavg, fedbn = rounds_of(config("fedavg", model)), rounds_of(config("fedbn", model))
        (group,) = fedavg.server.models
        assert (
            same_bits(
                floating_tensors(fedavg.server.models[group]),
                floating_tensors(fedbn.server.models[group]),
            )
            is equal
        )
        # A model without BatchNorm statistics is not evaluated.
        assert (fedbn.evaluate().server is not None) is equal


def test_batch_norm_is_detected_by_type() -> None:
    assert ModelSpec.from_config(
        "python:tests.algorithms.test_personalization:Odd", 10, (1, 8, 8)
    ).batch_norm_names == {
        f"backbone.steady.{n}"
        for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


class Odd(SplitModel):
    """A model with an oddly named BatchNorm and with another module named like one."""

    def __init__(self, num_classes: int) -> None:
        parts = OrderedDict(
            flat=torch.nn.Flatten(), bn=torch.nn.Linear(64, 8), steady=torch.nn.BatchNorm1d(8)
        )
        super().__init__(torch.nn.Sequential(parts), torch.nn.Linear(8, num_classes), 8)


@pytest.mark.usefixtures("float64")
def test_fedrep_round_matches_reference() -> None:
    algorithm = {"name": "fedrep", "head_epochs": 3, "body_epochs": 2}
    rounds = rounds_of(config("fedrep", [BN, MLP], 4, algorithm=algorithm), num_rounds=1)
    sent: Sent = {}
    models = {}
    for client_id, client in clients(rounds).items():
        model = models[client_id] = received(rounds, client, lambda n: n.startswith("backbone."))
        for part, label, epochs in (("head.", "head", 3), ("backbone.", "train", 2)):
            for n, p in model.named_parameters():
                p.requires_grad_(n.startswith(part))
            train(
                client,
                [p for p in model.parameters() if p.requires_grad],
                entropy(model),
                label,
                epochs,
            )
        state = {
            n: t
            for n, t in floating_tensors(model.state_dict()).items()
            if n.startswith("backbone.")
        }
        sent.setdefault(client.arch["model"].spec_id, []).append((client.num_rows, state))
    rounds.run_round()
    compare(rounds, sent)
    for client_id, model in models.items():
        heads = {n: t for n, t in model.state_dict().items() if n.startswith("head.")}
        assert largest_difference(rounds.store.get(client_id).models["model"], heads) < 1e-9


def test_fedrep_uses_client_epochs_or_steps_for_the_head() -> None:
    for changes in ({"clients__defaults__epochs": 2}, {"clients__defaults__steps": 7}):
        rounds, steps = rounds_of(config("fedrep", "mlp", 2, **changes), num_rounds=0), {}
        client = clients(rounds)["site_1"]
        plan = rounds.algorithm.train(
            client,
            Payload(
                rounds.algorithm.broadcast(
                    rounds.server, rounds.federation.client_infos[client.participant_id]
                )
            ),
        )
        fit = next(plan)
        steps[fit.label] = (fit.epochs, fit.steps)
        fit = plan.send(rounds.backend.run([(client, fit)])[0])
        steps[fit.label] = (fit.epochs, fit.steps)
        assert steps == {
            "head": (2, None) if "clients__defaults__epochs" in changes else (1, 7),
            "train": (1, None),
        }
        plan.close()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("finetune", ["all", "head"])
def test_fedbabu_round_matches_reference(finetune: str) -> None:
    algorithm = {"name": "fedbabu", "finetune": finetune, "fine_tune_epochs": 2}
    rounds = rounds_of(config("fedbabu", [BN, MLP], 4, algorithm=algorithm), num_rounds=1)
    sent: Sent = {}
    for client in clients(rounds).values():
        model = received(rounds, client)
        body = [p for n, p in model.named_parameters() if n.startswith("backbone.")]
        train(client, body, entropy(model))
        state = {
            n: t
            for n, t in floating_tensors(model.state_dict()).items()
            if n.startswith("backbone.")
        }
        sent.setdefault(client.arch["model"].spec_id, []).append((client.num_rows, state))
    rounds.run_round()
    compare(rounds, sent)
    for client_id, client in clients(rounds).items():
        arch = client.arch["model"]
        started = rounds.federation.initial_tensors(arch)
        assert all(
            torch.equal(rounds.server.models[arch.spec_id][n], started[n])
            for n in started
            if n.startswith("head.")
        )
        is_sent = rounds.algorithm.broadcast(
            rounds.server, rounds.federation.client_infos[client_id]
        )["model"]
        # Averaging equal heads would only cost traffic.
        assert is_sent.keys() == sent[arch.spec_id][0][1].keys()
        tuned = received(rounds, client)
        parameters = [
            p for n, p in tuned.named_parameters() if finetune == "all" or n.startswith("head.")
        ]
        train(client, parameters, entropy(tuned), "personalise", 2)  # style: ok (stream label)
        read = deployed(rounds, client_id).models["model"]
        assert largest_difference(read, tuned) < 1e-9
        assert not torch.equal(read["head.weight"], started["head.weight"])


def test_fedbabu_server_has_a_model_with_one_group() -> None:
    assert rounds_of(config("fedbabu", "mlp")).evaluate().server is not None
    assert rounds_of(config("fedbabu", MIXED, 4)).evaluate().server is None


@pytest.mark.usefixtures("float64")
def test_ditto_round_matches_reference() -> None:
    algorithm = {"name": "ditto", "weight": 0.3, "personal_epochs": 2}
    rounds = rounds_of(
        config("ditto", [BN, MLP], 6, algorithm=algorithm, clients__per_round=4), num_rounds=2
    )
    sent: Sent = {}
    personal = {}
    before, cohort = clients(rounds), rounds.sample_cohort(2)
    assert any(PERSONAL in before[client_id].models for client_id in cohort)
    for client_id in cohort:
        client = before[client_id]
        shared = received(rounds, client)
        anchor = {n: t.detach().clone() for n, t in shared.state_dict().items()}
        own = personal[client_id] = module(
            client.arch["model"], client.models.get(PERSONAL, anchor)
        )

        def loss(x, y, own=own, anchor=anchor):
            distance = sum(((p - anchor[n]) ** 2).sum() for n, p in own.named_parameters())
            return F.cross_entropy(own(x).logits, y) + 0.15 * distance

        train(client, list(own.parameters()), loss, "personal", 2)
        train(client, list(shared.parameters()), entropy(shared))
        sent.setdefault(client.arch["model"].spec_id, []).append(
            (client.num_rows, floating_tensors(shared.state_dict()))
        )
    rounds.run_round()
    compare(rounds, sent)
    for client_id in cohort:
        assert (
            largest_difference(rounds.store.get(client_id).models[PERSONAL], personal[client_id])
            < 1e-9
        )


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_ditto_shared_model_equals_fedavg(weight: float) -> None:
    fedavg, ditto = (
        rounds_of(config("fedavg")),
        rounds_of(config("ditto", algorithm={"name": "ditto", "weight": weight})),
    )
    (group,) = fedavg.server.models
    assert same_bits(fedavg.server.models[group], ditto.server.models[group])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("weight, equal", [(0.0, True), (1.0, False)])
def test_ditto_without_proximal_term_trains_locally(weight: float, equal: bool) -> None:
    """Use whole batches, because the personal model draws batches with a separate key."""
    full = {"clients__defaults__batch_size": 500, "clients__defaults__epochs": 3}
    local = rounds_of(config("local", MIXED, 4, **full))
    ditto = rounds_of(
        config("ditto", MIXED, 4, algorithm={"name": "ditto", "weight": weight}, **full)
    )
    for client_id in local.federation.client_infos:
        far = largest_difference(
            ditto.store.get(client_id).models[PERSONAL], local.store.get(client_id).models["model"]
        )
        assert far < 1e-10 if equal else far > 1e-5


def test_ditto_uses_personal_model_for_local_test(
    tmp_path: Path,
) -> None:
    rounds = rounds_of(config("ditto", "mlp", 3, clients__per_round=1, rounds=1))
    (trained,) = rounds.sample_cohort(0)
    rows = Rows("common_test")
    for client_id in rounds.federation.client_infos:
        client = deployed(rounds, client_id)
        site = rounds.executor.runtime  # type: ignore[attr-defined]
        home, common = site.predict(client, rows, True), site.predict(client, rows, False)
        assert torch.equal(home, common) is (client_id != trained)
        personal = module(client.arch["model"], client.models[PERSONAL]).eval()
        with torch.no_grad():
            assert torch.allclose(
                home, personal(client.data("common_test", None)["x"]).logits, atol=1e-5
            )
        (shared,) = rounds.server.models.values()
        assert same_bits(client.models["model"], shared)
    path = tmp_path / "model.safetensors"
    path.write_bytes(rounds.evaluate(details=True).clients[trained].model)
    assert same_bits(
        SavedModel.load(path).tensors, floating_tensors(rounds.store.get(trained).models[PERSONAL])
    )
