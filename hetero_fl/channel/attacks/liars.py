"""The liars of a run: who they are, and what becomes of their rows and uploads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hetero_fl.architecture import Tensors
from hetero_fl.channel.attacks.base import Attack, Scene, attack
from hetero_fl.config.population import Population
from hetero_fl.config.robust import AttacksConfig
from hetero_fl.errors import UserError, nearest
from hetero_fl.payload import Item, Payload
from hetero_fl.seeding import sample
from hetero_fl.state import Card, Columns, in_order
from hetero_fl.task import Task

Data = Callable[[str, Any], Columns]  # (name, preprocessing or None) to columns
TRIGGERED = "triggered"
Reference = Callable[[Card, str], Tensors]  # what a client was sent under an item's name; {} if nothing
Trained = Callable[[Card, str], frozenset[str]]  # names of the parameters of the model that an item holds


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
                    raise UserError(f"attacks.clients: found '{id}'{nearest(id, list(clients.ids)[:1000])}")
            return cls(config, frozenset(config.clients), task, seed)
        count = max(1, round(config.share * len(clients)))
        return cls(config, frozenset(clients.ids[i] for i in sample(len(clients), count, seed, "liars")), task, seed)

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
            found = torch.bincount(y, minlength=len(counts)) if self.task.kind == "multiclass" else y.sum(0)
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
            pairs = [(item, reference(honest[id][0], name)) for id, item in zip(ids, items, strict=True)]
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
                if item.kind == "counts" or ("rows" if item.kind == "rows" else "updates") not in self.attack.acts_on:
                    continue
                whole = isinstance(item.values, dict)
                for tensor, t in item.values.items() if isinstance(item.values, dict) else [("", item.values)]:
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
    return replace(item, values={**item.values, name: forged} if isinstance(item.values, dict) else forged)
