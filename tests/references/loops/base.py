"""What the loops have in common: modules, batches, descent, predictions, and the reading of models."""

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
    """Clients with a model each, that train alone: `local` as it stands.

    After every round `losses` has a list of the clients' mean training losses, `scores` one of the losses on what was read.
    """

    def __init__(self, prepared: PreparedRun) -> None:
        self.federation, self.method, self.name = (
            prepared.federation,
            prepared.method,
            prepared.name,
        )
        self.cards = [
            self.federation.client_infos[id] for id in natural_order(self.federation.client_infos)
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
        """A named set as that client sees it."""
        return self.federation.data.columns(card.client_id, name, card.preprocess)

    def start(self) -> None:
        """Make the models."""
        self.models = [self.module(c.arch) for c in self.cards]

    def module(self, arch: Any) -> nn.Module:
        """A model with the weights from which the framework's starts, laid out as the framework lays it out."""
        made: nn.Module = arch.build()
        made.load_state_dict(arch.initial_tensors(self.federation.seed))
        return made.to(memory_format=torch.channels_last) if prefers_channels_last(arch) else made  # type: ignore[call-overload]

    # The round -----------------------------------------------------------------------------------------------------
    def round(self) -> None:
        """Training, what follows from it, and the reading of models."""
        self.losses.append([])
        self.scores.append([])
        self.work()
        self.done += 1
        self.read()

    def work(self) -> None:
        """Clients and server in one round."""
        for i in range(len(self.cards)):
            self.train(i, self.models[i])

    def read(self) -> None:
        """The loss of every client's model on its own test rows and on the common sets."""
        for i, model in enumerate(self.models):
            for name in READ:
                self.score(i, name, predicted(model, self.data[i][name]["x"]))

    def read_of_one(self, said: Callable[[Tensor], Tensor]) -> None:
        """What everybody has in common answers for all clients: `said(x)` are its logits; the common sets are asked once."""
        common: dict[str, Tensor] = {}
        for i in range(len(self.cards)):
            for name in READ:
                if name == "test" or name not in common:
                    common[name] = said(self.data[i][name]["x"])
                self.score(i, name, common[name])

    def score(self, i: int, name: str, logits: Tensor) -> None:
        """Accuracy and loss; the loss is remembered."""
        y = self.data[i][name]["y"]
        (logits.argmax(1) == y).double().mean()
        self.scores[-1].append(float(F.cross_entropy(logits, y)))

    # Training ------------------------------------------------------------------------------------------------------
    def batches(
        self, n: int, who: str, label: str = "train", size: int = BATCH, epochs: int = 1
    ) -> list[Tensor]:
        """The framework's batches; a last one of one joins the one before, for BatchNorm's sake."""
        made: list[Tensor] = []
        for epoch in range(epochs):
            cut = list(
                torch.randperm(n, generator=self.draws(who, label, epoch)).split(min(size, n))
            )
            if len(cut) > 1 and len(cut[-1]) == 1:
                cut[-2:] = [torch.cat(cut[-2:])]
            made += cut
        return made

    def draws(self, who: str, label: str, *more: Key, use: int = 0) -> torch.Generator:
        """A generator of this round, for the `use`-th time that somebody draws under that label."""
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
        """Epochs on one client's rows; `loss_from_report(x, y, step)`."""
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
        """Towards a teacher's logits on public rows."""
        optimizer = None if sgd else adam([module])
        descend(
            [module],
            (divergence(module(x[rows]).logits, teacher[rows], t) for rows in batches),
            optimizer,
        )

    def class_sums(self, i: int, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Sum and number by class of the features of the training rows."""
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
    """A step of the optimizer (SGD) on each loss as it is computed; returns their mean."""
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
    """The server's optimizer."""
    return torch.optim.Adam([p for module in modules for p in module.parameters()], lr, fused=True)


def only(module: nn.Module, part: str) -> nn.Module:
    """The module with nothing but that part to be trained."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(part))
    return module


@torch.no_grad()
def predicted(module: nn.Module, x: Tensor, readout: str = "logits") -> Tensor:
    """Outputs in evaluation mode."""
    module.eval()
    return torch.cat([getattr(module(some), readout) for some in x.split(500)])


def divergence(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """KL · T², the mean over the batch."""
    log_s, log_t = F.log_softmax(student / t, -1), F.log_softmax(teacher / t, -1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * t**2


def floats(module: nn.Module) -> State:
    """The tensors that are averaged: parameters and BatchNorm's statistics, not its counters."""
    return {n: t for n, t in module.state_dict().items() if t.is_floating_point()}


def load(module: nn.Module, *states: State) -> nn.Module:
    """The module with these tensors in it."""
    module.load_state_dict({n: t for state in states for n, t in state.items()}, strict=False)
    return module
