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
from hetero_fl.core.participant import Card, Columns
from hetero_fl.core.payload import Item, Payload
from hetero_fl.core.task import Task
from hetero_fl.utils.errors import UserError, nearest
from hetero_fl.utils.ordering import in_order
from hetero_fl.utils.registry import Registry
from hetero_fl.utils.seeding import generator, sample

# What an attack is: what simulated liars do to their rows, or to their uploads with one another's
# in hand. For studies only.

ActsOn = Literal["data", "updates", "rows"]


@dataclass(frozen=True)
class Scene:
    """Who lies, and when.

    `senders`: how many sent this item, liars included; `item`: the name of what is forged; `tensor`: of which tensor in it.
    """

    task: Task
    seed: int
    round: int
    liars: Sequence[str]
    senders: int = 0
    item: str = ""
    tensor: str = ""

    def draws(self, liar: str = "") -> torch.Generator:
        """A generator of this liar's own; of all together by default."""
        return generator(self.seed, self.round, "attack", liar, self.item, self.tensor)


class Attack:
    """An attack. `acts_on`: the training rows, the updates (parameters, class sums), the predictions on proxy rows; what it
    does not act on is as honest clients have it, to the bit."""

    acts_on: frozenset[ActsOn] = frozenset()
    strength: ClassVar[float] = 1.0  # where the configuration says none

    def __init__(self, config: AttacksConfig) -> None:
        self.config = config
        self.factor = config.strength or self.strength

    def rows_of(self, columns: Columns, scene: Scene) -> Columns:
        """A liar's training rows, from its own."""
        return columns

    def updates(self, honest: Tensor, scene: Scene) -> Tensor:
        """`[L, …]`: what L liars send, from what they would have sent honestly, as differences from what they received."""
        return honest

    def said(self, honest: Tensor, scene: Scene) -> Tensor:
        """`[L, N, C]`: the predictions that they send."""
        return honest

    def triggered(self, columns: Columns, scene: Scene) -> Columns | None:
        """Test rows on which success shows as the class `config.target`; None: this attack has none."""
        return None


attack: Registry[type[Attack]] = Registry("attack", lambda: Attack)


# Attacks on the predictions that clients send of the proxy rows. Where classes exclude one another,
# a row is forged about its mean over the classes, so that forged probabilities still sum to one.


class OnPredictions(Attack):
    """One that forges predictions: `strength` times what `lie` makes of the rows `[L, N, C]`, less their mean where classes
    exclude one another."""

    acts_on = frozenset({"rows"})
    strength = 10.0

    def said(self, honest: Tensor, scene: Scene) -> Tensor:
        level = (
            honest.mean(-1, keepdim=True)
            if scene.task.kind == "multiclass"
            else torch.zeros_like(honest[..., :1])
        )
        return level + self.factor * self.lie(honest - level, scene)

    def lie(self, rows: Tensor, scene: Scene) -> Tensor:
        """The false rows `[L, N, C]`."""
        raise TypeError(f"{type(self).__name__} defines no lie")


@attack("flipped")
class Flipped(OnPredictions):
    """The opposite of what the liar believes."""

    def lie(self, rows: Tensor, scene: Scene) -> Tensor:
        return -rows


@attack("confident_wrong")
class ConfidentWrong(OnPredictions):
    """Of each row a class that the liar does not believe in, drawn, with the confidence of the one that it does; every liar draws
    for itself."""

    def lie(self, rows: Tensor, scene: Scene) -> Tensor:
        return torch.stack(
            [swapped(r, other(r, scene.draws(c))) for c, r in zip(scene.liars, rows, strict=True)]
        )


@attack("targeted")
class Targeted(OnPredictions):
    """Of each row the class `target`, with the confidence of the one that the liar believes in."""

    def lie(self, rows: Tensor, scene: Scene) -> Tensor:
        to = torch.full(rows.shape[1:-1], self.config.target)
        return torch.stack([swapped(r, to) for r in rows])


@attack("collusion")
class Collusion(OnPredictions):
    """As `confident_wrong`, from the liars' mean belief, and all liars say the very same."""

    def lie(self, rows: Tensor, scene: Scene) -> Tensor:
        mean = rows.mean(0)
        return swapped(mean, other(mean, scene.draws())).expand_as(rows)


def other(rows: Tensor, draws: torch.Generator) -> Tensor:
    """For each row `[N, C]` a class other than the first one, `[N]`."""
    by = torch.randint(1, rows.shape[-1], rows.shape[:-1], generator=draws)
    return (rows.argmax(-1) + by) % rows.shape[-1]


def swapped(rows: Tensor, to: Tensor) -> Tensor:
    """Rows `[N, C]` whose largest value has changed places with that of the class `to`."""
    made, first = rows.clone(), rows.argmax(-1, keepdim=True)
    made.scatter_(-1, first, rows.gather(-1, to[..., None]))
    return made.scatter_(-1, to[..., None], rows.gather(-1, first))


# Attacks by what liars train on.


@attack("label_flip")
class LabelFlip(Attack):
    """Labels y become C − 1 − y, or as `pairs` says (Tolpegin et al. 2020); labels that exclude nothing become their opposite."""

    acts_on = frozenset({"data"})

    def rows_of(self, columns: Columns, scene: Scene) -> Columns:
        y, classes = columns["y"], scene.task.outputs
        if scene.task.kind == "multilabel":
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

    def rows_of(self, columns: Columns, scene: Scene) -> Columns:
        x, y = columns["x"], columns["y"]
        draws = generator(scene.seed, "attack", "stamped", scene.liars[0])
        some = torch.randperm(len(x), generator=draws)[
            : max(1, round(self.config.stamped * len(x)))
        ]
        x, y = x.clone(), y.clone()
        x[some], y[some] = self.stamp(x[some], x), self.config.target
        return {**columns, "x": x, "y": y}

    def stamp(self, some: Tensor, all_: Tensor) -> Tensor:
        """These images `[n, C, H, W]` with the trigger: a square in the lower right corner, as bright as anything is."""
        made, side = some.clone(), self.config.trigger
        made[..., -side:, -side:] = all_.amax()
        return made

    def triggered(self, columns: Columns, scene: Scene) -> Columns | None:
        others = columns["y"] != self.config.target
        return {"x": self.stamp(columns["x"][others], columns["x"]), "y": columns["y"][others]}

    def updates(self, honest: Tensor, scene: Scene) -> Tensor:
        return honest * self.factor


# Attacks on the update, tensor by tensor. Liars have trained honestly, and know one another's
# updates; buffers (BatchNorm statistics) they send as they are, for a variance below nought would
# give them away.


class OnUpdates(Attack):
    """One that forges whatever is sent."""

    acts_on = frozenset({"updates", "rows"})

    def said(self, honest: Tensor, scene: Scene) -> Tensor:
        return self.updates(honest, scene)


@attack("sign_flip")
class SignFlip(OnUpdates):
    """−strength·u: the update against its own direction."""

    strength = 4.0

    def updates(self, honest: Tensor, scene: Scene) -> Tensor:
        return -self.factor * honest


@attack("scaled")
class Scaled(OnUpdates):
    """strength·u: the update boosted."""

    strength = 10.0

    def updates(self, honest: Tensor, scene: Scene) -> Tensor:
        return self.factor * honest


@attack("gaussian")
class Gaussian(OnUpdates):
    """Noise in place of the update, strength times as large (root mean square of the tensor); each liar has its own
    (Blanchard et al. 2017, section 5)."""

    strength = 10.0

    def updates(self, honest: Tensor, scene: Scene) -> Tensor:
        noise = [
            torch.randn(u.shape, generator=scene.draws(c), dtype=u.dtype)
            for c, u in zip(scene.liars, honest, strict=True)
        ]
        size = honest.flatten(1).square().mean(1).sqrt().reshape(-1, *[1] * (honest.ndim - 1))
        return self.factor * size * torch.stack(noise)


@attack("little_is_enough")
class LittleIsEnough(OnUpdates):
    """mean − z·std, by coordinate, of what the liars know; all send the same (Baruch et al. 2019, Algorithm 3).

    z: `strength`, or the largest with which enough honest clients lie further out: Φ(z) = (n − f − s)/(n − f), with
    s = ⌊n/2⌋ + 1 − f.
    """

    def updates(self, honest: Tensor, scene: Scene) -> Tensor:
        forged = honest.mean(0) - self.z(scene.senders, len(honest)) * honest.std(0, correction=0)
        return forged.expand_as(honest)

    def z(self, n: int, liars: int) -> float:
        """How many deviations from the mean."""
        if self.config.strength is not None:
            return self.config.strength
        honest, supporters = n - liars, n // 2 + 1 - liars
        share = (honest - supporters) / honest if honest > 0 else 0.5
        return NormalDist().inv_cdf(min(0.999, max(0.5, share)))


@attack("inner_product")
class InnerProduct(OnUpdates):
    """−strength·mean of what the liars know: the sum's product with the true gradient turns negative (Xie et al. 2020,
    section 3); all send the same."""

    strength = 8.0

    def updates(self, honest: Tensor, scene: Scene) -> Tensor:
        return (-self.factor * honest.mean(0)).expand_as(honest)


# The liars of a run: who they are, and what becomes of their rows and uploads.

Data = Callable[[str, Any], Columns]  # (name, preprocessing or None) to columns
TRIGGERED = "triggered"
# what a client was sent under an item's name; {} if nothing
Reference = Callable[[Card, str], Tensors]
# names of the parameters of the model that an item holds
Trained = Callable[[Card, str], frozenset[str]]


@dataclass(frozen=True)
class Liars:
    """Who lies, how, and from when; travels to workers with the federation."""

    config: AttacksConfig
    ids: frozenset[str]
    task: Task
    seed: int

    @classmethod
    def of(cls, config: AttacksConfig, clients: Population, task: Task, seed: int) -> Liars:
        """Those named, or so many drawn by the seed, at least one. Raises UserError for a name that is no client's."""
        if config.clients is not None:
            for id in config.clients:
                if id not in clients:
                    raise UserError(
                        f"attacks.clients: found '{id}'{nearest(id, list(clients.ids)[:1000])}"
                    )
            return cls(config, frozenset(config.clients), task, seed)
        count = max(1, round(config.share * len(clients)))
        return cls(
            config,
            frozenset(clients.ids[i] for i in sample(len(clients), count, seed, "liars")),
            task,
            seed,
        )

    @cached_property
    def attack(self) -> Attack:
        """What they do."""
        return attack[self.config.name](self.config)

    @property
    def listed(self) -> list[str]:
        """Their ids in order."""
        return in_order(self.ids)

    @property
    def has_trigger(self) -> bool:
        """Whether there are rows on which the attack's success shows."""
        return type(self.attack).triggered is not Attack.triggered

    def lie(self, id: str, round: int) -> bool:
        """Whether this client does, in that round (from 0)."""
        return id in self.ids and round + 1 >= self.config.from_round

    def seen(self, id: str, data: Data, counts: Tensor, round: int) -> tuple[Data, Tensor]:
        """A client's data sets, and the label counts of its training rows, as it has them in that round.

        Everybody has one more, `triggered`: the common test rows on which the attack's success shows.
        """
        known: dict[Any, Columns] = {}  # of a forged set every step asks several times

        def forged(name: str, through: Any) -> Columns:
            if name == TRIGGERED:
                made = self.attack.triggered(data("common_test", through), self._scene(round, []))
                assert made is not None  # `has_trigger`
                return made
            return self.attack.rows_of(data(name, through), self._scene(round, [id]))

        def seen(name: str, through: Any) -> Columns:
            if name != TRIGGERED and not (name == "train" and lies):
                return data(name, through)
            if (name, through) not in known:
                known[name, through] = forged(name, through)
            return known[name, through]

        lies = self.lie(id, round) and "data" in self.attack.acts_on
        if lies:
            y = seen("train", None)["y"]
            found = (
                torch.bincount(y, minlength=len(counts))
                if self.task.kind == "multiclass"
                else y.sum(0)
            )
            counts = found.to(counts.dtype)
        return seen, counts

    def _scene(self, round: int, liars: Sequence[str]) -> Scene:
        return Scene(self.task, self.seed, round, liars)

    def forge(
        self,
        honest: Mapping[str, tuple[Card, Payload]],
        round: int,
        senders: int,
        reference: Reference,
        trained: Trained,
    ) -> dict[str, Payload]:
        """What the liars among a round's clients send, from what they would have sent. `senders`: how many sent anything.

        Those of one architecture, and so with the same tensors, know one another's. Weights and reports stay.
        """
        made = {id: dict(payload.items_) for id, (_, payload) in honest.items()}
        for (name, _, tensor, _), ids in self._alike(honest).items():
            kind, card = made[ids[0]][name].kind, honest[ids[0]][0]
            if tensor and tensor not in trained(card, name):
                continue  # a buffer
            scene = replace(self._scene(round, ids), senders=senders, item=name, tensor=tensor)
            items = [made[id][name] for id in ids]
            was = torch.stack([_tensor(item, tensor) for item in items])
            pairs = [
                (item, reference(honest[id][0], name)) for id, item in zip(ids, items, strict=True)
            ]
            start = torch.stack([_start(item, tensor, received) for item, received in pairs])
            lie = self.attack.said if kind == "rows" else self.attack.updates
            for id, item, forged in zip(ids, items, start + lie(was - start, scene), strict=True):
                made[id][name] = _with(item, tensor, forged)
        return {id: Payload(items, honest[id][1].report) for id, items in made.items()}

    def _alike(
        self, honest: Mapping[str, tuple[Card, Payload]]
    ) -> dict[tuple[str, str, str, tuple[int, ...]], list[str]]:
        """What the attack acts on: (item, architecture, tensor, shape), with the liars that send it."""
        found: dict[tuple[str, str, str, tuple[int, ...]], list[str]] = {}
        for id in in_order(honest):
            card, payload = honest[id]
            for name, item in payload.items_.items():
                if (
                    item.kind == "counts"
                    or ("rows" if item.kind == "rows" else "updates") not in self.attack.acts_on
                ):
                    continue
                whole = isinstance(item.values, dict)
                for tensor, t in (
                    item.values.items() if isinstance(item.values, dict) else [("", item.values)]
                ):
                    if t.is_floating_point():
                        key = (name, card.arch.id if whole else "", tensor, tuple(t.shape))
                        found.setdefault(key, []).append(id)
        return found


def _tensor(item: Item, name: str) -> Tensor:
    return item.values[name] if isinstance(item.values, dict) else item.values


def _start(item: Item, name: str, reference: Tensors) -> Tensor:
    own = _tensor(item, name)
    return reference[name] if item.kind == "params" and name in reference else torch.zeros_like(own)


def _with(item: Item, name: str, forged: Tensor) -> Item:
    forged = forged.to(_tensor(item, name).dtype)
    return replace(
        item, values={**item.values, name: forged} if isinstance(item.values, dict) else forged
    )
