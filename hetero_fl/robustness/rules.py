"""Byzantine-robust aggregation rules: medians, trimmed means, Krum, norm bounds, FLTrust."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hetero_fl.config.robustness import AggregationConfig
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.objectives import TeacherDistillation
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.plan import Fit, Plan, Predict, Rows
from hetero_fl.utils.registry import Registry

# What a rule is: how the words of several clients, of whom some may lie, become one.
#
# A rule of parameters gets an `UploadBlock`, the tensors that the same clients sent; a rule of predictions
# gets one tensor of all. Both weigh all senders alike. `python:package.module:Name` in place of a
# rule's name takes one's own class with the same methods.


class UploadBlock:
    """Tensors that the same n clients sent under one name, in the order of their ids.

    Args:
        sent: of each client the tensors; all have the same names and shapes.
        references: of each client what it was sent under these names; {} or a name that is missing stands for nought.
        parameters: names of those that are trained; the others are buffers (BatchNorm statistics), which no distance counts.
        root: what the server itself would have made of the reference, for rules that ask for it.
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
        """`[n, …]`: a tensor of every client."""
        return torch.stack([tensors[name] for tensors in self.sent])

    def start(self, name: str) -> Tensor:
        """`[n, …]`: what every client was sent of it."""
        pairs = zip(self.sent, self.references, strict=True)
        return torch.stack([r[name] if name in r else torch.zeros_like(t[name]) for t, r in pairs])

    def distances(self) -> Tensor:
        """Squared Euclidean distances between the clients' parameters, float64 `[n, n]`."""
        total = torch.zeros(len(self), len(self), dtype=torch.float64)
        for name in self.parameters or self.names:
            flat = self.stack(name).double().flatten(1)
            total += torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
        return total

    def norms(self, names: Sequence[str]) -> Tensor:
        """Euclidean norms of the clients' updates of these tensors together, float64 `[n]`."""
        squares = torch.zeros(len(self), dtype=torch.float64)
        for name in names:
            squares += (self.stack(name) - self.start(name)).double().flatten(1).square().sum(1)
        return squares.sqrt()


class RobustRule:
    """Base of rules for parameters and of rules for predictions."""

    def __init__(self, config: AggregationConfig) -> None:
        self.config = config

    def min_clients(self, num_malicious: int) -> int:
        """Return how many clients the rule needs if so many of them are malicious."""
        return 2 * num_malicious + 1


class Rule(RobustRule):
    """A rule for parameters and updates."""

    uses_reference: ClassVar[bool] = False  # whether it looks at what clients were sent
    uses_root: ClassVar[bool] = False  # whether it compares with an update of the server's own

    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        """One tensor for each name of the block, in the dtype of what was sent."""
        raise TypeError(f"{type(self).__name__} defines no combine")


class PredictionRule(RobustRule):
    """A rule for predictions on public rows."""

    exclusive: ClassVar[bool] = False  # whether it is for classes of which each row has one

    def combine(
        self,
        predictions: Tensor,
        num_malicious: int,
        clients: Sequence[str],
        memory: dict[str, Any],
    ) -> Tensor:
        """`[N, C]` from `predictions` `[n, N, C]`, one client after the other.

        `clients`: their ids; `memory`: what the rule remembers from round to round, plain numbers by id.
        """
        raise TypeError(f"{type(self).__name__} defines no combine")


rule: Registry[type[Rule]] = Registry("aggregation rule", lambda: Rule)
prediction_rule: Registry[type[PredictionRule]] = Registry(
    "aggregation rule of predictions", lambda: PredictionRule
)


def trimmed_mean(values: Tensor, num_malicious: int | None = None) -> Tensor:
    """The mean over dimension 0 without the `num_malicious` lowest and highest of every coordinate; None: all but the middle one
    or two, the median."""
    n = len(values)
    drop = (n - 1) // 2 if num_malicious is None else num_malicious
    return values.sort(0).values[drop : n - drop].mean(0)


# Rules that look at each coordinate by itself (Yin et al. 2018); buffers like any other.


@rule("median")
class Median(Rule):
    """The median of each coordinate; of an even number the mean of the two in the middle (Yin et al. 2018, Definition 1)."""

    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        return {name: trimmed_mean(block.stack(name)) for name in block.names}


@rule("trimmed_mean")
class TrimmedMean(Rule):
    """The mean of each coordinate without its f lowest and f highest (Yin et al. 2018, Definition 2)."""

    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        return {name: trimmed_mean(block.stack(name), num_malicious) for name in block.names}


# Rules that select whole clients by their distances to one another. Buffers are those of the
# selected.


def krum_scores(distances: Tensor, num_malicious: int) -> Tensor:
    """Of each client the sum of the squared distances to its n − f − 2 nearest others, `[n]`; at least to one."""
    n = len(distances)
    others = distances.masked_fill(torch.eye(n, dtype=torch.bool), torch.inf)
    return others.sort(1).values[:, : max(1, n - num_malicious - 2)].sum(1)


@rule("krum")
class Krum(Rule):
    """The client whose n − f − 2 nearest others are nearest (Blanchard et al. 2017); of equals the first by id."""

    def min_clients(self, num_malicious: int) -> int:
        return 2 * num_malicious + 3

    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        return dict(block.sent[int(krum_scores(block.distances(), num_malicious).argmin())])


@rule("multi_krum")
class MultiKrum(Krum):
    """The mean of the n − f clients with the lowest scores of Krum (Blanchard et al. 2017, section 5)."""

    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        ranked = krum_scores(block.distances(), num_malicious).argsort(stable=True)
        chosen = ranked[: len(block) - num_malicious].sort().values
        return {name: block.stack(name)[chosen].mean(0) for name in block.names}


@rule("bulyan")
class Bulyan(Rule):
    """n − 2f clients selected by Krum, one after the other; of each coordinate the mean of the n − 4f values nearest to their
    median (El Mhamdi et al. 2018, section 4)."""

    def min_clients(self, num_malicious: int) -> int:
        return 4 * num_malicious + 3

    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        distances = block.distances()
        left = torch.arange(len(block))
        chosen: list[int] = []
        while len(chosen) < len(block) - 2 * num_malicious:
            best = (
                int(krum_scores(distances[left][:, left], num_malicious).argmin())
                if len(left) > 1
                else 0
            )
            chosen.append(int(left[best]))
            left = torch.cat([left[:best], left[best + 1 :]])
        keep = len(chosen) - 2 * num_malicious
        return {
            name: mean_nearest_to_median(block.stack(name)[sorted(chosen)], keep)
            for name in block.names
        }


def mean_nearest_to_median(values: Tensor, keep: int) -> Tensor:
    """Of each coordinate the mean of the `keep` values that lie nearest to its median, over dimension 0."""
    ordered = values.sort(0).values
    n = len(ordered)
    centre = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    near = (ordered - centre).abs().argsort(dim=0, stable=True)[:keep]
    return ordered.gather(0, near).mean(0)


# Rules that bound how far one client can move the model. Both act on updates, what was sent less
# what was received.

TINY = 1e-12


@rule("norm_bound")
class NormBound(Rule):
    """The mean of updates clipped to a norm: the one that is given, or the median of the clients' (Sun et al. 2019, section 4).

    Buffers have a norm of their own, always bounded by the median: a clipped one lies between what was received and sent.
    """

    uses_reference = True

    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        made: Tensors = {}
        for names, bound in ((block.parameters, self.config.bound), (block.buffers, None)):
            norms = block.norms(names)
            most = trimmed_mean(norms) if bound is None else torch.as_tensor(bound)
            made |= scale_updates(
                block, names, (most / norms.clamp(min=TINY)).clamp(max=1.0) / len(block)
            )
        return {name: made[name] for name in block.names}


@rule("fltrust")
class FLTrust(Rule):
    """Updates of the norm of the server's own, weighted by ReLU(cos) with it (Cao et al. 2021, Algorithm 2).

    The paper's server has labelled rows. Here it has the proxy set, without labels: its own update is what the reference
    becomes when the median of the uploaded models' predictions is distilled into it (hetero_fl.robustness.rules).
    Buffers take the same weights and are never moved further than their client did. Without trust in anybody nothing moves.
    """

    uses_reference = True
    uses_root = True

    def combine(self, block: UploadBlock, num_malicious: int) -> Tensors:
        assert block.root is not None  # the runtime has made it: `uses_root`
        trust, size = self.trust_scores(block)
        norms = block.norms(block.parameters).clamp(min=TINY)
        share = trust / trust.sum().clamp(min=TINY)
        made = scale_updates(block, block.parameters, share * size / norms)
        made |= scale_updates(block, block.buffers, share * (size / norms).clamp(max=1.0))
        return {name: made[name] for name in block.names}

    @staticmethod
    def trust_scores(block: UploadBlock) -> tuple[Tensor, Tensor]:
        """ReLU of the cosine of each client's update with the server's `[n]`, and the norm of the server's own."""
        assert block.root is not None
        dots = torch.zeros(len(block), dtype=torch.float64)
        square = torch.zeros((), dtype=torch.float64)
        for name in block.parameters:
            start = block.start(name)
            own = (block.root[name] - start).double().flatten(1)
            dots += ((block.stack(name) - start).double().flatten(1) * own).sum(1)
            square += own[0].square().sum()
        size = square.sqrt()
        cosine = dots / (block.norms(block.parameters) * size).clamp(min=TINY)
        return cosine.clamp(min=0), size


def scale_updates(block: UploadBlock, names: list[str], factors: Tensor) -> Tensors:
    """The mean of what clients received, moved by Σ factor·update."""
    made = {}
    for name in names:
        start = block.start(name)
        by = factors.to(start.dtype).reshape(-1, *[1] * (start.ndim - 1))
        made[name] = start.mean(0) + (by * (block.stack(name) - start)).sum(0)
    return made


# Rules for predictions on proxy rows. They see them as the clients sent them (logits, log p,
# probabilities), each row less its mean over the classes where classes exclude one another: a
# constant added to a row of logits says nothing.

# of the weight's decay: a client that stands twice as far out as the middle one loses e^-2 a round
RATE = 2.0


@prediction_rule("median")
class MedianPredictions(PredictionRule):
    """The median of each coordinate, over the clients."""

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
    """The mean of the n − f clients that are left when, f times, the one that stands out most along the direction in which
    they differ most is dropped: the filter of Cronus (Chang et al. 2019, after Diakonikolas et al. 2017), on all rows at once.
    """

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
            # The first left singular vector, times its value, is how far each client lies along the first direction.
            _, vectors = torch.linalg.eigh(flat @ flat.T)
            out = int(vectors[:, -1].abs().argmax())
            kept = torch.cat([kept[:out], kept[out + 1 :]])
        return predictions[kept].mean(0)


@prediction_rule("down_weight")
class DownWeight(PredictionRule):
    """The mean with weights exp(−η·s), s what a client has been outlying in all rounds so far: exponential weights, as ExpGuard
    has them (Roux et al. 2025).

    In a round that is max(0, d/d̃ − 1), d the mean distance of its rows to the clients' coordinate-wise median, d̃ the median
    of all d.
    """

    def combine(
        self,
        predictions: Tensor,
        num_malicious: int,
        clients: Sequence[str],
        memory: dict[str, Any],
    ) -> Tensor:
        far = (
            (predictions - trimmed_mean(predictions))
            .double()
            .flatten(2 if predictions.ndim > 2 else 1)
            .norm(dim=-1)
        )
        far = far.mean(1) if far.ndim > 1 else far
        outlying = (far / trimmed_mean(far).clamp(min=TINY) - 1).clamp(min=0)
        for client, more in zip(clients, outlying.tolist(), strict=True):
            memory[client] = memory.get(client, 0.0) + more
        weights = torch.tensor([-RATE * memory[c] for c in clients], dtype=torch.float64).softmax(0)
        return torch.einsum("n,n...->...", weights.to(predictions.dtype), predictions)


@prediction_rule("agreement")
class Agreement(PredictionRule):
    """Row by row, a client's weight is the number of others whose first class is its own, nought if these are fewer than f:
    liars alone cannot agree that much. Nobody speaks louder (in norm) than the median client. A row without any
    agreement takes the median of each coordinate.
    """

    exclusive = True

    def combine(
        self,
        predictions: Tensor,
        num_malicious: int,
        clients: Sequence[str],
        memory: dict[str, Any],
    ) -> Tensor:
        first = predictions.argmax(-1)  # [n, N]
        agree = (first[:, None] == first).sum(1) - 1
        weight = torch.where(agree >= max(1, num_malicious), agree, 0).to(predictions.dtype)[
            ..., None
        ]
        loud = predictions.norm(dim=-1, keepdim=True)
        heard = predictions * (trimmed_mean(loud) / loud.clamp(min=TINY)).clamp(max=1.0)
        total = weight.sum(0)
        return torch.where(
            total > 0, (weight * heard).sum(0) / total.clamp(min=1), trimmed_mean(predictions)
        )


# The server's own update, for rules that trust clients as far as they agree with it (FLTrust), of a
# server without labels.

TEMPERATURE = 2.0


def root_models(
    server: Participant, sent: Sequence[tuple[ClientInfo, Tensors]]
) -> Plan[dict[str, Tensors]]:
    """What each sender's group's model becomes in an epoch on the proxy set, towards the coordinate-wise median of what all
    models that were sent predict there; by group. `server`: a copy, whose models the plan changes.

    The median is over models of every architecture, more voices than any one group has. Every sender sees the proxy set.
    """
    opinions = yield [
        Predict(
            client_info.arch.spec_id,
            Rows("proxy", preprocess=client_info.preprocess),
            tensors={**server.models[client_info.arch.spec_id], **tensors},
            arch=client_info.arch,
        )
        for client_info, tensors in sent
    ]
    if server.task.kind == "multiclass":
        opinions = [z.log_softmax(-1) for z in opinions]
    teacher = trimmed_mean(torch.stack(opinions))
    views = {
        client_info.arch.spec_id: client_info.preprocess for client_info, _ in reversed(sent)
    }  # the lowest id's
    yield [
        Fit(
            {group: None},
            TeacherDistillation(server.task.kind, TEMPERATURE, slot=group),
            Rows("proxy", extra_columns={"teacher": teacher}, preprocess=views[group]),
            optimizer=server.optimizer,
            label=f"root {group}",
        )
        for group in sorted(views)
    ]
    return {group: server.models[group] for group in views}
