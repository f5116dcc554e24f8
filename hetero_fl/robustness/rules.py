"""Byzantine-robust aggregation rules: medians, trimmed means, Krum and norm bounds.

The rules do not weight clients by the number of training rows. In a configuration,
`python:package.module:Name` in place of a rule's name selects a user-defined subclass of `Rule` or
`PredictionRule`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hetero_fl.config.protection import AggregationConfig
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import ClientInfo
from hetero_fl.utils.registry import Registry

# Returns the tensors that a client received in the named item, or {} if there are none.
ReferenceTensors = Callable[[ClientInfo, str], Tensors]
# Returns the names of the parameters of the model in an item.
TrainedNames = Callable[[ClientInfo, str], frozenset[str]]


class UploadBlock:
    """Named tensors that the same n clients sent in one item, ordered by client id.

    Args:
        sent: Tensors of each client, which all have the same names and shapes.
        references: Tensors that each client received under the same names. If None, or if a tensor
            is missing, the received values are zeros.
        parameters: Names of the trained tensors. If None, all tensors are trained. The other
            tensors are buffers, such as BatchNorm statistics.

    Attributes:
        names: Names of all tensors.
        buffers: Names of the tensors that are not parameters.
    """

    def __init__(
        self,
        sent: Sequence[Tensors],
        references: Sequence[Tensors] | None = None,
        parameters: frozenset[str] | None = None,
    ) -> None:
        self.sent = sent
        self.references = references or [{} for _ in sent]
        self.names = list(sent[0])
        self.parameters = [n for n in self.names if parameters is None or n in parameters]
        self.buffers = [n for n in self.names if n not in self.parameters]

    def __len__(self) -> int:
        return len(self.sent)

    def stack(self, name: str) -> Tensor:
        """Return the tensors `name` that the clients sent, stacked to shape `[n, …]`."""
        return torch.stack([tensors[name] for tensors in self.sent])

    def start(self, name: str) -> Tensor:
        """Return the tensors `name` that the clients received, stacked to shape `[n, …]`.

        If a client did not receive the tensor, the values are zeros.
        """
        pairs = zip(self.sent, self.references, strict=True)
        return torch.stack([r[name] if name in r else torch.zeros_like(t[name]) for t, r in pairs])

    def distances(self) -> Tensor:
        """Return the squared Euclidean distances between the clients' tensors, float64 `[n, n]`.

        Buffers are ignored, unless the block consists of buffers only.
        """
        total = torch.zeros(len(self), len(self), dtype=torch.float64)
        for name in self.parameters or self.names:
            flat = self.stack(name).double().reshape(len(self), -1)
            total += torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
        return total

    def norms(self, names: Sequence[str], center: Tensors | None = None) -> Tensor:
        """Return the norm of each client's update of the tensors `names`, float64 `[n]`.

        Args:
            names: Names of the tensors.
            center: Tensors from which the updates are measured. If None, the tensors that the
                clients received.
        """
        squares = torch.zeros(len(self), dtype=torch.float64)
        for name in names:
            moved = self.stack(name) - (self.start(name) if center is None else center[name])
            squares += moved.double().reshape(len(self), -1).square().sum(1)
        return squares.sqrt()


class RobustRule:
    """Base class of all robust aggregation rules.

    Args:
        config: The `aggregation` section of the configuration.
    """

    def __init__(self, config: AggregationConfig) -> None:
        self.config = config

    def min_clients(self, num_malicious: int) -> int:
        """Return how many clients the rule needs to tolerate `num_malicious` malicious clients."""
        return 2 * num_malicious + 1


class Rule(RobustRule):
    """Base class of rules for parameters and updates.

    Attributes:
        uses_reference: Whether the rule needs the tensors that clients received.

    Example:
        >>> import torch
        >>> from hetero_fl.config.protection import AggregationConfig
        >>> from hetero_fl.robustness.rules import UploadBlock, rule
        >>> median = rule["median"](AggregationConfig(rule="median"))
        >>> sent = [{"w": torch.tensor([value])} for value in (1.0, 2.0, 100.0)]
        >>> median.combine(UploadBlock(sent), num_malicious=1)
        {'w': tensor([2.])}
    """

    uses_reference: ClassVar[bool] = False

    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        """Combine the tensors of n clients.

        Args:
            block: Tensors of the clients.
            num_malicious: Number of malicious clients to tolerate.

        Returns:
            One tensor for each name in the block, in the dtype of the uploads.
        """
        raise TypeError(f"{type(self).__name__} does not define combine")


class PredictionRule(RobustRule):
    """Base class of rules for predictions on proxy rows.

    Predictions are logits, log probabilities or probabilities. For multi-class tasks, the caller
    subtracts the mean over the classes from each row, because the softmax of logits does not depend
    on this mean.

    Attributes:
        exclusive: Whether the rule is for multi-class tasks only.
    """

    exclusive: ClassVar[bool] = False

    def combine(self, predictions: Tensor, num_malicious: int) -> Tensor:
        """Combine the predictions of n clients.

        Args:
            predictions: Predictions of the clients, shape `[n, N, C]`.
            num_malicious: Number of malicious clients to tolerate.

        Returns:
            Combined predictions, shape `[N, C]`.
        """
        raise TypeError(f"{type(self).__name__} does not define combine")


rule: Registry[type[Rule]] = Registry("aggregation rule", lambda: Rule)
prediction_rule: Registry[type[PredictionRule]] = Registry(
    "aggregation rule of predictions", lambda: PredictionRule
)


def trimmed_mean(values: Tensor, num_malicious: int | None = None) -> Tensor:
    """Return the coordinate-wise trimmed mean over dimension 0.

    Args:
        values: Values of the clients, shape `[n, …]`.
        num_malicious: Number of lowest values and number of highest values to leave out. If None,
            the median is returned.

    Returns:
        Trimmed mean, shape `[…]`.

    Example:
        >>> import torch
        >>> from hetero_fl.robustness.rules import trimmed_mean
        >>> trimmed_mean(torch.tensor([1.0, 2.0, 4.0, 100.0]), num_malicious=1)
        tensor(3.)
    """
    n = len(values)
    drop = (n - 1) // 2 if num_malicious is None else num_malicious
    return values.sort(0).values[drop : n - drop].mean(0)


@rule("median")
class Median(Rule):
    """Coordinate-wise median (Yin et al. 2018, Definition 1)."""

    @override
    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        return {name: trimmed_mean(block.stack(name)) for name in block.names}


@rule("trimmed_mean")
class TrimmedMean(Rule):
    """Coordinate-wise trimmed mean (Yin et al. 2018, Definition 2).

    The f lowest and the f highest values are left out, where f is the number of malicious clients
    to tolerate.
    """

    @override
    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        return {name: trimmed_mean(block.stack(name), num_malicious) for name in block.names}


def krum_scores(distances: Tensor, num_malicious: int) -> Tensor:
    """Return the Krum scores of n clients (Blanchard et al. 2017).

    The score of a client is the sum of the squared distances to the n − f − 2 nearest other
    clients.

    Args:
        distances: Squared distances between clients, shape `[n, n]`.
        num_malicious: Number f of malicious clients to tolerate.

    Returns:
        Scores, shape `[n]`.
    """
    n = len(distances)
    others = distances.masked_fill(torch.eye(n, dtype=torch.bool), torch.inf)
    return others.sort(1).values[:, : max(1, n - num_malicious - 2)].sum(1)


@rule("krum")
class Krum(Rule):
    """Upload of the client with the lowest Krum score (Blanchard et al. 2017).

    The score of one of n clients is the sum of the squared distances to the n − f − 2 nearest other
    clients, where f is the number of malicious clients to tolerate. Among clients with equal
    scores, the first client by id is selected.
    """

    @override
    def min_clients(self, num_malicious: int) -> int:
        return 2 * num_malicious + 3

    @override
    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        return dict(block.sent[int(krum_scores(block.distances(), num_malicious).argmin())])


@rule("multi_krum")
class MultiKrum(Krum):
    """Mean of the uploads with the lowest Krum scores (Blanchard et al. 2017, section 5).

    Of n uploads, n − f are averaged, where f is the number of malicious clients to tolerate.
    """

    @override
    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        ranked = krum_scores(block.distances(), num_malicious).argsort(stable=True)
        chosen = ranked[: len(block) - num_malicious].sort().values
        return {name: block.stack(name)[chosen].mean(0) for name in block.names}


# Lower bound of divisors.
MIN_DIVISOR = 1e-12
# Lower bound of distances to the geometric median, which makes the sum of distances smooth.
MIN_DISTANCE = 1e-6
# Maximum number of iterations of the Weiszfeld algorithm, and change of the weights that ends it.
MAX_ITERATIONS = 100
WEIGHT_TOLERANCE = 1e-9


@rule("geometric_median")
class GeometricMedian(Rule):
    """Point with the smallest sum of distances to the uploads (Pillutla et al. 2022).

    The smoothed Weiszfeld algorithm starts at the coordinate-wise median. Buffers have a median of
    their own, so that they cannot hide behind true parameters.
    """

    @override
    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        medians = self._median(block, block.parameters) | self._median(block, block.buffers)
        return {name: medians[name] for name in block.names}

    @staticmethod
    def _median(block: UploadBlock, names: Sequence[str]) -> Tensors:
        """Return the geometric median of the tensors `names`."""
        center = {name: trimmed_mean(block.stack(name)).double() for name in names}
        weights = torch.zeros(len(block), dtype=torch.float64)
        for _ in range(MAX_ITERATIONS):
            previous = weights
            weights = 1 / block.norms(names, center).clamp(min=MIN_DISTANCE)
            weights = weights / weights.sum()
            for name in names:
                center[name] = torch.tensordot(weights, block.stack(name).double(), 1)
            if torch.allclose(weights, previous, rtol=0, atol=WEIGHT_TOLERANCE):
                break
        return {name: value.to(block.sent[0][name].dtype) for name, value in center.items()}


@rule("norm_bound")
class NormBound(Rule):
    """Mean of updates clipped to a norm (Sun et al. 2019, section 4).

    The bound is the setting `bound`. If this setting is None, the bound is the median norm of the
    clients' updates. Updates of buffers are clipped separately, always to their median norm, so
    that a clipped buffer is between the received value and the sent value.
    """

    uses_reference = True

    @override
    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        combined: Tensors = {}
        for names, bound in ((block.parameters, self.config.bound), (block.buffers, None)):
            norms = block.norms(names)
            limit = trimmed_mean(norms) if bound is None else torch.as_tensor(bound)
            factors = (limit / norms.clamp(min=MIN_DIVISOR)).clamp(max=1.0) / len(block)
            for name in names:
                start = block.start(name)
                scale = factors.to(start.dtype).reshape(-1, *[1] * (start.ndim - 1))
                combined[name] = start.mean(0) + (scale * (block.stack(name) - start)).sum(0)
        return {name: combined[name] for name in block.names}


@prediction_rule("median")
class MedianPredictions(PredictionRule):
    """Coordinate-wise median over the clients."""

    @override
    def combine(self, predictions: Tensor, num_malicious: int) -> Tensor:
        return trimmed_mean(predictions)


@prediction_rule("agreement")
class Agreement(PredictionRule):
    """Mean weighted by the number of other clients that predict the same class, row by row.

    The weight is 0 if fewer than f other clients agree, where f is the number of malicious clients
    to tolerate, because a malicious client can agree with at most f − 1 other malicious clients.
    Predictions are clipped to the median norm of the row. If all weights of a row are 0, the result
    is the coordinate-wise median.
    """

    exclusive = True

    @override
    def combine(self, predictions: Tensor, num_malicious: int) -> Tensor:
        predicted = predictions.argmax(-1)  # [n, N]
        agreement = (predicted[:, None] == predicted).sum(1) - 1
        weight = torch.where(agreement >= max(1, num_malicious), agreement, 0)
        weight = weight.to(predictions.dtype)[..., None]
        norms = predictions.norm(dim=-1, keepdim=True)
        clipped = predictions * (trimmed_mean(norms) / norms.clamp(min=MIN_DIVISOR)).clamp(max=1.0)
        total = weight.sum(0)
        mean = (weight * clipped).sum(0) / total.clamp(min=1)
        return torch.where(total > 0, mean, trimmed_mean(predictions))
