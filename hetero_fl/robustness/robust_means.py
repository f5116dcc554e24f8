"""Where a rule stands in for the mean: the same questions as `ItemSum` and `OwnerMeans` answer, from uploads that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hetero_fl.config.robustness import AggregationConfig
from hetero_fl.core.model_spec import Owner, Tensors, owners_of
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Item, ItemSpec
from hetero_fl.core.task import Task
from hetero_fl.robustness.rules import Rule, UploadBlock, prediction_rule, rule, trimmed_mean

PARAMETERS = ("params", "update")
# what a client was sent under an item's name; {} if nothing
ReferenceTensors = Callable[[ClientInfo, str], Tensors]
# names of the parameters of the model that an item holds
TrainedNames = Callable[[ClientInfo, str], frozenset[str]]


@dataclass
class AggregationRules:
    """The rules of a run, and what they remember from round to round (`memory`, part of a checkpoint).

    `too_few`: for each item the tensors, or "", that stayed as they were because fewer clients sent them than the rule needs to
    bear its liars.
    """

    config: AggregationConfig
    task: Task
    reference: ReferenceTensors = lambda client_info, item: {}
    trained: TrainedNames = lambda client_info, item: client_info.arch.parameter_names
    memory: dict[str, Any] = field(default_factory=dict)
    too_few: dict[str, list[str]] = field(default_factory=dict)

    @property
    def of_parameters(self) -> Rule:
        """The rule for parameters."""
        return rule[self.config.rule](self.config)

    def applies_to(self, spec: ItemSpec) -> bool:
        """Whether items of that kind are combined by another rule than the mean."""
        config = self.config
        by = {"rows": config.predictions, "class_sums": config.statistics, "counts": "mean"}
        return by.get(spec.kind, config.rule) != "mean"


class RobustModelMeans:
    """Named tensors under a rule, owner by owner as `OwnerMeans` has them. The tensors of a group that the very same clients
    sent are one block: whoever measures distances measures them over all of it.

    `senders`: who sent them, in the order in which they are added.
    """

    def __init__(
        self,
        name: str,
        rules: AggregationRules,
        senders: Sequence[ClientInfo],
        common: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.rules = rules
        self.senders = senders
        self.common = tuple(common)
        self.roots: Mapping[str, Tensors] = {}
        self._sent: list[tuple[str, Tensors, Tensors]] = []
        self._results: dict[Owner, tuple[Tensor, int]] | None = None

    def add(self, group: str, tensors: Mapping[str, Tensor], weight: float) -> None:
        """One more model, or part of one. Its weight is of no account."""
        client_info = self.senders[len(self._sent)]
        reference = (
            self.rules.reference(client_info, self.name)
            if self.rules.of_parameters.uses_reference
            else {}
        )
        self._sent.append((group, dict(tensors), reference))

    @property
    def sent(self) -> list[tuple[ClientInfo, Tensors]]:
        """What every client sent."""
        return [
            (client_info, tensors)
            for client_info, (_, tensors, _) in zip(self.senders, self._sent, strict=True)
        ]

    def by_group(self) -> dict[str, Tensors]:
        """For each group what the rule makes of the tensors that its members sent; what too few sent is left out."""
        return {
            group: {name: mean for name, (mean, _) in named.items()}
            for group, named in self._results_by_group().items()
        }

    def weights_by_group(self) -> dict[str, dict[str, float]]:
        """How many sent each of these tensors."""
        return {
            group: {name: float(count) for name, count in named.items()}
            for group, named in self.counts_by_group().items()
        }

    def counts_by_group(self) -> dict[str, dict[str, int]]:
        """Return how many clients sent each of these tensors."""
        return {
            group: {name: count for name, (_, count) in named.items()}
            for group, named in self._results_by_group().items()
        }

    def _results_by_group(self) -> dict[str, dict[str, tuple[Tensor, int]]]:
        """Return the combined tensors of each group, with how many clients sent them."""
        combined = self._combined()
        results: dict[str, dict[str, tuple[Tensor, int]]] = {}
        for group, tensors, _ in self._sent:
            named = results.setdefault(group, {})
            for name, owner in owners_of(tensors, group, self.common).items():
                if owner in combined:
                    named[name] = combined[owner]
        return results

    def _combined(self) -> dict[Owner, tuple[Tensor, int]]:
        if self._results is None:
            self._results = {}
            for (_, members), owners in self.blocks().items():
                self._combine(members, owners)
        return self._results

    def blocks(self) -> dict[tuple[str, tuple[int, ...]], list[Owner]]:
        """The owners that the same clients (by place) stand behind, by group."""
        members: dict[Owner, list[int]] = {}
        for place, (group, tensors, _) in enumerate(self._sent):
            for owner in owners_of(tensors, group, self.common).values():
                members.setdefault(owner, []).append(place)
        found: dict[tuple[str, tuple[int, ...]], list[Owner]] = {}
        for owner, places in members.items():
            found.setdefault((owner[2], tuple(places)), []).append(owner)
        return found

    def _combine(self, members: Sequence[int], owners: Sequence[Owner]) -> None:
        assert self._results is not None
        how = self.rules.of_parameters
        names = [owner[0] for owner in owners]
        num_malicious = self.rules.config.num_malicious(len(members))
        if len(members) < how.min_clients(num_malicious):
            self.rules.too_few.setdefault(self.name, []).extend(names)
            return
        sent = [{name: self._sent[i][1][name] for name in names} for i in members]
        references = [self._sent[i][2] for i in members]
        trained = self.rules.trained(self.senders[members[0]], self.name)
        root = self.roots.get(self._sent[members[0]][0])
        combined = how.combine(UploadBlock(sent, references, trained, root), num_malicious)
        self._results.update({owner: (combined[owner[0]], len(members)) for owner in owners})


class RobustItemMeans:
    """Single tensors under a rule: predictions `[N, C]`, or class sums. Weights are of no account, but that of a class sum says
    what it is to be divided by, and whether the client has the class."""

    def __init__(self, name: str, rules: AggregationRules, senders: Sequence[ClientInfo]) -> None:
        self.name = name
        self.rules = rules
        self.senders = senders
        self._items: list[Item] = []
        self._results: tuple[Tensor, Tensor] | None = None

    def add(self, item: Item) -> None:
        """One more client's."""
        self._items.append(item)
        self._results = None

    @property
    def mean(self) -> Tensor | None:
        """What the rule makes of them; None where too few sent any."""
        made = self._combined()
        return None if made is None else made[0]

    @property
    def total(self) -> tuple[Tensor, Tensor]:
        """(mean times weight, weight): how many had a say, by class for class sums."""
        made = self._combined()
        if made is None:
            values = self._items[0].values
            assert isinstance(values, Tensor)
            return torch.zeros_like(values), torch.zeros_like(
                torch.as_tensor(self._items[0].weight, dtype=values.dtype)
            )
        return made[0] * made[1], made[1]

    def _combined(self) -> tuple[Tensor, Tensor] | None:
        if self._results is None:
            self._results = (
                self._class_means() if self._items[0].kind == "class_sums" else self._predictions()
            )
        return self._results

    def _class_means(self) -> tuple[Tensor, Tensor]:
        """The median of the means of the clients that have a class; none where liars could be more than half of these."""
        values = torch.stack(
            [item.values for item in self._items if isinstance(item.values, Tensor)]
        )
        counts = torch.stack(
            [torch.as_tensor(item.weight, dtype=values.dtype) for item in self._items]
        )
        num_malicious = self.rules.config.num_malicious(len(values))
        made = torch.zeros_like(values[0])
        owners = (counts > 0).sum(0).to(values.dtype)
        for c in range(len(made)):
            has = (counts[:, c] > 0).reshape(len(values), -1).all(1)
            if int(has.sum()) > 2 * num_malicious:
                made[c] = trimmed_mean(values[has, c] / counts[has, c])
            else:
                owners[c] = 0
                self.rules.too_few.setdefault(self.name, []).append(f"class {c}")
        return made, owners

    def _predictions(self) -> tuple[Tensor, Tensor] | None:
        how = prediction_rule[self.rules.config.predictions](self.rules.config)
        said = torch.stack([item.values for item in self._items if isinstance(item.values, Tensor)])
        # sums and squares of the largest numbers that can be sent stay finite
        dtype = said.dtype
        said = said.double()
        num_malicious = self.rules.config.num_malicious(len(said))
        if len(said) < how.min_clients(num_malicious):
            self.rules.too_few.setdefault(self.name, []).append("")
            return None
        apart = self.rules.task.kind == "multiclass" and said.shape[-1] == self.rules.task.outputs
        level = said.mean(-1, keepdim=True) if apart else torch.zeros_like(said[..., :1])
        memory = self.rules.memory.setdefault(self.name, {})
        made = how.combine(
            said - level,
            num_malicious,
            [client_info.client_id for client_info in self.senders],
            memory,
        )
        if apart:  # as a row of probabilities sums to one again
            made = made - made.mean(-1, keepdim=True) + trimmed_mean(level)
        return made.to(dtype), torch.tensor(float(len(said)), dtype=dtype)
