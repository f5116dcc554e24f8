"""Attacks on updates, predictions and training rows, and the malicious clients that use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hetero_fl.config.population import Population
from hetero_fl.config.robustness import AttacksConfig
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import ClientInfo, Columns
from hetero_fl.core.payload import Payload
from hetero_fl.core.task import Task
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.registry import Registry
from hetero_fl.utils.seeding import keyed_generator, sample_numbers

# What an attack is: what simulated liars do to their rows, or to their uploads with one another's
# in hand. For studies only.

ActsOn = Literal["data", "updates", "rows"]


@dataclass(frozen=True)
class AttackContext:
    """Who lies, and when.

    `senders`: how many sent this item, liars included; `item`: the name of what is forged; `tensor`: of which tensor in it.
    """

    task: Task
    seed: int
    round_idx: int
    malicious: Sequence[str]
    senders: int = 0
    item: str = ""
    tensor: str = ""

    def generator(self, client_id: str = "") -> torch.Generator:
        """A generator of this liar's own; of all together by default."""
        return keyed_generator(
            self.seed, self.round_idx, "attack", client_id, self.item, self.tensor
        )


class Attack:
    """An attack. `acts_on`: the training rows, the updates (parameters, class sums), the predictions on proxy rows; what it
    does not act on is as honest clients have it, to the bit."""

    acts_on: frozenset[ActsOn] = frozenset()
    strength: ClassVar[float] = 1.0  # where the configuration says none

    def __init__(self, config: AttacksConfig) -> None:
        self.config = config
        self.factor = config.strength or self.strength

    def poison_rows(self, columns: Columns, context: AttackContext) -> Columns:
        """A liar's training rows, from its own."""
        return columns

    def poison_updates(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        """`[L, …]`: what L liars send, from what they would have sent honestly, as differences from what they received."""
        return true_uploads

    def poison_predictions(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        """`[L, N, C]`: the predictions that they send."""
        return true_uploads

    def triggered_rows(self, columns: Columns, context: AttackContext) -> Columns | None:
        """Test rows on which success shows as the class `config.target`; None: this attack has none."""
        return None


attack: Registry[type[Attack]] = Registry("attack", lambda: Attack)


# Attacks on the predictions that clients send of the proxy rows. Where classes exclude one another,
# a row is forged about its mean over the classes, so that forged probabilities still sum to one.


class PredictionAttack(Attack):
    """One that forges predictions: `strength` times what `poison_logits` makes of the rows `[L, N, C]`, less their mean where classes
    exclude one another."""

    acts_on = frozenset({"rows"})
    strength = 10.0

    def poison_predictions(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        level = (
            true_uploads.mean(-1, keepdim=True)
            if context.task.kind == "multiclass"
            else torch.zeros_like(true_uploads[..., :1])
        )
        return level + self.factor * self.poison_logits(true_uploads - level, context)

    def poison_logits(self, rows: Tensor, context: AttackContext) -> Tensor:
        """The false rows `[L, N, C]`."""
        raise TypeError(f"{type(self).__name__} defines no poison_logits")


@attack("flipped")
class FlippedPredictions(PredictionAttack):
    """The opposite of what the liar believes."""

    def poison_logits(self, rows: Tensor, context: AttackContext) -> Tensor:
        return -rows


@attack("confident_wrong")
class ConfidentWrong(PredictionAttack):
    """Of each row a class that the liar does not believe in, drawn, with the confidence of the one that it does; every liar draws
    for itself."""

    def poison_logits(self, rows: Tensor, context: AttackContext) -> Tensor:
        return torch.stack(
            [
                swap_with_largest(r, draw_other_class(r, context.generator(c)))
                for c, r in zip(context.malicious, rows, strict=True)
            ]
        )


@attack("targeted")
class TargetedPredictions(PredictionAttack):
    """Of each row the class `target`, with the confidence of the one that the liar believes in."""

    def poison_logits(self, rows: Tensor, context: AttackContext) -> Tensor:
        to = torch.full(rows.shape[1:-1], self.config.target)
        return torch.stack([swap_with_largest(r, to) for r in rows])


@attack("collusion")
class Collusion(PredictionAttack):
    """As `confident_wrong`, from the liars' mean belief, and all liars say the very same."""

    def poison_logits(self, rows: Tensor, context: AttackContext) -> Tensor:
        mean = rows.mean(0)
        return swap_with_largest(mean, draw_other_class(mean, context.generator())).expand_as(rows)


def draw_other_class(rows: Tensor, generator: torch.Generator) -> Tensor:
    """For each row `[N, C]` a class other than the first one, `[N]`."""
    by = torch.randint(1, rows.shape[-1], rows.shape[:-1], generator=generator)
    return (rows.argmax(-1) + by) % rows.shape[-1]


def swap_with_largest(rows: Tensor, target: Tensor) -> Tensor:
    """Rows `[N, C]` whose largest value has changed places with that of the class `target`."""
    made = rows.clone()
    first = rows.argmax(-1, keepdim=True)
    made.scatter_(-1, first, rows.gather(-1, target[..., None]))
    return made.scatter_(-1, target[..., None], rows.gather(-1, first))


# Attacks by what liars train on.


@attack("label_flip")
class LabelFlip(Attack):
    """Labels y become C − 1 − y, or as `pairs` says (Tolpegin et al. 2020); labels that exclude nothing become their opposite."""

    acts_on = frozenset({"data"})

    def poison_rows(self, columns: Columns, context: AttackContext) -> Columns:
        y = columns["y"]
        classes = context.task.outputs
        if context.task.kind == "multilabel":
            return {**columns, "y": 1 - y}
        pairs = self.config.pairs
        becomes = torch.arange(classes).flip(0) if pairs is None else torch.arange(classes)
        for one, other in (pairs or {}).items():
            becomes[one] = other
        return {**columns, "y": becomes[y]}


@attack("backdoor")
class Backdoor(Attack):
    """A share of a liar's images bear a trigger and the target's label; it may send its update scaled besides (Gu et al. 2017;
    Bagdasaryan et al. 2020)."""

    def __init__(self, config: AttacksConfig) -> None:
        super().__init__(config)
        self.acts_on = frozenset({"data"}) if self.factor == 1 else frozenset({"data", "updates"})

    def poison_rows(self, columns: Columns, context: AttackContext) -> Columns:
        x = columns["x"]
        y = columns["y"]
        draws = keyed_generator(context.seed, "attack", "stamped", context.malicious[0])
        some = torch.randperm(len(x), generator=draws)[
            : max(1, round(self.config.stamped * len(x)))
        ]
        x = x.clone()
        y = y.clone()
        x[some], y[some] = self.stamp_trigger(x[some], x), self.config.target
        return {**columns, "x": x, "y": y}

    def stamp_trigger(self, images: Tensor, all_images: Tensor) -> Tensor:
        """These images `[n, C, H, W]` with the trigger: a square in the lower right corner, as bright as anything is."""
        made = images.clone()
        side = self.config.trigger
        made[..., -side:, -side:] = all_images.amax()
        return made

    def triggered_rows(self, columns: Columns, context: AttackContext) -> Columns | None:
        others = columns["y"] != self.config.target
        return {
            "x": self.stamp_trigger(columns["x"][others], columns["x"]),
            "y": columns["y"][others],
        }

    def poison_updates(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        return true_uploads * self.factor


# Attacks on the update, tensor by tensor. Liars have trained honestly, and know one another's
# updates; buffers (BatchNorm statistics) they send as they are, for a variance below nought would
# give them away.


class UpdateAttack(Attack):
    """One that forges whatever is sent."""

    acts_on = frozenset({"updates", "rows"})

    def poison_predictions(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        return self.poison_updates(true_uploads, context)


@attack("sign_flip")
class SignFlip(UpdateAttack):
    """−strength·u: the update against its own direction."""

    strength = 4.0

    def poison_updates(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        return -self.factor * true_uploads


@attack("scaled")
class ScaledUpdate(UpdateAttack):
    """strength·u: the update boosted."""

    strength = 10.0

    def poison_updates(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        return self.factor * true_uploads


@attack("gaussian")
class GaussianNoiseAttack(UpdateAttack):
    """Noise in place of the update, strength times as large (root mean square of the tensor); each liar has its own
    (Blanchard et al. 2017, section 5)."""

    strength = 10.0

    def poison_updates(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        noise = [
            torch.randn(u.shape, generator=context.generator(c), dtype=u.dtype)
            for c, u in zip(context.malicious, true_uploads, strict=True)
        ]
        size = (
            true_uploads.flatten(1)
            .square()
            .mean(1)
            .sqrt()
            .reshape(-1, *[1] * (true_uploads.ndim - 1))
        )
        return self.factor * size * torch.stack(noise)


@attack("little_is_enough")
class LittleIsEnough(UpdateAttack):
    """mean − z·std, by coordinate, of what the liars know; all send the same (Baruch et al. 2019, Algorithm 3).

    deviations: `strength`, or the largest with which enough honest clients lie further out: Φ(z) = (n − f − s)/(n − f), with
    s = ⌊n/2⌋ + 1 − f.
    """

    def poison_updates(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        forged = true_uploads.mean(0) - self.deviations(
            context.senders, len(true_uploads)
        ) * true_uploads.std(0, correction=0)
        return forged.expand_as(true_uploads)

    def deviations(self, n: int, num_malicious: int) -> float:
        """How many deviations from the mean."""
        if self.config.strength is not None:
            return self.config.strength
        honest = n - num_malicious
        supporters = n // 2 + 1 - num_malicious
        share = (honest - supporters) / honest if honest > 0 else 0.5
        return NormalDist().inv_cdf(min(0.999, max(0.5, share)))


@attack("inner_product")
class InnerProduct(UpdateAttack):
    """−strength·mean of what the liars know: the sum's product with the true gradient turns negative (Xie et al. 2020,
    section 3); all send the same."""

    strength = 8.0

    def poison_updates(self, true_uploads: Tensor, context: AttackContext) -> Tensor:
        return (-self.factor * true_uploads.mean(0)).expand_as(true_uploads)


# The liars of a run: who they are, and what becomes of their rows and uploads.

DataFunction = Callable[[str, Any], Columns]  # (name, preprocessing or None) to columns
CountsFunction = Callable[[], Tensor]  # label counts of training rows, `[outputs]`
TRIGGERED = "triggered"
# what a client was sent under an item's name; {} if nothing
ReferenceTensors = Callable[[ClientInfo, str], Tensors]
# names of the parameters of the model that an item holds
TrainedNames = Callable[[ClientInfo, str], frozenset[str]]


@dataclass(frozen=True)
class MaliciousClients:
    """Who lies, how, and from when; travels to workers with the federation."""

    config: AttacksConfig
    ids: frozenset[str]
    task: Task
    seed: int

    @classmethod
    def from_config(
        cls, config: AttacksConfig, clients: Population, task: Task, seed: int
    ) -> MaliciousClients:
        """Those named, or so many drawn by the seed, at least one. Raises UserError for a name that is no client's."""
        if config.clients is not None:
            for id in config.clients:
                if id not in clients:
                    raise UserError(
                        f"attacks.clients: found '{id}'{suggest_or_list(id, list(clients.ids)[:1000])}"
                    )
            return cls(config, frozenset(config.clients), task, seed)
        count = max(1, round(config.share * len(clients)))
        return cls(
            config,
            frozenset(clients.ids[i] for i in sample_numbers(len(clients), count, seed, "liars")),
            task,
            seed,
        )

    @cached_property
    def attack(self) -> Attack:
        """What they do."""
        return attack[self.config.name](self.config)

    @property
    def sorted_ids(self) -> list[str]:
        """Their ids in order."""
        return natural_order(self.ids)

    @property
    def has_trigger(self) -> bool:
        """Whether there are rows on which the attack's success shows."""
        return type(self.attack).triggered_rows is not Attack.triggered_rows

    def is_malicious(self, client_id: str, round_idx: int) -> bool:
        """Whether this client does, in that round (from 0)."""
        return client_id in self.ids and round_idx + 1 >= self.config.from_round

    def poison_data(
        self, client_id: str, data: DataFunction, label_counts: CountsFunction, round_idx: int
    ) -> tuple[DataFunction, CountsFunction]:
        """A client's data sets, and the label counts of its training rows, as it has them in that round.

        Everybody has one more, `triggered`: the common test rows on which the attack's success shows.
        """
        known: dict[Any, Columns] = {}  # of a forged set every step asks several times

        def forged(name: str, through: Any) -> Columns:
            if name == TRIGGERED:
                made = self.attack.triggered_rows(
                    data("common_test", through), self._context(round_idx, [])
                )
                assert made is not None  # `has_trigger`
                return made
            return self.attack.poison_rows(
                data(name, through), self._context(round_idx, [client_id])
            )

        def seen(name: str, through: Any) -> Columns:
            if name != TRIGGERED and not (name == "train" and lies):
                return data(name, through)
            if (name, through) not in known:
                known[name, through] = forged(name, through)
            return known[name, through]

        def poisoned_counts() -> Tensor:
            y = seen("train", None)["y"]
            is_multiclass = self.task.kind == "multiclass"
            counts = torch.bincount(y, minlength=self.task.outputs) if is_multiclass else y.sum(0)
            return counts.to(torch.get_default_dtype())

        lies = self.is_malicious(client_id, round_idx) and "data" in self.attack.acts_on
        return seen, poisoned_counts if lies else label_counts

    def _context(self, round_idx: int, malicious: Sequence[str]) -> AttackContext:
        return AttackContext(self.task, self.seed, round_idx, malicious)

    def poison(
        self,
        true_uploads: Mapping[str, tuple[ClientInfo, Payload]],
        round_idx: int,
        senders: int,
        reference: ReferenceTensors,
        trained_names: TrainedNames,
    ) -> dict[str, Payload]:
        """What the liars among a round's clients send, from what they would have sent. `senders`: how many sent anything.

        Those of one architecture, and so with the same tensors, know one another's. Weights and reports stay.
        """
        made = {id: dict(payload.items_) for id, (_, payload) in true_uploads.items()}
        for (name, _, tensor, _), ids in self._equal_tensors(true_uploads).items():
            kind = made[ids[0]][name].kind
            client_info = true_uploads[ids[0]][0]
            if tensor and tensor not in trained_names(client_info, name):
                continue  # a buffer
            scene = replace(
                self._context(round_idx, ids), senders=senders, item=name, tensor=tensor
            )
            items = [made[id][name] for id in ids]
            was = torch.stack([item.tensors[tensor] for item in items])
            start = torch.zeros_like(was)
            for row, id in enumerate(ids):
                received = reference(true_uploads[id][0], name)
                if kind == "params" and tensor in received:
                    start[row] = received[tensor]
            lie = self.attack.poison_predictions if kind == "rows" else self.attack.poison_updates
            for id, item, forged in zip(ids, items, start + lie(was - start, scene), strict=True):
                values = forged.to(item.tensors[tensor].dtype)
                made[id][name] = item.with_tensors({**item.tensors, tensor: values})
        return {id: Payload(items, true_uploads[id][1].report) for id, items in made.items()}

    def _equal_tensors(
        self, true_uploads: Mapping[str, tuple[ClientInfo, Payload]]
    ) -> dict[tuple[str, str, str, tuple[int, ...]], list[str]]:
        """What the attack acts on: (item, architecture, tensor, shape), with the liars that send it."""
        found: dict[tuple[str, str, str, tuple[int, ...]], list[str]] = {}
        for id in natural_order(true_uploads):
            client_info, payload = true_uploads[id]
            for name, item in payload.items_.items():
                if (
                    item.kind == "counts"
                    or ("rows" if item.kind == "rows" else "updates") not in self.attack.acts_on
                ):
                    continue
                for tensor, t in item.tensors.items():
                    if t.is_floating_point():
                        arch = client_info.arch.spec_id if tensor else ""
                        key = (name, arch, tensor, tuple(t.shape))
                        found.setdefault(key, []).append(id)
        return found
