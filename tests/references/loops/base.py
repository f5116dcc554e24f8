"""Base class of the loops: modules, batches, steps, predictions and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_fl.config.base import OptimizerConfig
from hetero_fl.engine.templates import prefers_channels_last
from hetero_fl.experiment import PreparedRun
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.seeding import Key, keyed_generator

CLASSES = 10
# Rows on which models are evaluated, and the names of the scores.
READ = {
    "test": "personal",
    "common_test": "global",
    "common_validation": "validation_global",
}
State = dict[str, Tensor]
# Function of a batch `x`, `y` and the number of the step.
Loss = Callable[[Tensor, Tensor, int], Tensor]


class Loop:
    """Clients with one model each that train alone; the method Local.

    A subclass creates its models in `start`, runs clients and server in `work` and evaluates the
    `outputs` of its models. Clients are numbered in the natural order of their ids.

    Args:
        prepared: The prepared run, from which data, initial weights and settings are taken.
        channels_last: Whether to use the memory layout of the framework. It changes the last bits.

    Attributes:
        losses: Training loss of each client, keyed by its id, for each round.
        scores: Evaluation losses, keyed by the client's id and the name of the score, for each
            round.
        done: Number of completed rounds.
        cohort: Numbers of the clients that take part in the round.
    """

    # Whether local tests use the class prior of adjusted training.
    adds_prior = True
    # Whether only the client itself trains the head with which it predicts.
    own_models = True

    def __init__(self, prepared: PreparedRun, channels_last: bool = True) -> None:
        self.config, self.method = prepared.config, prepared.method
        self.federation = prepared.federation
        self.channels_last = channels_last
        infos = self.federation.client_infos
        self.cards = [infos[client_id] for client_id in natural_order(infos)]
        self.data = [{name: self.rows(c, name) for name in ("train", *READ)} for c in self.cards]
        for card, rows in zip(self.cards, self.data, strict=True):
            if card.has_proxy:
                rows["proxy"] = self.rows(card, "proxy")
        self.counts = [
            torch.bincount(rows["train"]["y"], minlength=CLASSES).to(torch.get_default_dtype())
            for rows in self.data
        ]
        self.priors = [log_frequencies(counts) for counts in self.counts]
        self.cohort = list(range(len(self.cards)))
        self.losses: list[dict[str, float]] = []
        self.scores: list[dict[tuple[str, str], float]] = []
        self.done = 0
        self.start()

    def rows(self, card: Any, name: str) -> dict[str, Tensor]:
        """Return a named set after the client's preprocessing."""
        return self.federation.data.columns(card.client_id, name, card.preprocess)

    def start(self) -> None:
        """Create the models."""
        self.models = [self.module(c.arch) for c in self.cards]

    def module(self, arch: Any) -> nn.Module:
        """Return a model with the framework's initial weights."""
        result: nn.Module = arch.build()
        result.load_state_dict(arch.initial_tensors(self.federation.seed))
        if self.channels_last and prefers_channels_last(arch):
            result.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return result

    def server_models(self) -> dict[str, State]:
        """Return tensors that models of the server must contain, keyed by slot."""
        return {}

    # Rounds
    def round(self, cohort: Sequence[str] | None = None) -> None:
        """Train, aggregate and evaluate the models.

        Args:
            cohort: Ids of the clients that take part. If None, all.
        """
        if cohort is not None:
            self.cohort = [i for i, c in enumerate(self.cards) if c.client_id in cohort]
        self.losses.append({})
        self.scores.append({})
        self.work()
        self.done += 1
        self.read()

    def work(self) -> None:
        """Run clients and server for one round."""
        for i in self.cohort:
            self.train(i, self.models[i])

    # Evaluation
    def read(self) -> None:
        """Evaluate every client's model on its test rows and on the common sets."""
        found: dict[Any, Tensor] = {}
        for i in range(len(self.cards)):
            model = self.evaluated(i)
            for name in READ:
                key = (name, self.like(i, name))
                if key not in found:
                    found[key] = self.outputs(i, model, name)
                self.score(i, name, found[key])

    def evaluated(self, i: int) -> nn.Module:
        """Return the model of a client that is evaluated."""
        return self.models[i]

    def outputs(self, i: int, model: nn.Module, name: str) -> Tensor:
        """Return the outputs of a client's evaluated model on a named set."""
        return predicted(model, self.data[i][name]["x"])

    def like(self, i: int, name: str) -> Any:
        """Return a key that is equal for clients with equal outputs, which are computed once."""
        return i

    def score(self, i: int, name: str, logits: Tensor) -> None:
        """Record the loss and compute the accuracy."""
        y = self.data[i][name]["y"]
        if name == "test" and self.adds_prior:
            logits = self.adjusted(i, logits)
        elif name != "test" and self.own_models:
            logits = self.corrected(i, logits)
        (logits.argmax(1) == y).double().mean()
        key = (self.cards[i].client_id, READ[name])
        self.scores[-1][key] = float(F.cross_entropy(logits, y))

    # Losses
    def adjusted(self, i: int, logits: Tensor) -> Tensor:
        """Add the client's log class prior if it sets `logit_adjustment`."""
        return logits + self.priors[i] if self.cards[i].settings.logit_adjustment else logits

    def corrected(self, i: int, logits: Tensor) -> Tensor:
        """Subtract the client's log class prior if it sets `prior_correction`."""
        return logits - self.priors[i] if self.cards[i].settings.prior_correction else logits

    def entropy(self, i: int, logits: Tensor, y: Tensor) -> Tensor:
        """Return the client's cross-entropy."""
        return F.cross_entropy(self.adjusted(i, logits), y)

    # Training
    def batches(
        self, n: int, who: str, label: str = "train", size: int = 32, epochs: int = 1, use: int = 0
    ) -> list[Tensor]:
        """Return the framework's batches; a single last row joins the previous batch."""
        result: list[Tensor] = []
        for epoch in range(epochs):
            draws = self.draws(who, label, epoch, use=use)
            cut = list(torch.randperm(n, generator=draws).split(min(size, n)))
            if len(cut) > 1 and len(cut[-1]) == 1:
                cut[-2:] = [torch.cat(cut[-2:])]
            result += cut
        return result

    def own_batches(self, i: int, label: str = "train", epochs: int | None = None) -> list[Tensor]:
        """Return the batches of a client's training rows."""
        card = self.cards[i]
        settings = card.settings
        n = len(self.data[i]["train"]["y"])
        if settings.steps and not epochs:
            size = min(settings.batch_size, n)
            return self.full_batches(n, card.client_id, label, size, settings.steps)
        return self.batches(
            n, card.client_id, label, settings.batch_size, epochs or settings.epochs
        )

    def full_batches(
        self, n: int, who: str, label: str, size: int, steps: int, use: int = 0
    ) -> list[Tensor]:
        """Return permutations without end, cut into full batches."""
        epochs = -(-steps * size // n)
        draws = (self.draws(who, label, epoch, use=use) for epoch in range(epochs))
        order = torch.cat([torch.randperm(n, generator=each) for each in draws])
        return list(order[: steps * size].split(size))

    def draws(self, who: str, label: str, *more: Key, use: int = 0) -> torch.Generator:
        """Return a generator of this round for the `use`-th use of that label."""
        return keyed_generator(self.federation.seed, self.done, who, label, use, *more)

    def train(
        self,
        i: int,
        module: nn.Module,
        loss_of: Loss | None = None,
        label: str = "train",
        epochs: int | None = None,
        besides: Sequence[nn.Module] = (),
        after: Callable[[], None] | None = None,
    ) -> int:
        """Train on one client's rows and return the number of steps.

        Args:
            i: Number of the client.
            module: The trained model.
            loss_of: The loss. If None, the client's cross-entropy.
            label: Label of the random stream. The loss is recorded for "train".
            epochs: Number of epochs. If None, the client's setting.
            besides: Further models that are trained.
            after: Function that is called after each step.
        """
        x, y = self.data[i]["train"]["x"], self.data[i]["train"]["y"]
        if loss_of is None:

            def loss_of(x: Tensor, y: Tensor, step: int) -> Tensor:
                return self.entropy(i, module(x), y)

        orders = self.own_batches(i, label, epochs)
        losses = (loss_of(x[rows], y[rows], step) for step, rows in enumerate(orders))
        modules = [module, *besides]
        loss = descend(modules, losses, self.own_optimizer(i, modules), after)
        if label == "train":
            self.losses[-1][self.cards[i].client_id] = loss
        return len(orders)

    def own_optimizer(self, i: int, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
        """Return a new optimizer of a client."""
        return self.optimizer(self.cards[i].settings.optimizer, modules)

    def optimizer(
        self, config: OptimizerConfig, modules: Iterable[nn.Module]
    ) -> torch.optim.Optimizer:
        """Return an optimizer of all trainable parameters."""
        lr = self.rate(config)
        if config.name == "sgd":
            return sgd(modules, lr, config.momentum, config.nesterov)
        return torch.optim.Adam(trainable(modules), lr, fused=True)

    def rate(self, config: OptimizerConfig) -> float:
        """Return the learning rate of the round, which is constant or linear in the round."""
        if config.schedule == "constant":
            return config.lr
        assert config.schedule == "linear"
        last = max(1, self.federation.num_rounds - 1)
        return config.lr * (1 - (1 - config.gamma) * min(1, self.done / last))

    def class_sums(
        self, i: int, module: nn.Module, readout: str = "features"
    ) -> tuple[Tensor, Tensor]:
        """Return sums and counts by class of the outputs for the training rows."""
        x, y = self.data[i]["train"]["x"], self.data[i]["train"]["y"]
        return summed(predicted(module, x, readout), y), self.counts[i]


def log_frequencies(counts: Tensor) -> Tensor:
    """Return log((n_c + 1) / Σ(n + 1))."""
    return ((counts + 1) / (counts + 1).sum()).log()


def summed(values: Tensor, y: Tensor) -> Tensor:
    """Return the sum of the values of each class."""
    return torch.zeros(CLASSES, values.shape[1]).index_add_(0, y, values)


def trainable(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters that are trained."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def sgd(
    modules: Iterable[nn.Module], lr: float, momentum: float = 0.0, nesterov: bool = False
) -> torch.optim.Optimizer:
    """Return SGD."""
    return torch.optim.SGD(trainable(modules), lr, momentum, nesterov=nesterov, fused=True)


def descend(
    modules: Iterable[nn.Module],
    losses: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    after: Callable[[], None] | None = None,
) -> float:
    """Take a step on each loss with models in training mode and return the mean loss."""
    for module in modules:
        module.train()
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


def only(module: nn.Module, part: str) -> nn.Module:
    """Return the module with only that part trainable."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(part))
    return module


@torch.no_grad()
def predicted(module: nn.Module, x: Tensor, readout: str = "logits") -> Tensor:
    """Return outputs in evaluation mode."""
    module.eval()
    call: Any = module.forward_features if readout == "features" else module
    return torch.cat([call(some) for some in x.split(500)])


def divergence(student: Tensor, teacher: Tensor, t: float = 1.0) -> Tensor:
    """Return KL · T² of the student from a constant teacher, averaged over the batch."""
    log_s, log_t = F.log_softmax(student / t, -1), F.log_softmax(teacher.detach() / t, -1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * t**2


def floats(module: nn.Module) -> State:
    """Return parameters and BatchNorm statistics, without counters."""
    return {n: t for n, t in module.state_dict().items() if t.is_floating_point()}


def copied(state: State) -> State:
    """Return a deep copy."""
    return {n: t.clone() for n, t in state.items()}


def load(module: nn.Module, *states: State) -> nn.Module:
    """Load these tensors into the module and return it."""
    module.load_state_dict({n: t for state in states for n, t in state.items()}, strict=False)
    return module
