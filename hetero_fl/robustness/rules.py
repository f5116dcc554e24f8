"""Byzantine-robust aggregation rules: medians, trimmed means, Krum, norm bounds and FLTrust.

The rules do not weight clients by the number of training rows. In a configuration,
`python:package.module:Name` in place of a rule's name selects a user-defined subclass of `Rule` or
`PredictionRule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hetero_fl.config.robustness import AggregationConfig
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.objectives import TeacherDistillation
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.plan import Fit, Plan, Predict, Rows
from hetero_fl.utils.registry import Registry


class UploadBlock:
    """Named tensors that the same n clients sent in one item, ordered by client id.

    Args:
        sent: Tensors of each client, which all have the same names and shapes.
        references: Tensors that each client received under the same names. If None, or if a tensor
            is missing, the received values are zeros.
        parameters: Names of the trained tensors. If None, all tensors are trained. The other
            tensors are buffers, such as BatchNorm statistics.
        root: Tensors of the model that the server trained, which only rules with `uses_root` need.

    Attributes:
        names: Names of all tensors.
        buffers: Names of the tensors that are not parameters.
    """

    def __init__(
        self,
        sent: Sequence[Tensors],
        references: Sequence[Tensors] | None = None,
        parameters: frozenset[str] | None = None,
        root: Tensors | None = None,
    ) -> None:
        self.sent = sent
        self.references = references or [{} for _ in sent]
        self.names = list(sent[0])
        self.parameters = [n for n in self.names if parameters is None or n in parameters]
        self.buffers = [n for n in self.names if n not in self.parameters]
        self.root = root

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

    def norms(self, names: Sequence[str]) -> Tensor:
        """Return the norm of each client's update of the tensors `names`, float64 `[n]`."""
        squares = torch.zeros(len(self), dtype=torch.float64)
        for name in names:
            moved = self.stack(name) - self.start(name)
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
        uses_root: Whether the rule needs a model trained by the server.

    Example:
        >>> import torch
        >>> from hetero_fl.config.robustness import AggregationConfig
        >>> from hetero_fl.robustness.rules import UploadBlock, rule
        >>> median = rule["median"](AggregationConfig(rule="median"))
        >>> sent = [{"w": torch.tensor([value])} for value in (1.0, 2.0, 100.0)]
        >>> median.combine(UploadBlock(sent), num_malicious=1)
        {'w': tensor([2.])}
    """

    uses_reference: ClassVar[bool] = False
    uses_root: ClassVar[bool] = False

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

    def combine(
        self,
        predictions: Tensor,
        num_malicious: int,
        clients: Sequence[str],
        memory: dict[str, Any],
    ) -> Tensor:
        """Combine the predictions of n clients.

        Args:
            predictions: Predictions of the clients, shape `[n, N, C]`.
            num_malicious: Number of malicious clients to tolerate.
            clients: Ids of the clients.
            memory: State that the rule may update, such as a score for each client id. The state is
                kept between rounds.

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


@rule("bulyan")
class Bulyan(Rule):
    """Bulyan (El Mhamdi et al. 2018, section 4).

    Krum is applied repeatedly and selects n − 2f of n clients, one at a time, where f is the number
    of malicious clients to tolerate. Each coordinate of the result is the mean of the n − 4f
    selected values that are nearest to the median of the selected values.
    """

    @override
    def min_clients(self, num_malicious: int) -> int:
        return 4 * num_malicious + 3

    @override
    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        distances = block.distances()
        remaining = torch.arange(len(block))
        chosen: list[int] = []
        while len(chosen) < len(block) - 2 * num_malicious:
            best = 0
            if len(remaining) > 1:
                scores = krum_scores(distances[remaining][:, remaining], num_malicious)
                best = int(scores.argmin())
            chosen.append(int(remaining[best]))
            remaining = torch.cat([remaining[:best], remaining[best + 1 :]])
        keep = len(chosen) - 2 * num_malicious
        return {
            name: mean_nearest_to_median(block.stack(name)[sorted(chosen)], keep)
            for name in block.names
        }


def mean_nearest_to_median(values: Tensor, keep: int) -> Tensor:
    """Return the coordinate-wise mean of the `keep` values nearest to the median over dim 0."""
    ordered = values.sort(0).values
    n = len(ordered)
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    nearest = (ordered - median).abs().argsort(dim=0, stable=True)[:keep]
    return ordered.gather(0, nearest).mean(0)


# Lower bound of divisors.
MIN_DIVISOR = 1e-12


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
            combined |= scale_updates(block, names, factors)
        return {name: combined[name] for name in block.names}


@rule("fltrust")
class FLTrust(Rule):
    """FLTrust (Cao et al. 2021, Algorithm 2).

    Each update is scaled to the norm of the server's update and weighted by the ReLU of the cosine
    similarity with the server's update. If all weights are 0, the model does not change. Updates of
    buffers have the same weights, but are never enlarged.

    Unlike in the paper, the server does not train on labeled rows. Instead, the server distills the
    median prediction of the uploaded models on the unlabeled proxy set (`root_models`).
    """

    uses_reference = True
    uses_root = True

    @override
    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        assert block.root is not None, "provided because of uses_root"
        trust, size = self.trust_scores(block)
        norms = block.norms(block.parameters).clamp(min=MIN_DIVISOR)
        share = trust / trust.sum().clamp(min=MIN_DIVISOR)
        combined = scale_updates(block, block.parameters, share * size / norms)
        combined |= scale_updates(block, block.buffers, share * (size / norms).clamp(max=1.0))
        return {name: combined[name] for name in block.names}

    @staticmethod
    def trust_scores(block: UploadBlock) -> tuple[Tensor, Tensor]:
        """Compute the trust score of each client and the norm of the server's update.

        The trust score is the ReLU of the cosine similarity with the server's update.

        Returns:
            The trust scores, shape `[n]`, and the norm, a scalar tensor. Both are float64.
        """
        assert block.root is not None
        dots = torch.zeros(len(block), dtype=torch.float64)
        square = torch.zeros((), dtype=torch.float64)
        for name in block.parameters:
            start = block.start(name)
            own = (block.root[name] - start).double().reshape(len(block), -1)
            sent = (block.stack(name) - start).double().reshape(len(block), -1)
            dots += (sent * own).sum(1)
            square += own[0].square().sum()
        size = square.sqrt()
        cosine = dots / (block.norms(block.parameters) * size).clamp(min=MIN_DIVISOR)
        return cosine.clamp(min=0), size


def scale_updates(block: UploadBlock, names: list[str], factors: Tensor) -> Tensors:
    """Return the mean of the received tensors plus the sum of the scaled updates.

    Args:
        block: Tensors of the clients.
        names: Names of the tensors to combine.
        factors: Factor on the update of each client, shape `[n]`.
    """
    combined = {}
    for name in names:
        start = block.start(name)
        scale = factors.to(start.dtype).reshape(-1, *[1] * (start.ndim - 1))
        combined[name] = start.mean(0) + (scale * (block.stack(name) - start)).sum(0)
    return combined


# η of `DownWeight`: at twice the median distance, a weight shrinks by a factor of e^-2 per round.
RATE = 2.0


@prediction_rule("median")
class MedianPredictions(PredictionRule):
    """Coordinate-wise median over the clients."""

    @override
    def combine(
        self,
        predictions: Tensor,
        num_malicious: int,
        clients: Sequence[str],
        memory: dict[str, Any],
    ) -> Tensor:
        return trimmed_mean(predictions)


@prediction_rule("spectral")
class Spectral(PredictionRule):
    """Mean after spectral filtering, as in Cronus (Chang et al. 2019; Diakonikolas et al. 2017).

    The predictions of a client for all rows form one vector. In each of f steps, the client that is
    farthest from the mean along the direction of largest variance is removed, where f is the number
    of malicious clients to tolerate.
    """

    @override
    def combine(
        self,
        predictions: Tensor,
        num_malicious: int,
        clients: Sequence[str],
        memory: dict[str, Any],
    ) -> Tensor:
        kept = torch.arange(len(predictions))
        for _ in range(num_malicious):
            flat = predictions[kept].double().flatten(1)
            flat = flat - flat.mean(0)
            # The first left singular vector is proportional to the projections of the clients on
            # the direction of largest variance.
            _, vectors = torch.linalg.eigh(flat @ flat.T)
            outlier = int(vectors[:, -1].abs().argmax())
            kept = torch.cat([kept[:outlier], kept[outlier + 1 :]])
        return predictions[kept].mean(0)


@prediction_rule("down_weight")
class DownWeight(PredictionRule):
    """Mean with exponential weights exp(−η·s), as in ExpGuard (Roux et al. 2025).

    The score s of a client is the sum over all rounds of max(0, d/d̃ − 1). Here, d is the mean
    distance of the client's predictions from the coordinate-wise median over all clients, and d̃ is
    the median of d over all clients.
    """

    @override
    def combine(
        self,
        predictions: Tensor,
        num_malicious: int,
        clients: Sequence[str],
        memory: dict[str, Any],
    ) -> Tensor:
        deviations = (predictions - trimmed_mean(predictions)).double()
        distances = deviations.flatten(2 if predictions.ndim > 2 else 1).norm(dim=-1)
        distances = distances.mean(1) if distances.ndim > 1 else distances
        excess = (distances / trimmed_mean(distances).clamp(min=MIN_DIVISOR) - 1).clamp(min=0)
        for client, value in zip(clients, excess.tolist(), strict=True):
            memory[client] = memory.get(client, 0.0) + value
        weights = torch.tensor([-RATE * memory[c] for c in clients], dtype=torch.float64).softmax(0)
        return torch.einsum("n,n...->...", weights.to(predictions.dtype), predictions)


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
    def combine(
        self,
        predictions: Tensor,
        num_malicious: int,
        clients: Sequence[str],
        memory: dict[str, Any],
    ) -> Tensor:
        predicted = predictions.argmax(-1)  # [n, N]
        agreement = (predicted[:, None] == predicted).sum(1) - 1
        weight = torch.where(agreement >= max(1, num_malicious), agreement, 0)
        weight = weight.to(predictions.dtype)[..., None]
        norms = predictions.norm(dim=-1, keepdim=True)
        clipped = predictions * (trimmed_mean(norms) / norms.clamp(min=MIN_DIVISOR)).clamp(max=1.0)
        total = weight.sum(0)
        mean = (weight * clipped).sum(0) / total.clamp(min=1)
        return torch.where(total > 0, mean, trimmed_mean(predictions))


# Temperature of the distillation in `root_models`.
TEMPERATURE = 2.0


def root_models(
    server: Participant, sent: Sequence[tuple[ClientInfo, Tensors]]
) -> Plan[dict[str, Tensors]]:
    """Train the server's models on the proxy set for rules with `uses_root`.

    The median prediction of all uploaded models, which may have different architectures, is
    distilled into the model of each architecture group for one epoch.

    Args:
        server: Copy of the server. The plan trains the models of this copy.
        sent: Clients with proxy rows, and the tensors that they sent.

    Returns:
        Plan that returns the trained models, keyed by architecture group.
    """
    predictions = yield [
        Predict(
            client_info.arch.spec_id,
            Rows("proxy", preprocess=client_info.preprocess),
            tensors={**server.models[client_info.arch.spec_id], **tensors},
            arch=client_info.arch,
        )
        for client_info, tensors in sent
    ]
    if server.task.kind == "multiclass":
        predictions = [z.log_softmax(-1) for z in predictions]
    teacher = trimmed_mean(torch.stack(predictions))
    # The client with the lowest id determines the preprocessing of its group.
    preprocess = {
        client_info.arch.spec_id: client_info.preprocess for client_info, _ in reversed(sent)
    }
    yield [
        Fit(
            {group: None},
            TeacherDistillation(server.task.kind, TEMPERATURE, slot=group),
            Rows("proxy", extra_columns={"teacher": teacher}, preprocess=preprocess[group]),
            optimizer=server.optimizer,
            label=f"root {group}",
        )
        for group in sorted(preprocess)
    ]
    return {group: server.models[group] for group in preprocess}
