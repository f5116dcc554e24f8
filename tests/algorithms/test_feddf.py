"""FedDF and Hybrid: rounds compared with references, and limit cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_fl.core.objectives import TeacherDistillation
from hetero_fl.core.participant import floating_tensors
from hetero_fl.core.plan import Fit
from hetero_fl.engine.batches import index_batches
from hetero_fl.federation.synchronous import SynchronousTrainer
from hetero_fl.utils.seeding import keyed_generator
from tests.references.local_training import clients, largest_difference, mean, module, train
from tests.support.federations import MIXED, config, rounds_of

BN, MLP, GN = MIXED
T, SERVER = 2.5, {"optimizer": {"name": "sgd", "lr": 0.03}}
# Instead of -8, which barely trained models never reach.
CLIP = -2.5


def federation(method: str, models: Any, clients: int = 4, **settings: Any) -> dict[str, Any]:
    given = {"temperature": T, "distill_epochs": 2, "proxy_batch_size": 25, **settings}
    return config(method, models, clients, algorithm={"name": method, **given}, server=SERVER)


def kl(teacher: Tensor, z: Tensor) -> Tensor:
    """Return the mean KL divergence at temperature T, times T²."""
    p = (teacher / T).softmax(1)
    return T**2 * (p * (p.log() - (z / T).log_softmax(1))).sum(1).mean()


def run_distillation(
    rounds: SynchronousTrainer,
    index: int,
    slot: str,
    model: nn.Module,
    x: Tensor,
    teacher: Tensor,
    epochs: int,
) -> None:
    """Run the server's distillation steps on the proxy rows of a round."""
    sgd = torch.optim.SGD(model.train().parameters(), lr=0.03)
    fit = Fit({}, TeacherDistillation(), epochs=epochs, batch_size=25)
    for rows in index_batches(
        len(x),
        fit,
        (rounds.federation.seed, index, "server", f"distil {slot}", 0),  # style: ok (random stream)
    ):
        sgd.zero_grad()
        kl(teacher[rows], model(x[rows]).logits).backward()
        sgd.step()


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        z: Tensor = model.eval()(x).logits
    model.train()
    return z


def contrast(counts: Tensor) -> Tensor:
    return counts * (1 - counts / counts.sum()) + 0.1


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("teacher", ["mean", "samples", "contrast"])
def test_feddf_round_matches_reference(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients preprocess proxy rows differently; the last keeps its model and joins no group."""
    monkeypatch.setattr("hetero_fl.aggregation.teachers.MIN_LOG_PROBABILITY", CLIP)
    source = federation("feddf", [BN, MLP], 5, teacher=teacher)
    views = {"site_2": (0.3, 0.2), "site_3": (0.1, 0.5)}
    source["clients"]["overrides"] = [
        {"match": "site_5", "shares": ["predictions", "statistics"]},
        *(
            {"match": client_id, "preprocess": {"normalize": {"mean": m, "std": s}}}
            for client_id, (m, s) in views.items()
        ),
    ]
    rounds = rounds_of(source, num_rounds=1)
    models = {group: dict(tensors) for group, tensors in rounds.server.models.items()}
    sent: dict[str, list[tuple[float, dict[str, Tensor]]]] = {group: [] for group in models}
    top, bottom, clipped = torch.zeros(60, 10), torch.zeros(10), 0
    archs, seen = {}, {}
    for client_id, client in clients(rounds).items():
        arch = client.arch["model"]
        model = module(
            arch, client.models["model"] if client_id == "site_5" else models[arch.spec_id]
        )
        train(
            client, list(model.parameters()), lambda x, y, m=model: F.cross_entropy(m(x).logits, y)
        )
        if client_id != "site_5":
            sent[arch.spec_id].append((client.num_rows, floating_tensors(model.state_dict())))
        public, archs[arch.spec_id] = client.data("proxy", None)["x"], arch
        # The group's rows, preprocessed as for its first client.
        seen.setdefault(arch.spec_id, public)
        z = logits(model, public)
        clipped += int((z.log_softmax(1) < CLIP).sum())
        weight = {
            "mean": torch.ones(10),
            "samples": client.num_rows * torch.ones(10),
            "contrast": contrast(client.counts),
        }
        top += weight[teacher] * (z.log_softmax(1).clamp(min=CLIP) if teacher == "contrast" else z)
        bottom += weight[teacher]
    assert clipped
    rounds.run_round()
    for group, members in sent.items():
        model = module(archs[group], mean(members))
        start = {n: t.clone() for n, t in model.state_dict().items()}
        run_distillation(rounds, 1, group, model, seen[group], top / bottom, 2)
        # Distillation moved it away from the average.
        assert largest_difference(start, model) > 1e-4
        assert largest_difference(rounds.server.models[group], model) < 1e-9


@pytest.mark.usefixtures("float64")
def test_server_student_matches_reference() -> None:
    source = federation("hybrid", [BN, MLP], student_epochs=2)
    source["server"] = {"model": MLP, "optimizer": {"name": "sgd", "lr": 0.03, "momentum": 0.9}}
    rounds = rounds_of(source, num_rounds=0)
    student = module(rounds.server.arch["student"], rounds.server.models["student"])
    # The optimizer keeps its momentum.
    sgd = torch.optim.SGD(student.parameters(), lr=0.03, momentum=0.9)
    x, fit = (
        rounds.server.data("proxy", None)["x"],
        Fit({}, TeacherDistillation(), epochs=2, batch_size=25),
    )
    for index in range(2):
        rounds.run_round()
        teacher = rounds.server.state["teacher"]
        for rows in index_batches(
            len(x),
            fit,
            (rounds.federation.seed, index, "server", "distil student", 0),  # style: ok (stream)
        ):
            sgd.zero_grad()
            kl(teacher[rows], student(x[rows]).logits).backward()
            sgd.step()
        assert largest_difference(rounds.server.models["student"], student) < 1e-9


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("heads", ["take", "keep"])
@pytest.mark.parametrize("distill_at", ["server", "both"])
def test_hybrid_round_matches_reference(
    distill_at: str, heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cover logit adjustment, contrast weights, proxy replay and clients that share backbones."""
    monkeypatch.setattr("hetero_fl.aggregation.teachers.MIN_LOG_PROBABILITY", CLIP)
    source = federation(
        "hybrid",
        [BN, MLP],
        5,
        align=0.0,
        recalibrate=[],
        distill_at=distill_at,
        heads=heads,
        replay_weight=0.7,
    )
    source["clients"]["overrides"] = [{"match": "site_2", "shares": ["backbone", "predictions"]}]
    rounds = rounds_of(source, num_rounds=2)
    models, target = (
        {g: dict(t) for g, t in rounds.server.models.items()},
        rounds.server.state["teacher"].clone(),
    )
    sent: dict[str, list[tuple[float, dict[str, Tensor]]]] = {group: [] for group in models}
    top, bottom, clipped = torch.zeros(60, 10), torch.zeros(10), 0
    archs, kept = {}, {}
    for client_id, client in clients(rounds).items():
        arch, public = client.arch["model"], client.data("proxy", None)["x"]
        full = heads == "take" and client_id != "site_2"
        taken = {
            n: t
            for n, t in floating_tensors(models[arch.spec_id]).items()
            if full or n.startswith("backbone.")
        }
        model = module(arch, {**client.models["model"], **taken})
        if distill_at == "both":
            sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            for rows in index_batches(
                60,
                Fit({}, TeacherDistillation(), batch_size=25),
                (client.round_context.seed, 2, client_id, "digest", 0),
            ):
                sgd.zero_grad()
                kl(target[rows], model(public[rows]).logits).backward()
                sgd.step()
        prior = ((client.counts + 1) / (client.counts + 1).sum()).log()
        step = iter(range(999))

        def loss(
            x,
            y,
            model=model,
            public=public,
            prior=prior,
            step=step,
            client_id=client_id,
            seed=client.round_context.seed,
        ):
            some = torch.randint(
                60,
                (25,),
                generator=keyed_generator(seed, 2, client_id, "train", 0, "public", next(step)),
            )
            private = F.cross_entropy(model(x).logits + prior, y)
            return private + 0.7 * kl(target[some], model(public[some]).logits)

        train(client, list(model.parameters()), loss)
        state = floating_tensors(model.state_dict())
        parts = ("backbone.",) if client_id == "site_2" else ("backbone.", "head.")
        sent[arch.spec_id].append(
            (client.num_rows, {n: t for n, t in state.items() if n.startswith(parts)})
        )
        archs[arch.spec_id] = arch
        if not full:
            kept[client_id] = {n: t for n, t in state.items() if n.startswith("head.")}
        # This client shares no label counts.
        weights = contrast(
            torch.full((10,), client.num_rows / 10) if client_id == "site_2" else client.counts
        )
        log_p = logits(model, public).log_softmax(1)
        clipped += int((log_p < CLIP).sum())
        top, bottom = top + weights * log_p.clamp(min=CLIP), bottom + weights
    assert clipped
    rounds.run_round()
    teacher = top / bottom
    assert torch.allclose(rounds.server.state["teacher"], teacher, rtol=0, atol=1e-9)
    for group, members in sent.items():
        owners = {n: [(w, t[n]) for w, t in members if n in t] for n in models[group]}
        average = {
            n: sum(w * t for w, t in o) / sum(w for w, _ in o) for n, o in owners.items() if o
        }
        model = module(archs[group], average)  # type: ignore[arg-type]
        run_distillation(rounds, 2, group, model, public, teacher, 2)
        assert largest_difference(rounds.server.models[group], model) < 1e-9
    assert kept.keys() == ({"site_2"} if heads == "take" else set(rounds.federation.client_infos))
    for client_id, head in kept.items():
        assert largest_difference(rounds.store.get(client_id).models["model"], head) < 1e-9


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["feddf", "hybrid"])
def test_distilling_a_single_client_changes_nothing(method: str) -> None:
    off = (
        {
            "logit_adjustment": False,
            "recalibrate": [],
            "teacher": "mean",
            "align": 0.0,
            "replay_weight": 0.0,
        }
        if method == "hybrid"
        else {}
    )
    fedavg = rounds_of(config("fedavg", GN, 1))
    (group,) = fedavg.server.models
    single, two = (
        rounds_of(federation(method, GN, 1, **off)),
        rounds_of(federation(method, GN, 2, **off)),
    )
    assert (
        largest_difference(
            floating_tensors(single.server.models[group]),
            floating_tensors(fedavg.server.models[group]),
        )
        < 1e-10
    )
    averaged = rounds_of(config("fedavg", GN, 2))
    assert (
        largest_difference(
            floating_tensors(two.server.models[group]),
            floating_tensors(averaged.server.models[group]),
        )
        > 1e-5
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("method", "settings"), [("fedmd", {}), ("ds_fl", {"sharpen": "none", "proxy_rows": None})]
)
def test_digest_of_client_predictions_equals_local(method: str, settings: dict[str, Any]) -> None:
    """Check that the loss to a client's own predictions has gradient zero."""
    local, actual = (
        rounds_of(config("local", GN, 1, rounds=3)),
        rounds_of(config(method, GN, 1, rounds=3, algorithm={"name": method, **settings})),
    )
    assert (
        largest_difference(
            actual.store.get("site").models["model"], local.store.get("site").models["model"]
        )
        < 1e-10
    )
