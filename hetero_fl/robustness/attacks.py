"""Simulated attacks by malicious clients on updates, predictions and training data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from inspect import signature
from statistics import NormalDist
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from hetero_fl.config.population import Population
from hetero_fl.config.protection import AggregationConfig, AttacksConfig
from hetero_fl.core.participant import ClientInfo, Columns
from hetero_fl.core.payload import Payload
from hetero_fl.core.task import Task
from hetero_fl.robustness.rules import (
    PredictionRule,
    ReferenceTensors,
    RobustRule,
    Rule,
    TrainedNames,
    UploadBlock,
)
from hetero_fl.utils.code_permission import CODE_PREFIX
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.registry import Registry, import_reference
from hetero_fl.utils.seeding import keyed_generator, sample_numbers

ActsOn = Literal["data", "updates", "rows"]


@dataclass(frozen=True)
class AttackContext:
    """Context of an attack: the round, the malicious clients and the attacked tensor.

    Args:
        task: Task of the federation.
        seed: Seed of the run.
        round_idx: Index of the round.
        malicious: Ids of the malicious clients, in the order of the first dimension of the
            attacked tensors.
        senders: Number of clients that sent an upload, including malicious clients.
        item: Name of the attacked item.
        tensor: Name of the attacked tensor in the item.
    """

    task: Task
    seed: int
    round_idx: int
    malicious: Sequence[str]
    senders: int = 0
    item: str = ""
    tensor: str = ""

    def generator(self, client_id: str = "") -> torch.Generator:
        """Create a generator that is seeded for the round, the attacked tensor and a client.

        Each call with the same `client_id` returns a new generator with the same seed, so it
        generates the same numbers. Call this method once, and reuse the generator for all draws.

        Args:
            client_id: Id of a malicious client. If empty, the seed does not depend on the client,
                so all malicious clients can use the same random numbers.
        """
        return keyed_generator(
            self.seed, self.round_idx, "attack", client_id, self.item, self.tensor
        )


class Attack:
    """Base class of simulated attacks.

    Args:
        config: The `attacks` section of the configuration.

    Attributes:
        acts_on: Parts that the attack changes: training rows ("data"), parameters and class sums
            ("updates"), or predictions and other items with one row per example ("rows").
        strength: Default of the setting `strength`.
        factor: Value of the setting `strength`, or the default.

    Example:
        >>> from hetero_fl.config.protection import AttacksConfig
        >>> from hetero_fl.robustness.attacks import SignFlip
        >>> attack = SignFlip(AttacksConfig(name="sign_flip", strength=2.0))
        >>> attack.poison_updates(torch.ones(1, 3), None)
        tensor([[-2., -2., -2.]])
    """

    acts_on: frozenset[ActsOn] = frozenset()
    strength: ClassVar[float] = 1.0

    def __init__(self, config: AttacksConfig) -> None:
        self.config = config
        self.factor = config.strength or self.strength

    def poison_rows(self, columns: Columns, context: AttackContext) -> Columns:
        """Return the poisoned training rows of a malicious client.

        The default implementation returns the true rows.

        Args:
            columns: True training rows of the client, keyed by column name.
            context: Round and malicious client.

        Returns:
            Poisoned training rows, keyed by column name.
        """
        return columns

    def poison_updates(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        """Return the updates that malicious clients send.

        The default implementation returns the true updates.

        Args:
            true_uploads: True updates of L malicious clients, shape `[L, …]`. For parameters, these
                are the differences from the received parameters.
            context: Round, malicious clients and attacked tensor.

        Returns:
            Poisoned updates, shape `[L, …]`.
        """
        return true_uploads

    def poison_predictions(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        """Return the predictions that malicious clients send.

        The default implementation returns the true predictions.

        Args:
            true_uploads: True predictions of L malicious clients, shape `[L, N, C]`.
            context: Round, malicious clients and attacked tensor.

        Returns:
            Poisoned predictions, shape `[L, N, C]`.
        """
        return true_uploads

    def triggered_rows(self, columns: Columns, context: AttackContext) -> Columns | None:
        """Return test rows with the trigger added, or None if the attack has no trigger.

        If the attack succeeds, the model assigns these rows to the class `config.target`.

        Args:
            columns: Test rows, keyed by column name.
            context: Round of the attack.
        """
        return None


attack: Registry[type[Attack]] = Registry("attack", lambda: Attack)


@attack("confident_wrong")
class ConfidentWrong(Attack):
    """Attack that swaps the largest prediction of each row with a random other class.

    Each malicious client samples the classes independently. Predictions are then multiplied by
    `strength`. For multi-class tasks, the mean of each row is subtracted before and added back
    afterwards, so that poisoned probabilities sum to one.
    """

    acts_on = frozenset({"rows"})
    strength = 10.0

    @override
    def poison_predictions(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        level = (
            true_uploads.mean(-1, keepdim=True)
            if context.task.kind == "multiclass"
            else torch.zeros_like(true_uploads[..., :1])
        )
        swapped = []
        for client_id, rows in zip(context.malicious, true_uploads - level, strict=True):
            generator = context.generator(client_id)
            offset = torch.randint(1, rows.shape[-1], rows.shape[:-1], generator=generator)
            other_class = (rows.argmax(-1) + offset) % rows.shape[-1]
            swapped.append(swap_with_largest(rows, other_class))
        return level + self.factor * torch.stack(swapped)


def swap_with_largest(rows: Tensor, target: Tensor) -> Tensor:
    """Swap the largest value of each row with the value of its target class.

    Args:
        rows: Predictions, shape `[N, C]`.
        target: Target class of each row, shape `[N]`.

    Example:
        >>> import torch
        >>> from hetero_fl.robustness.attacks import swap_with_largest
        >>> swap_with_largest(torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([2]))
        tensor([[0.1000, 0.2000, 0.7000]])
    """
    swapped = rows.clone()
    largest = rows.argmax(-1, keepdim=True)
    swapped.scatter_(-1, largest, rows.gather(-1, target[..., None]))
    return swapped.scatter_(-1, target[..., None], rows.gather(-1, largest))


@attack("label_flip")
class LabelFlip(Attack):
    """Attack that replaces each training label y by C − 1 − y (Tolpegin et al. 2020).

    C is the number of classes. If the setting `pairs` is set, only the labels in this mapping are
    replaced. Multi-label targets y are replaced by 1 − y.
    """

    acts_on = frozenset({"data"})

    @override
    def poison_rows(self, columns: Columns, context: AttackContext) -> Columns:
        y = columns["y"]
        classes = context.task.outputs
        if context.task.kind == "multilabel":
            return {**columns, "y": 1 - y}
        pairs = self.config.pairs
        new_labels = torch.arange(classes).flip(0) if pairs is None else torch.arange(classes)
        for label, new_label in (pairs or {}).items():
            new_labels[label] = new_label
        return {**columns, "y": new_labels[y]}


@attack("backdoor")
class Backdoor(Attack):
    """Attack that stamps training images with a trigger and relabels them (Gu et al. 2017).

    The trigger is added to a share `stamped` of the images, which are relabeled as class `target`.
    With a `strength` other than 1, updates are scaled as well (Bagdasaryan et al. 2020).
    """

    def __init__(self, config: AttacksConfig) -> None:
        super().__init__(config)
        self.acts_on = frozenset({"data"}) if self.factor == 1 else frozenset({"data", "updates"})

    @override
    def poison_rows(self, columns: Columns, context: AttackContext) -> Columns:
        x = columns["x"]
        y = columns["y"]
        generator = keyed_generator(context.seed, "attack", "stamped", context.malicious[0])
        count = max(1, round(self.config.stamped * len(x)))
        indices = torch.randperm(len(x), generator=generator)[:count]
        x = x.clone()
        y = y.clone()
        x[indices] = self.stamp_trigger(x[indices], x)
        y[indices] = self.config.target
        return {**columns, "x": x, "y": y}

    def stamp_trigger(self, images: Tensor, all_images: Tensor) -> Tensor:
        """Add the trigger, a bright square in the lower right corner, to images.

        Args:
            images: Images, shape `[n, C, H, W]`.
            all_images: Images whose maximum value is the brightness of the square.
        """
        stamped = images.clone()
        side = self.config.trigger
        stamped[..., -side:, -side:] = all_images.amax()
        return stamped

    @override
    def triggered_rows(self, columns: Columns, context: AttackContext) -> Columns | None:
        x = columns["x"]
        y = columns["y"]
        others = y != self.config.target
        return {"x": self.stamp_trigger(x[others], x), "y": y[others]}

    @override
    def poison_updates(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        return true_uploads * self.factor


class UpdateAttack(Attack):
    """Base class of attacks on updates, tensor by tensor.

    Malicious clients train on true data and share the updates with each other. Buffers are not
    changed, because a negative BatchNorm variance would reveal the attack. Predictions are attacked
    in the same way as updates.
    """

    acts_on = frozenset({"updates", "rows"})

    @override
    def poison_predictions(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        return self.poison_updates(true_uploads, context)


@attack("sign_flip")
class SignFlip(UpdateAttack):
    """Attack that sends −strength·u in place of the update u."""

    strength = 4.0

    @override
    def poison_updates(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        return -self.factor * true_uploads


@attack("gaussian")
class GaussianNoiseAttack(UpdateAttack):
    """Attack that sends Gaussian noise in place of the update (Blanchard et al. 2017, section 5).

    The standard deviation of the noise is `strength` times the root mean square of the true update
    of the tensor. Each malicious client samples the noise independently.
    """

    strength = 10.0

    @override
    def poison_updates(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        noise = [
            torch.randn(u.shape, generator=context.generator(c), dtype=u.dtype)
            for c, u in zip(context.malicious, true_uploads, strict=True)
        ]
        size = (
            true_uploads.reshape(len(true_uploads), -1)
            .square()
            .mean(1)
            .sqrt()
            .reshape(-1, *[1] * (true_uploads.ndim - 1))
        )
        return self.factor * size * torch.stack(noise)


@attack("little_is_enough")
class LittleIsEnough(UpdateAttack):
    """Attack that sends mean − z·std of the true updates (Baruch et al. 2019, Algorithm 3).

    The mean and the standard deviation are computed over the malicious clients for each coordinate.
    All malicious clients send the same update. The factor z is `strength` if set. Otherwise, it is
    the largest value for which enough honest clients are expected to be farther from the mean:
    Φ(z) = (n − f − s)/(n − f) with s = ⌊n/2⌋ + 1 − f, where f of n clients are malicious. Φ(z) is
    limited to [0.5, 0.999].
    """

    @override
    def poison_updates(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        forged = true_uploads.mean(0) - self.deviations(
            context.senders, len(true_uploads)
        ) * true_uploads.std(0, correction=0)
        return forged.expand_as(true_uploads)

    def deviations(self, n: int, num_malicious: int) -> float:
        """Return the factor z on the standard deviation.

        Args:
            n: Number of clients that sent an upload.
            num_malicious: Number of malicious clients that sent an upload.
        """
        if self.config.strength is not None:
            return self.config.strength
        honest = n - num_malicious
        supporters = n // 2 + 1 - num_malicious
        share = (honest - supporters) / honest if honest > 0 else 0.5
        return NormalDist().inv_cdf(min(0.999, max(0.5, share)))


# Returns the columns of a data set, given its name and the preprocessing or None.
DataFunction = Callable[[str, Any], Columns]
# Returns the label counts of training rows, shape `[C]`.
CountsFunction = Callable[[], Tensor]
# Name of the data set that contains the test rows with the trigger.
TRIGGERED = "triggered"


@dataclass(frozen=True)
class MaliciousClients:
    """The malicious clients of a run and the attack that they perform.

    Args:
        config: The `attacks` section of the configuration.
        ids: Ids of the malicious clients.
        task: Task of the federation.
        seed: Seed of the run.
    """

    config: AttacksConfig
    ids: frozenset[str]
    task: Task
    seed: int

    @classmethod
    def from_config(
        cls, config: AttacksConfig, clients: Population, task: Task, seed: int
    ) -> MaliciousClients:
        """Select the malicious clients from the configuration.

        If `config.clients` is None, a share `config.share` of all clients is sampled.

        Args:
            config: The `attacks` section of the configuration.
            clients: All clients.
            task: Task of the federation.
            seed: Seed of the run.

        Raises:
            UserError: If a configured client does not exist.
        """
        if config.clients is not None:
            for client_id in config.clients:
                if client_id not in clients:
                    suggestion = suggest_or_list(client_id, list(clients.ids)[:1000])
                    raise UserError(f"attacks.clients: unknown client '{client_id}'{suggestion}")
            return cls(config, frozenset(config.clients), task, seed)
        count = max(1, round(config.share * len(clients)))
        label = "liars"  # style: ok (label of a random stream)
        indices = sample_numbers(len(clients), count, seed, label)
        return cls(config, frozenset(clients.ids[i] for i in indices), task, seed)

    @cached_property
    def attack(self) -> Attack:
        """Attack of the malicious clients."""
        return attack[self.config.name](self.config)

    @property
    def sorted_ids(self) -> list[str]:
        """Ids of the malicious clients in natural order."""
        return natural_order(self.ids)

    @property
    def has_trigger(self) -> bool:
        """Whether the attack can add a trigger to test rows."""
        return type(self.attack).triggered_rows is not Attack.triggered_rows

    def is_malicious(self, client_id: str, round_idx: int) -> bool:
        """Return whether a client is malicious and the attack has started.

        Args:
            client_id: Id of the client.
            round_idx: Index of the round. The first round has the index 0, whereas the setting
                `from_round` counts from 1.
        """
        return client_id in self.ids and round_idx + 1 >= self.config.from_round

    def poison_data(
        self, client_id: str, data: DataFunction, label_counts: CountsFunction, round_idx: int
    ) -> tuple[DataFunction, CountsFunction]:
        """Wrap a client's data so that malicious clients train on poisoned rows.

        All clients also receive the data set `triggered`, the global test rows with the trigger.

        Args:
            client_id: Id of the client.
            data: Function that returns the columns of the client's data sets.
            label_counts: Function that returns the label counts of the client's training rows.
            round_idx: Index of the round.

        Returns:
            Functions that replace `data` and `label_counts`.
        """
        is_poisoned = self.is_malicious(client_id, round_idx) and "data" in self.attack.acts_on
        context = AttackContext(self.task, self.seed, round_idx, [client_id])

        @cache
        def poisoned_data(name: str, preprocess: Any) -> Columns:
            if name == TRIGGERED:
                test_rows = data("common_test", preprocess)
                rows = self.attack.triggered_rows(test_rows, replace(context, malicious=[]))
                assert rows is not None, "only used if has_trigger"
                return rows
            rows = data(name, preprocess)
            is_train = name == "train"
            return self.attack.poison_rows(rows, context) if is_train and is_poisoned else rows

        def poisoned_counts() -> Tensor:
            y = poisoned_data("train", None)["y"]
            is_multiclass = self.task.kind == "multiclass"
            counts = torch.bincount(y, minlength=self.task.outputs) if is_multiclass else y.sum(0)
            return counts.to(torch.get_default_dtype())

        return poisoned_data, poisoned_counts if is_poisoned else label_counts

    def poison(
        self,
        true_uploads: Mapping[str, tuple[ClientInfo, Payload]],
        round_idx: int,
        senders: int,
        reference: ReferenceTensors,
        trained_names: TrainedNames,
    ) -> dict[str, Payload]:
        """Return the poisoned uploads of the malicious clients in a round.

        Tensors of malicious clients with the same architecture are poisoned together. Item weights
        and reports are not changed.

        Args:
            true_uploads: Malicious clients and their true uploads, keyed by client id.
            round_idx: Index of the round.
            senders: Number of clients that sent an upload, including malicious clients.
            reference: Function that returns the tensors that a client received in an item.
            trained_names: Function that returns the names of the trained parameters in an item.

        Returns:
            Poisoned uploads, keyed by client id.
        """
        poisoned = {c: dict(payload.items_by_name) for c, (_, payload) in true_uploads.items()}
        for (name, _, tensor, _), ids in self._attacked_tensors(true_uploads).items():
            items = [poisoned[client_id][name] for client_id in ids]
            infos = [true_uploads[client_id][0] for client_id in ids]
            is_buffer = bool(tensor) and tensor not in trained_names(infos[0], name)
            if is_buffer:
                continue
            context = AttackContext(self.task, self.seed, round_idx, ids, senders, name, tensor)
            is_model = items[0].kind == "params"
            received = [reference(info, name) for info in infos] if is_model else None
            block = UploadBlock([item.tensors for item in items], received)
            start = block.start(tensor)
            is_rows = items[0].kind == "rows"
            poison = self.attack.poison_predictions if is_rows else self.attack.poison_updates
            new_values = start + poison(block.stack(tensor) - start, context)
            for client_id, item, values in zip(ids, items, new_values, strict=True):
                tensors = {**item.tensors, tensor: values.to(item.tensors[tensor].dtype)}
                poisoned[client_id][name] = item.with_tensors(tensors)
        return {c: Payload(items, true_uploads[c][1].report) for c, items in poisoned.items()}

    def _attacked_tensors(
        self, true_uploads: Mapping[str, tuple[ClientInfo, Payload]]
    ) -> dict[tuple[str, str, str, tuple[int, ...]], list[str]]:
        """Return the ids of the senders of each attacked tensor.

        The keys are tuples (item, architecture, tensor name, shape).
        """
        senders: dict[tuple[str, str, str, tuple[int, ...]], list[str]] = {}
        for client_id in natural_order(true_uploads):
            client_info, payload = true_uploads[client_id]
            for name, item in payload.items_by_name.items():
                part: ActsOn = "rows" if item.kind == "rows" else "updates"
                if item.kind == "counts" or part not in self.attack.acts_on:
                    continue
                for tensor, values in item.tensors.items():
                    if values.is_floating_point():
                        arch = client_info.arch.spec_id if tensor else ""
                        key = (name, arch, tensor, tuple(values.shape))
                        senders.setdefault(key, []).append(client_id)
        return senders


def import_user_classes(aggregation: AggregationConfig, attacks: AttacksConfig | None) -> None:
    """Import the user-defined aggregation rules and attacks of a configuration.

    Names that do not start with `python:` refer to built-in classes and are ignored.

    Args:
        aggregation: The `aggregation` section of the configuration.
        attacks: The `attacks` section of the configuration. If None, no attack is imported.

    Raises:
        UserError: If a class cannot be imported or does not have the required base class, or if the
            method `combine` of a rule takes other arguments, as in earlier versions.
    """
    references: list[tuple[str, str, type]] = [
        ("aggregation.rule", aggregation.rule, Rule),
        ("aggregation.predictions", aggregation.predictions, PredictionRule),
    ]
    if attacks is not None:
        references.append(("attacks.name", attacks.name, Attack))
    for key, value, base in references:
        if value.startswith(CODE_PREFIX):
            found = import_reference(value, key, base)
            if issubclass(found, RobustRule):
                _check_combine(found, base, f"{key}: {value}")


def _check_combine(found: Any, base: Any, where: str) -> None:
    """Check that the method `combine` of a rule can be called as that of its base class."""
    arguments = list(signature(base.combine).parameters)
    try:
        signature(found.combine).bind(*arguments)
    except TypeError:
        raise UserError(f"{where}: expected a method combine({', '.join(arguments)})") from None
