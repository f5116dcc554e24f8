"""Methods that distill on proxy rows: FedMD, FedDF, DS-FL, KT-pFL and Hybrid."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hetero_fl.utils.seeding import Key, keyed_generator
from tests.references.loops.averaging import FedAvg, Weights
from tests.references.loops.base import (
    CLASSES,
    Loop,
    Loss,
    State,
    descend,
    divergence,
    floats,
    load,
    log_frequencies,
    predicted,
)

TINY = 1e-12


class Public(Loop):
    """Personal models, and a teacher on the proxy rows."""

    teacher: Tensor | None = None
    # Round in which the teacher's rows were sampled.
    sampled = 0

    def start(self) -> None:
        super().start()
        self.begun: set[int] = set()
        self.labels = torch.zeros(CLASSES)

    def sample(self, index: int) -> Any:
        """Return the indices of a round's proxy rows."""
        total, size = len(self.data[0]["proxy"]["x"]), self.method.proxy_rows
        if size is None or size >= total:
            return slice(None)
        draws = keyed_generator(self.federation.seed, index, "proxy rows")
        return torch.randperm(total, generator=draws)[:size].sort().values

    def public(self, i: int, index: int) -> Tensor:
        """Return the proxy rows of a round after a client's preprocessing."""
        return self.data[i]["proxy"]["x"][self.sample(index)]

    def predict_public(self, i: int, module: nn.Module) -> Tensor:
        """Predict the proxy rows of this round."""
        if "proxy_predictions" in (self.cards[i].settings.recalibrate or ()):
            every = self.data[i]["proxy"]["x"]
            module = recalibrated(module, every[self.order(len(every), "recalibration")])
        return self.corrected(i, predicted(module, self.public(i, self.done)))

    def order(self, n: int, name: str) -> Tensor:
        """Return the order of rows for a recalibration."""
        draws: tuple[Key, ...] = (self.federation.seed, "recalibration", name)
        return torch.randperm(n, generator=keyed_generator(*draws))

    def weighted(self, i: int, z: Tensor) -> tuple[Tensor, Any]:
        """Return the values that are averaged into the teacher, and their weight."""
        n, kind = self.cards[i].num_rows, self.method.teacher
        if kind == "contrast":
            is_known = "statistics" in self.cards[i].settings.shares
            counts = self.counts[i] if is_known else torch.full((CLASSES,), n / CLASSES)
            return z.log_softmax(-1).clamp(min=-8), counts * (1 - counts / counts.sum()) + 0.1
        if kind == "entropy":
            p = z.softmax(-1)
            return z, (p * p.log()).sum(-1, keepdim=True).exp()
        return z, n if kind == "samples" else 1.0

    def consensus(self, sent: list[tuple[Tensor, Any]]) -> Tensor:
        """Return the weighted mean."""
        return sum(w * v for v, w in sent) / sum(w for _, w in sent)  # type: ignore[return-value]

    def aligned(self, teacher: Tensor) -> Tensor:
        """Align the teacher with the labels of all uploads so far."""
        s, settings = self.method, self.cards[0].settings
        known = [self.counts[i] for i in self.cohort if "statistics" in self.shares(i)]
        if not s.align or not known:
            return teacher
        self.labels = self.labels + torch.stack(known).sum(0)
        log_q = log_frequencies(self.labels)
        balanced = settings.logit_adjustment or settings.prior_correction
        p = (teacher + log_q if balanced else teacher).softmax(-1)
        return teacher + s.align * (log_q - p.mean(0).log())

    def shares(self, i: int) -> list[str]:
        """Return what a client shares."""
        return list(self.cards[i].settings.shares)

    def sharpened(self, p: Tensor) -> Tensor:
        """Return the logits of sharpened probabilities."""
        s = self.method
        if s.sharpen == "era":
            return p / s.era_temperature
        return p.log() if s.sharpen == "none" else (p**s.beta).log()

    def digest(self, i: int, module: nn.Module, teacher: Tensor, epochs: int = 1) -> None:
        """Train toward the teacher with the client's optimizer."""
        x, s = self.public(i, self.sampled), self.method
        client_id, size = self.cards[i].client_id, s.proxy_batch_size
        orders = self.batches(len(x), client_id, "digest", size, epochs)
        losses = (self.distance(module(x[o]), teacher[o]) for o in orders)
        descend([module], losses, self.own_optimizer(i, [module]))

    def distance(self, z: Tensor, teacher: Tensor) -> Tensor:
        """Return the distance of a batch from the teacher."""
        return divergence(z, teacher, self.method.temperature)

    def begin(self, i: int, module: nn.Module, public_epochs: int = 0) -> None:
        """Train before a client's first round."""
        s = self.method
        if not s.initial_phase or i in self.begun:
            return
        self.begun.add(i)
        if public_epochs:
            x, y = self.data[i]["proxy"]["x"], self.data[i]["proxy"]["y"]
            client_id, size = self.cards[i].client_id, s.proxy_batch_size
            orders = self.batches(len(y), client_id, "initial public", size, public_epochs)
            losses = (F.cross_entropy(module(x[o]), y[o]) for o in orders)
            descend([module], losses, self.own_optimizer(i, [module]))
        self.train(i, module, label="initial private", epochs=s.initial_private_epochs)


class FedMD(Public):
    """The mean of logits is digested before private training."""

    def work(self) -> None:
        sent = []
        for i in self.cohort:
            model = self.models[i]
            self.begin(i, model, self.method.initial_public_epochs)
            if self.teacher is not None:
                self.digest(i, model, self.teacher, self.method.digest_epochs)
            self.train(i, model)
            sent.append(self.weighted(i, self.predict_public(i, model)))
        teacher = self.aligned(self.consensus(sent))
        sharpens = self.method.sharpen != "none"
        self.teacher = self.sharpened(teacher.softmax(-1)) if sharpens else teacher
        self.sampled = self.done

    def distance(self, z: Tensor, teacher: Tensor) -> Tensor:
        if self.method.distance == "mae":
            return (z - teacher).abs().mean()
        return super().distance(z, teacher)


class Deployed(Public):
    """The newest teacher is digested before training and before evaluation."""

    own_models = False

    def target(self, i: int) -> Tensor | None:
        """Return a client's teacher."""
        return self.teacher

    def deploy(self, i: int, model: nn.Module) -> None:
        """Digest the teacher if there is one."""
        teacher = self.target(i)
        if teacher is not None:
            self.digest(i, model, teacher, self.epochs)

    @property
    def epochs(self) -> int:
        """Epochs of distillation."""
        return int(self.method.digest_epochs)

    def evaluated(self, i: int) -> nn.Module:
        used = deepcopy(self.models[i])
        self.deploy(i, used)
        return used


class DSFL(Deployed):
    """The sharpened mean of probabilities."""

    @property
    def epochs(self) -> int:
        return int(self.method.distill_epochs)

    def work(self) -> None:
        sent, averages_logarithms = [], self.method.teacher == "contrast"
        for i in self.cohort:
            model = self.models[i]
            self.deploy(i, model)
            self.train(i, model)
            z = self.predict_public(i, model)
            _, weight = self.weighted(i, z)
            p = z.softmax(-1)
            sent.append((p.log().clamp(min=-8) if averages_logarithms else p, weight))
        mean = self.consensus(sent)
        if self.method.align:
            logits = mean if averages_logarithms else mean.clamp(min=TINY).log()
            mean = self.aligned(logits).softmax(-1)
        elif averages_logarithms:
            mean = mean.softmax(-1)
        self.teacher = self.sharpened(mean.clamp(min=TINY))
        self.sampled = self.done


class KTpFL(Deployed):
    """Each client digests a mixture of all predictions."""

    def start(self) -> None:
        super().start()
        n = len(self.cards)
        self.weights = torch.full((n, n), 1 / n)
        self.predictions: Tensor | None = None

    def work(self) -> None:
        predictions, t = [], self.method.temperature
        for i in self.cohort:
            model = self.models[i]
            self.begin(i, model)
            self.deploy(i, model)
            self.train(i, model)
            predictions.append((self.predict_public(i, model) / t).softmax(-1))
        self.predictions, self.sampled = torch.stack(predictions), self.done
        self.senders = rows = torch.tensor(self.cohort)
        among = self.weights[rows][:, rows]
        total = among.sum(1, keepdim=True)
        self.weights[rows[:, None], rows] = self.learned(among / total, self.predictions) * total

    def learned(self, c: Tensor, p: Tensor) -> Tensor:
        """Take gradient steps on the coefficients."""
        log_p, s, k = p.clamp(min=TINY).log(), self.method, len(p)
        for _ in range(s.coefficient_steps):
            c = c.detach().requires_grad_()
            mixed = torch.einsum("bk,kdc->bdc", c, p).clamp(min=TINY)
            distances = s.temperature**2 * (mixed * (mixed.log() - log_p)).sum(-1).mean(-1)
            loss = (distances + s.rho * (c - 1 / k).square().sum(-1)).sum()
            optimizer = torch.optim.SGD([c], s.coefficient_lr, fused=True)
            loss.backward()
            optimizer.step()
            c = self.projected(c.detach())
        return c

    def target(self, i: int) -> Tensor | None:
        if self.predictions is None:
            return None
        weights = self.weights[i, self.senders]
        mixture = torch.einsum("k,kdc->dc", weights / weights.sum(), self.predictions)
        return self.method.temperature * mixture.clamp(min=TINY).log()

    @staticmethod
    def projected(rows: Tensor) -> Tensor:
        """Return the nearest distribution to each row."""
        u = rows.sort(-1, descending=True).values
        excess = (u.cumsum(-1) - 1) / torch.arange(1, rows.shape[-1] + 1)
        return (rows - excess.gather(-1, (u > excess).sum(-1, keepdim=True) - 1)).clamp(min=0)


class FedDF(Public, FedAvg):
    """Averaged models, each distilled from all clients."""

    own_models = False

    def start(self) -> None:
        super().start()
        self.sent: list[tuple[Tensor, Any]] = []

    def local(self, i: int, module: nn.Module) -> None:
        super().local(i, module)
        self.sent.append(self.weighted(i, self.predict_public(i, module)))

    def combine(self, mean: dict[str, State], total: Weights) -> None:
        super().combine(mean, total)
        teacher = self.aligned(self.consensus(self.sent))
        sharpens = self.method.sharpen != "none"
        self.teacher = self.sharpened(teacher.softmax(-1)) if sharpens else teacher
        self.sent, self.sampled = [], self.done
        if self.distills:
            for group in mean:
                self.distill(group, self.teacher)

    # Whether the server distills.
    distills = True

    def distill(self, group: str, teacher: Tensor) -> None:
        """Distill the teacher into one averaged model."""
        members = [i for i in self.cohort if self.group(i) == group and self.sends_any(i)]
        first = min(members, key=lambda i: self.cards[i].client_id)
        module = load(self.modules[group], self.shared[group])
        x, s = self.public(first, self.done), self.method
        if getattr(s, "distill_rounds", None) and self.done >= s.distill_rounds:
            every = self.data[first]["proxy"]["x"]
            module = recalibrated(module, every[self.order(len(every), "recalibration")])
            self.shared[group] = floats(module)
            return
        label = f"distil {group}"  # style: ok (random stream)
        orders = self.batches(len(x), "server", label, s.proxy_batch_size, s.distill_epochs)
        with torch.enable_grad():
            losses = (self.distance(module(x[o]), teacher[o]) for o in orders)
            descend([module], losses, self.optimizer(self.config.server.optimizer, [module]))
        parameters = self.parameters(group)
        for name, tensor in floats(module).items():
            if name in parameters or s.distilled_statistics == "proxy":
                self.shared[group][name] = tensor.clone()

    def sends_any(self, i: int) -> bool:
        """Return whether a client uploads a part of its model."""
        return bool({"parameters", "backbone"} & set(self.shares(i)))


class Hybrid(FedDF):
    """FedDF with proxy replay, kept heads and distillation at the clients."""

    def takes(self, i: int, name: str) -> bool:
        is_head = not name.startswith("backbone.")
        return self.sends(i, name) and not (is_head and self.method.heads == "keep")

    @property
    def distills(self) -> bool:  # type: ignore[override]
        return bool(self.method.distill_at != "client")

    def received(self, i: int) -> nn.Module:
        module = super().received(i)
        if self.teacher is not None and self.method.distill_at != "server":
            self.digest(i, module, self.teacher, self.method.digest_epochs)
        return module

    def local(self, i: int, module: nn.Module) -> None:
        self.train(i, module, self.replayed(i, module))
        self.sent.append(self.weighted(i, self.predict_public(i, module)))

    def replayed(self, i: int, module: nn.Module) -> Loss | None:
        """Return the loss with replay."""
        teacher, s, client_id = self.teacher, self.method, self.cards[i].client_id
        if teacher is None or not s.replay_weight:
            return None
        public = self.public(i, self.sampled)

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            draws = self.draws(client_id, "train", "public", step)
            some = torch.randint(len(public), (s.proxy_batch_size,), generator=draws)
            own = self.entropy(i, module(x), y)
            distance = self.distance(module(public[some]), teacher[some])
            return own + s.replay_weight * distance

        return loss

    def outputs(self, i: int, model: nn.Module, name: str) -> Tensor:
        if name == "test" and self.recalibrates:
            model = recalibrated(model, self.mixed(i))
        return super().outputs(i, model, name)

    def like(self, i: int, name: str) -> Any:
        is_own = self.recalibrates and self.method.distill_at != "server"
        return i if is_own else super().like(i, name)

    @property
    def recalibrates(self) -> bool:
        """Whether statistics are recomputed before the local test."""
        return "local_test" in (self.cards[0].settings.recalibrate or ())

    def mixed(self, i: int) -> Tensor:
        """Return equally many own and proxy rows, shuffled."""
        own, proxy = self.data[i]["train"]["x"], self.data[i]["proxy"]["x"]
        size = min(len(own), len(proxy))
        some = own[self.order(len(own), self.cards[i].client_id)[:size]]
        others = proxy[self.order(len(proxy), "recalibration")[:size]]
        return torch.cat([some, others])[self.order(2 * size, "local recalibration")]


def recalibrated(module: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy whose BatchNorm statistics are means over batches of these rows."""
    result = deepcopy(module).eval()
    layers = [layer for layer in result.modules() if isinstance(layer, _BatchNorm)]
    if not layers:
        return result
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    with torch.no_grad():
        for batch in x.split(64):
            if len(batch) > 1:
                result(batch)
    return result.eval()
