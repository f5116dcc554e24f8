"""Robust combination of the items of uploads in place of weighted means.

Unlike a mean, a robust rule needs all uploads at once, so they are stored until the end of a round.
An upload consists of named items (`Item`), such as parameters or predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from typing_extensions import override

from hetero_fl.aggregation.uploads import SINGLE, Mean, MeanCombiner, Means, Owner, Upload
from hetero_fl.config.protection import AggregationConfig
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Item, ItemSpec
from hetero_fl.core.task import Task
from hetero_fl.robustness.rules import (
    ReferenceTensors,
    Rule,
    TrainedNames,
    UploadBlock,
    prediction_rule,
    rule,
    trimmed_mean,
)

PARAMETERS = ("params", "update")


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

    def combiner(self, name: str, spec: ItemSpec, common: Sequence[str]) -> MeanCombiner:
        """Create the combiner of an item."""
        if self.applies_to(spec):
            return RobustCombiner(name, spec, common, self)
        return MeanCombiner(name, spec, common)


class RobustCombiner(MeanCombiner):
    """Combination of the item of several clients by a robust rule.

    The weights of clients are ignored, because a malicious client could report a large weight.

    - Named tensors: the tensors of an architecture group that the same clients sent form one block.
      Rules compute distances and norms over all tensors of a block. Tensors that too few clients
      sent have no mean.
    - Predictions `[N, C]`: the count of the mean is 0 if too few clients sent predictions.
    - Class sums `[C, …]` are divided by their weights, the numbers of rows. The weight of the mean
      is the number of clients that have rows of each class.

    Args:
        name: Name of the item.
        spec: Declaration of the item.
        common: Prefixes of the names of tensors that are averaged across architectures.
        rules: Rules of the run.
    """

    def __init__(
        self, name: str, spec: ItemSpec, common: Sequence[str], rules: AggregationRules
    ) -> None:
        super().__init__(name, spec, common)
        self.rules = rules
        # Sender, item and the tensors that the sender received.
        self._sent: list[tuple[ClientInfo, Item, Tensors]] = []
        # Positions in `_sent` of the owners of each tensor.
        self._positions: dict[Owner, list[int]] = {}

    @override
    def add(self, upload: Upload) -> None:
        for owner in self.register(upload).values():
            self._positions.setdefault(owner, []).append(len(self._sent))
        reference: Tensors = {}
        if self.spec.kind in PARAMETERS and self.rules.of_parameters.uses_reference:
            reference = self.rules.reference(upload.client_info, self.name)
        item = upload.payload.item(self.name)
        self._sent.append((upload.client_info, item, reference))

    @override
    def means(self) -> Means:
        if self.spec.kind in PARAMETERS or SINGLE not in self._positions:
            return self.by_group(self._model_means())
        is_sums = self.spec.kind == "class_sums"
        return self.by_group({SINGLE: self._class_means() if is_sums else self._predictions()})

    def blocks(self) -> dict[tuple[str, tuple[int, ...]], list[Owner]]:
        """Return the tensors of each block.

        The keys are tuples (group, positions of the senders), and the values are lists of the
        tensors' owners (see `hetero_fl.aggregation.uploads.owners_of`).
        """
        blocks: dict[tuple[str, tuple[int, ...]], list[Owner]] = {}
        for owner, positions in self._positions.items():
            blocks.setdefault((owner[2], tuple(positions)), []).append(owner)
        return blocks

    def _model_means(self) -> dict[Owner, Mean]:
        means = {}
        for (_, positions), owners in self.blocks().items():
            robust_rule = self.rules.of_parameters
            names = [owner[0] for owner in owners]
            count = len(positions)
            num_malicious = self.rules.config.num_malicious(count)
            if count < robust_rule.min_clients(num_malicious):
                self._record_too_few(*names)
                continue
            infos, items, references = zip(*(self._sent[i] for i in positions), strict=True)
            sent = [{name: item.tensors[name] for name in names} for item in items]
            block = UploadBlock(sent, references, self.rules.trained(infos[0], self.name))
            combined = robust_rule.combine(block, num_malicious)
            means.update({owner: Mean(combined[owner[0]], count, count) for owner in owners})
        return means

    def _record_too_few(self, *names: str) -> None:
        self.rules.too_few.setdefault(self.name, []).extend(names)

    def _class_means(self) -> Mean:
        """Return the median client mean and the number of clients for each class.

        Both are 0 for a class if half or more of the clients that have the class may be malicious.
        """
        values = torch.stack([item.tensors[""] for _, item, _ in self._sent])
        counts = torch.stack(
            [torch.as_tensor(item.weight, dtype=values.dtype) for _, item, _ in self._sent]
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
                self._record_too_few(f"class {c}")
        return Mean(means, num_clients, len(values))

    def _predictions(self) -> Mean:
        robust_rule = prediction_rule[self.rules.config.predictions](self.rules.config)
        sent = torch.stack([item.tensors[""] for _, item, _ in self._sent])
        count = len(sent)
        num_malicious = self.rules.config.num_malicious(count)
        if count < robust_rule.min_clients(num_malicious):
            # The name stands for all predictions.
            self._record_too_few("")
            return Mean(torch.zeros_like(sent[0]), 0.0, 0)
        # In double precision, sums and squares of the largest valid uploads are finite.
        predictions = sent.double()
        task = self.rules.task
        if task.kind == "multiclass" and predictions.shape[-1] == task.outputs:
            level = predictions.mean(-1, keepdim=True)
            combined = robust_rule.combine(predictions - level, num_malicious)
            # Restore the mean of each row, so that probabilities sum to one.
            combined = combined - combined.mean(-1, keepdim=True) + trimmed_mean(level)
        else:
            combined = robust_rule.combine(predictions, num_malicious)
        return Mean(combined.to(sent.dtype), float(count), count)
