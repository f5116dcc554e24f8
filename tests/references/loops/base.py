"""Base class of the loops: modules, batches, steps, predictions and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_fl.engine.templates import prefers_channels_last
from hetero_fl.experiment import PreparedRun
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.seeding import Key, keyed_generator

LR, BATCH = 0.01, 32
State = dict[str, Tensor]


class Loop:
    """Clients with one model each that train alone; the method Local.

    After every round, `losses` has a list of the clients' mean training losses, and `scores` a list
    of evaluation losses.
    """

    def __init__(self, prepared: PreparedRun) -> None:
        self.federation, self.method, self.name = (
            prepared.federation,
            prepared.method,
            prepared.name,
        )
        self.cards = [
            self.federation.client_infos[client_id]
            for client_id in natural_order(self.federation.client_infos)
        ]
        self.data = [
            {name: self.rows(c, name) for name in ("train", "test", *COMMON)} for c in self.cards
        ]
        self.counts = [
            torch.bincount(rows["train"]["y"], minlength=10).float() for rows in self.data
        ]
        self.losses: list[list[float]] = []
        self.scores: list[list[float]] = []
        self.done = 0
        self.start()

    def rows(self, card: Any, name: str) -> dict[str, Tensor]:
        """Return a named set after the client's preprocessing."""
        return self.federation.data.columns(card.client_id, name, card.preprocess)

    def start(self) -> None:
        """Create the models."""
        self.models = [self.module(c.arch) for c in self.cards]

    def module(self, arch: Any) -> nn.Module:
        """Return a model with the framework's initial weights and memory layout."""
        result: nn.Module = arch.build()
        result.load_state_dict(arch.initial_tensors(self.federation.seed))
        return (
            result.to(memory_format=torch.channels_last) if prefers_channels_last(arch) else result
        )  # type: ignore[call-overload]

    # Rounds
    def round(self) -> None:
        """Train, aggregate and evaluate the models."""
        self.losses.append([])
        self.scores.append([])
        self.work()
        self.done += 1
        self.read()

    def work(self) -> None:
        """Run clients and server for one round."""
        for i in range(len(self.cards)):
            self.train(i, self.models[i])

    def read(self) -> None:
        """Evaluate every client's model on its test rows and on the common sets."""
        for i, model in enumerate(self.models):
            for name in READ:
                self.score(i, name, predicted(model, self.data[i][name]["x"]))

    def read_of_one(self, predict: Callable[[Tensor], Tensor]) -> None:
        """Evaluate a shared model for all clients, computing common sets once."""
        predictions: dict[str, Tensor] = {}
        for i in range(len(self.cards)):
            for name in READ:
                if name == "test" or name not in predictions:
                    predictions[name] = predict(self.data[i][name]["x"])
                self.score(i, name, predictions[name])

    def score(self, i: int, name: str, logits: Tensor) -> None:
        """Record the loss and compute the accuracy."""
        y = self.data[i][name]["y"]
        (logits.argmax(1) == y).double().mean()
        self.scores[-1].append(float(F.cross_entropy(logits, y)))

    # Training
    def batches(
        self, n: int, who: str, label: str = "train", size: int = BATCH, epochs: int = 1
    ) -> list[Tensor]:
        """Return the framework's batches; a single last row joins the previous batch."""
        result: list[Tensor] = []
        for epoch in range(epochs):
            cut = list(
                torch.randperm(n, generator=self.draws(who, label, epoch)).split(min(size, n))
            )
            if len(cut) > 1 and len(cut[-1]) == 1:
                cut[-2:] = [torch.cat(cut[-2:])]
            result += cut
        return result

    def draws(self, who: str, label: str, *more: Key, use: int = 0) -> torch.Generator:
        """Return a generator of this round for the `use`-th use of that label."""
        return keyed_generator(self.federation.seed, self.done, who, label, use, *more)

    def train(
        self,
        i: int,
        module: nn.Module,
        loss_of: Callable[[Tensor, Tensor, int], Tensor] | None = None,
        label: str = "train",
        epochs: int = 1,
        besides: Sequence[nn.Module] = (),
        after: Callable[[], None] | None = None,
    ) -> None:
        """Train for some epochs on one client's rows with `loss(x, y, step)`."""
        x, y = self.data[i]["train"]["x"], self.data[i]["train"]["y"]
        loss_of = loss_of or (lambda x, y, step: F.cross_entropy(module(x).logits, y))
        steps = enumerate(self.batches(len(y), self.cards[i].client_id, label, epochs=epochs))
        loss = descend(
            [module, *besides], (loss_of(x[rows], y[rows], s) for s, rows in steps), after=after
        )
        if label == "train":
            self.losses[-1].append(loss)

    def follow(
        self,
        module: nn.Module,
        x: Tensor,
        teacher: Tensor,
        batches: list[Tensor],
        t: float,
        sgd: bool,
    ) -> None:
        """Train toward a teacher's logits on proxy rows."""
        optimizer = None if sgd else adam([module])
        descend(
            [module],
            (divergence(module(x[rows]).logits, teacher[rows], t) for rows in batches),
            optimizer,
        )

    def class_sums(self, i: int, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Return sums and counts by class of the features of the training rows."""
        x, y = self.data[i]["train"]["x"], self.data[i]["train"]["y"]
        values = predicted(module, x, "features")
        return torch.zeros(10, values.shape[1]).index_add_(0, y, values), self.counts[i]


COMMON = ("common_test", "common_validation", "proxy")
READ = ("test", "common_test", "common_validation")


def descend(
    modules: Iterable[nn.Module],
    losses: Iterable[Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    after: Callable[[], None] | None = None,
) -> float:
    """Take an SGD step on each loss and return the mean loss."""
    parameters = [p for module in modules for p in module.train().parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(parameters, LR, fused=True)
    total, steps = torch.zeros(()), 0
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if after is not None:
            after()
        total += loss.detach()
        steps += 1
    return float(total) / steps


def adam(modules: Iterable[nn.Module], lr: float = 1e-3) -> torch.optim.Optimizer:
    """Return the server's optimizer."""
    return torch.optim.Adam([p for module in modules for p in module.parameters()], lr, fused=True)


def only(module: nn.Module, part: str) -> nn.Module:
    """Return the module with only that part trainable."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(part))
    return module


@torch.no_grad()
def predicted(module: nn.Module, x: Tensor, readout: str = "logits") -> Tensor:
    """Return outputs in evaluation mode."""
    module.eval()
    return torch.cat([getattr(module(some), readout) for some in x.split(500)])


def divergence(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """Return KL · T², averaged over the batch."""
    log_s, log_t = F.log_softmax(student / t, -1), F.log_softmax(teacher / t, -1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * t**2


def floats(module: nn.Module) -> State:
    """Return parameters and BatchNorm statistics, without counters."""
    return {n: t for n, t in module.state_dict().items() if t.is_floating_point()}


def load(module: nn.Module, *states: State) -> nn.Module:
    """Load these tensors into the module and return it."""
    module.load_state_dict({n: t for state in states for n, t in state.items()}, strict=False)
    return module
