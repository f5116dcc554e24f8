"""Robust aggregation of uploads in place of the means in `hetero_fl.aggregation.means`.

Unlike a mean, a robust rule needs all uploads at once, so the classes in this module store the
uploads of a round. An upload consists of named items (`Item`), such as parameters or predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hetero_fl.config.robustness import AggregationConfig
from hetero_fl.core.model_spec import Owner, Tensors, owners_of
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Item, ItemSpec
from hetero_fl.core.task import Task
from hetero_fl.robustness.rules import Rule, UploadBlock, prediction_rule, rule, trimmed_mean

PARAMETERS = ("params", "update")
# Returns the tensors that a client received in the named item, or {} if there are none.
ReferenceTensors = Callable[[ClientInfo, str], Tensors]
# Returns the names of the parameters of the model in an item.
TrainedNames = Callable[[ClientInfo, str], frozenset[str]]


@dataclass
class AggregationRules:
    """Aggregation rules of a run and the state of the rules.

    Args:
        config: The `aggregation` section of the configuration.
        task: Task of the federation.
        reference: Function that returns the tensors that a client received in an item.
        trained: Function that returns the names of the trained parameters in an item.
        too_few: Names of the tensors and classes that were not updated because the rule needs more
            clients, keyed by item name. The name "" stands for predictions.
    """

    config: AggregationConfig
    task: Task
    reference: ReferenceTensors = lambda _client_info, _item: {}
    trained: TrainedNames = lambda client_info, _item: client_info.arch.parameter_names
    too_few: dict[str, list[str]] = field(default_factory=dict)

    @property
    def of_parameters(self) -> Rule:
        """Rule for parameters and updates."""
        return rule[self.config.rule](self.config)

    def applies_to(self, spec: ItemSpec) -> bool:
        """Return whether items with this specification are combined by a robust rule."""
        config = self.config
        rules = {"rows": config.predictions, "class_sums": config.statistics, "counts": "mean"}
        return rules.get(spec.kind, config.rule) != "mean"


class RobustModelMeans:
    """Combination of the named tensors of several clients by a robust rule.

    This class is used in place of `OwnerMeans`. The tensors of an architecture group that the same
    clients sent form one block. Rules compute distances and norms over all tensors of a block.

    Args:
        name: Name of the item.
        rules: Rules of the run.
        senders: Clients in the order in which their tensors are added.
        common: Prefixes of the names of tensors that are averaged across architectures.
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
        self._sent: list[tuple[str, Tensors, Tensors]] = []
        self._results: dict[Owner, tuple[Tensor, int]] | None = None

    def add(self, group: str, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Add the tensors of the next sender.

        Args:
            group: Architecture group of the sender.
            tensors: Tensors of the sender, keyed by name.
            weight: Weight of the sender, which is ignored, because a malicious client could report
                a large weight.
        """
        client_info = self.senders[len(self._sent)]
        reference: Tensors = {}
        if self.rules.of_parameters.uses_reference:
            reference = self.rules.reference(client_info, self.name)
        self._sent.append((group, dict(tensors), reference))

    def by_group(self) -> dict[str, Tensors]:
        """Return the combined tensors, keyed by architecture group and tensor name.

        Tensors that too few clients sent are left out.
        """
        return {
            group: {name: mean for name, (mean, _) in named.items()}
            for group, named in self._results_by_group().items()
        }

    def weights_by_group(self) -> dict[str, dict[str, float]]:
        """Return the weight of each combined tensor, keyed by architecture group and tensor name.

        The weight of a tensor is the number of clients that sent the tensor.
        """
        return {
            group: {name: float(count) for name, count in named.items()}
            for group, named in self.counts_by_group().items()
        }

    def counts_by_group(self) -> dict[str, dict[str, int]]:
        """Return the number of clients that sent each combined tensor.

        The numbers are keyed by architecture group and tensor name.
        """
        return {
            group: {name: count for name, (_, count) in named.items()}
            for group, named in self._results_by_group().items()
        }

    def _results_by_group(self) -> dict[str, dict[str, tuple[Tensor, int]]]:
        """Return the result and the number of senders of each tensor, keyed by group and name."""
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
            for (_, positions), owners in self.blocks().items():
                self._combine_block(positions, owners)
        return self._results

    def blocks(self) -> dict[tuple[str, tuple[int, ...]], list[Owner]]:
        """Return the tensors of each block.

        The keys are tuples (group, positions of the senders), and the values are lists of the
        tensors' owners (see `hetero_fl.core.model_spec.owners_of`).
        """
        positions_by_owner: dict[Owner, list[int]] = {}
        for position, (group, tensors, _) in enumerate(self._sent):
            for owner in owners_of(tensors, group, self.common).values():
                positions_by_owner.setdefault(owner, []).append(position)
        blocks: dict[tuple[str, tuple[int, ...]], list[Owner]] = {}
        for owner, positions in positions_by_owner.items():
            blocks.setdefault((owner[2], tuple(positions)), []).append(owner)
        return blocks

    def _combine_block(self, positions: Sequence[int], owners: Sequence[Owner]) -> None:
        assert self._results is not None
        robust_rule = self.rules.of_parameters
        names = [owner[0] for owner in owners]
        num_malicious = self.rules.config.num_malicious(len(positions))
        if len(positions) < robust_rule.min_clients(num_malicious):
            self.rules.too_few.setdefault(self.name, []).extend(names)
            return
        sent = [{name: self._sent[i][1][name] for name in names} for i in positions]
        references = [self._sent[i][2] for i in positions]
        trained = self.rules.trained(self.senders[positions[0]], self.name)
        combined = robust_rule.combine(UploadBlock(sent, references, trained), num_malicious)
        self._results.update({owner: (combined[owner[0]], len(positions)) for owner in owners})


class RobustItemMeans:
    """Combination of the predictions or class sums of several clients by a robust rule.

    This class is used in place of `ItemSum`. The weights of predictions `[N, C]` are ignored. The
    weights of class sums `[C, …]` are the numbers of rows, by which the sums are divided.

    Args:
        name: Name of the item.
        rules: Rules of the run.
    """

    def __init__(self, name: str, rules: AggregationRules) -> None:
        self.name = name
        self.rules = rules
        self._items: list[Item] = []
        self._results: tuple[Tensor, Tensor] | None = None

    def add(self, item: Item) -> None:
        """Add the item of the next sender."""
        self._items.append(item)
        self._results = None

    @property
    def mean(self) -> Tensor | None:
        """Combined tensor, or None if too few clients sent the item."""
        combined = self._combined()
        return None if combined is None else combined[0]

    @property
    def total(self) -> tuple[Tensor, Tensor]:
        """Combined tensor multiplied by the weight, and the weight.

        The weight is the number of clients that sent the item. For class sums, there is a weight
        for each class, which is the number of clients that have rows of the class. If too few
        clients sent the item, both tensors are 0.
        """
        combined = self._combined()
        if combined is None:
            values = self._items[0].values
            assert isinstance(values, Tensor)
            weight = torch.as_tensor(self._items[0].weight, dtype=values.dtype)
            return torch.zeros_like(values), torch.zeros_like(weight)
        mean, weight = combined
        return mean * weight, weight

    def _combined(self) -> tuple[Tensor, Tensor] | None:
        if self._results is None:
            self._results = (
                self._class_means() if self._items[0].kind == "class_sums" else self._predictions()
            )
        return self._results

    def _class_means(self) -> tuple[Tensor, Tensor]:
        """Return the median client mean and the number of clients for each class.

        Both are 0 for a class if half or more of the clients that have the class may be malicious.
        """
        values = torch.stack(
            [item.values for item in self._items if isinstance(item.values, Tensor)]
        )
        counts = torch.stack(
            [torch.as_tensor(item.weight, dtype=values.dtype) for item in self._items]
        )
        num_malicious = self.rules.config.num_malicious(len(values))
        means = torch.zeros_like(values[0])
        num_clients = (counts > 0).sum(0).to(values.dtype)
        for c in range(len(means)):
            has_class = (counts[:, c] > 0).reshape(len(values), -1).all(1)
            if int(has_class.sum()) > 2 * num_malicious:
                means[c] = trimmed_mean(values[has_class, c] / counts[has_class, c])
            else:
                num_clients[c] = 0
                self.rules.too_few.setdefault(self.name, []).append(f"class {c}")
        return means, num_clients

    def _predictions(self) -> tuple[Tensor, Tensor] | None:
        robust_rule = prediction_rule[self.rules.config.predictions](self.rules.config)
        predictions = torch.stack(
            [item.values for item in self._items if isinstance(item.values, Tensor)]
        )
        dtype = predictions.dtype
        # In double precision, sums and squares of the largest valid uploads are finite.
        predictions = predictions.double()
        num_malicious = self.rules.config.num_malicious(len(predictions))
        if len(predictions) < robust_rule.min_clients(num_malicious):
            self.rules.too_few.setdefault(self.name, []).append("")
            return None
        task = self.rules.task
        is_centered = task.kind == "multiclass" and predictions.shape[-1] == task.outputs
        level = torch.zeros_like(predictions[..., :1])
        if is_centered:
            level = predictions.mean(-1, keepdim=True)
        combined = robust_rule.combine(predictions - level, num_malicious)
        if is_centered:
            # Restore the mean of each row, so that probabilities sum to one.
            combined = combined - combined.mean(-1, keepdim=True) + trimmed_mean(level)
        return combined.to(dtype), torch.tensor(float(len(predictions)), dtype=dtype)
