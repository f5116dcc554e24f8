"""Membership inference attacks that use the loss or shadow runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from hetero_fl.core.objectives import supervised_loss
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.stored_rows import map_rows
from hetero_fl.core.task import Task
from hetero_fl.data import FederatedData, Preprocess, row_strata
from hetero_fl.data.client_rows import ClientRows
from hetero_fl.data.dataset import Examples, concatenate_examples
from hetero_fl.data.federated_data import unprocessed_rows
from hetero_fl.data.partition.groups import most_common_stratum
from hetero_fl.data.splits import RowSelection
from hetero_fl.experiment.preparation import PreparedRun
from hetero_fl.utils.errors import ArgumentError
from hetero_fl.utils.seeding import Key, keyed_generator, stream_key

# False positive rate at which the true positive rate is computed.
FALSE_ALARMS = 0.01
# Bootstrap samples for standard errors.
RESAMPLES = 1000
# Lower bound of variances and squared errors.
MIN_VARIANCE = 1e-12
# Largest and smallest number of members among the candidate rows of a client. There are equally
# many non-members.
MAX_CANDIDATES = 1000
MIN_CANDIDATES = 5


def confidence(task: Task, logits: Tensor, y: Tensor) -> Tensor:
    """Return the confidence of a model in the targets, which is approximately normally distributed.

    For a multiclass task, the confidence is the log-odds of the true class,
    `log p_y - log(1 - p_y)` (Carlini et al. 2022, section V.A), computed from logits without
    overflow. For a multilabel task, the confidence is the mean of the log-odds over the labels. For
    regression, the confidence is the negative logarithm of the mean squared error of the example.

    Args:
        task: The task of the model.
        logits: Model outputs, `[N, outputs]`.
        y: Class indices `[N]`, or targets `[N, outputs]`.

    Returns:
        Confidence, float64 `[N]`.
    """
    z = logits.double()
    if task.kind == "multiclass":
        others = z.scatter(1, y[:, None], -torch.inf).logsumexp(1)
        return z.gather(1, y[:, None]).squeeze(1) - others
    if task.kind == "multilabel":
        return ((2 * y - 1) * z).mean(1)
    return -supervised_loss(task.kind, z, y.double()).clamp(min=MIN_VARIANCE).log()


def loss_score(task: Task, logits: Tensor, y: Tensor) -> Tensor:
    """Return the negative loss, which is typically larger for members (Yeom et al. 2018).

    Args:
        task: The task of the model.
        logits: Model outputs, `[N, outputs]`.
        y: Class indices `[N]`, or targets `[N, outputs]`.

    Returns:
        Scores, float64 `[N]`.
    """
    return -supervised_loss(task.kind, logits.double(), y.double() if y.is_floating_point() else y)


def likelihood_ratio(target: Tensor, shadows: Tensor, inside: Tensor) -> Tensor:
    """Return the log-likelihood ratio of membership, up to a positive factor.

    LiRA (Carlini et al. 2022) compares N(φ; μ_in, σ²_in) with N(φ; μ_out, σ²_out), where φ is the
    confidence of the attacked model. Because a few shadow models do not suffice to estimate the gap
    μ_in - μ_out and the variance of each example, both are assumed to be equal for all examples
    (section VI.D of the paper does so for the variance). Only μ = (μ_in + μ_out) / 2 is estimated
    for each example. The log-likelihood ratio is then gap · (φ - μ) / σ².

    Args:
        target: Confidence of the attacked model, `[N]`.
        shadows: Confidence of the shadow models, `[S, N]`.
        inside: Whether each shadow model was trained on each example, bool `[S, N]`. Each example
            requires at least two shadow models that were trained on it and two that were not.

    Returns:
        (φ - μ) / σ, `[N]`, which is typically larger for members.
    """
    means = []
    squares = torch.zeros((), dtype=target.dtype)
    freedom = 0
    for side in (inside, ~inside):
        means.append((shadows * side).sum(0) / side.sum(0))
        squares = squares + ((shadows - means[-1]) * side).square().sum()
        freedom += int((side.sum(0) - 1).sum())
    return (target - (means[0] + means[1]) / 2) / (squares / freedom).clamp(min=MIN_VARIANCE).sqrt()


@dataclass(frozen=True)
class AttackScore:
    """Scores of a membership inference attack.

    Attributes:
        auroc: Area under the ROC curve.
        auroc_se: Standard error of `auroc`.
        hits: True positive rate at a false positive rate of 1%.
        hits_se: Standard error of `hits`.
        curve: ROC curve as a list of [false positive rate, true positive rate], from [0, 0] to
            [1, 1].
    """

    auroc: float
    auroc_se: float
    hits: float
    hits_se: float
    curve: list[list[float]]

    @property
    def at_chance(self) -> bool:
        """Whether `auroc` differs from 0.5 by at most two standard errors."""
        return abs(self.auroc - 0.5) <= 2 * self.auroc_se


def score_attack(scores: Tensor, member: Tensor, *key: Key) -> AttackScore:
    """Compute how well scores separate members from non-members.

    Standard errors are estimated by bootstrapping members and non-members. They do not include the
    randomness of training.

    Args:
        scores: Scores, larger for members, `[N]`.
        member: Whether each example is a member, bool `[N]`.
        *key: Strings and integers that seed the bootstrap.
    """
    ins = scores[member]
    outs = scores[~member].sort().values
    draws = keyed_generator(*key)
    picked_in = torch.randint(len(ins), (RESAMPLES, len(ins)), generator=draws)
    picked_out = torch.randint(len(outs), (RESAMPLES, len(outs)), generator=draws)
    areas = []
    hits = []
    for i, o in zip(picked_in, picked_out, strict=True):
        resampled = outs[o].sort().values
        areas.append(_roc_area(ins[i], resampled))
        hits.append(_true_positive_rate(ins[i], resampled))
    se = [float(torch.tensor(values, dtype=torch.float64).std()) for values in (areas, hits)]
    return AttackScore(
        _roc_area(ins, outs), se[0], _true_positive_rate(ins, outs), se[1], _curve(ins, outs)
    )


def _roc_area(ins: Tensor, outs: Tensor) -> float:
    """Return P(member score > non-member score), where ties count half.

    Args:
        ins: Scores of members.
        outs: Scores of non-members, in ascending order.
    """
    both = torch.searchsorted(outs, ins) + torch.searchsorted(outs, ins, right=True)
    return float(both.double().mean()) / (2 * len(outs))


def _true_positive_rate(ins: Tensor, outs: Tensor) -> float:
    """Return the true positive rate at a false positive rate of 1%.

    With fewer than 100 non-members, no false positive is allowed.

    Args:
        ins: Scores of members.
        outs: Scores of non-members, in ascending order.
    """
    allowed = int(FALSE_ALARMS * len(outs))
    return float((ins > outs[len(outs) - 1 - allowed]).double().mean())


def _curve(ins: Tensor, outs: Tensor) -> list[list[float]]:
    """Return the points of the ROC curve as [false positive rate, true positive rate]."""
    levels = torch.cat([ins, outs]).unique().flip(0)
    hits = [(ins >= level).double().mean() for level in levels]
    alarms = [(outs >= level).double().mean() for level in levels]
    return [[0.0, 0.0], *([float(a), float(h)] for a, h in zip(alarms, hits, strict=True))]


@dataclass(frozen=True)
class Candidates:
    """Rows of one client for which an attack infers membership in the training set.

    Members are training rows, and non-members are validation and test rows. Members and non-members
    have the same number of rows in each stratum (see `hetero_fl.data.row_strata`), which is the
    class in multiclass tasks.

    Attributes:
        examples: The candidate rows.
        member: Whether each row is a training row, bool `[N]`.
        others: All other training rows, which all shadow runs use for training.
        unit: Index of the patient of each row, int64 `[N]`. Without patients, each row has its own
            index. A shadow run trains either on all candidate rows of a patient or on none.
        stratum: Index of the stratum of each row, int64 `[N]`.
    """

    examples: Examples
    member: Tensor
    others: Examples
    unit: Tensor
    stratum: Tensor

    def shadow_assignments(self, shadows: int, seed: int, client: str) -> Tensor:
        """Choose the candidate rows on which each shadow run trains.

        Shadow runs form pairs. The first run of a pair trains on a random half of the patients of
        each stratum (without patients, of the rows), and the second run on the other half. The
        stratum of a patient is the most common stratum of the patient's rows. Each row is therefore
        used by half of the shadow runs.

        Args:
            shadows: Number of shadow runs, which must be even.
            seed: Seed of the audit.
            client: Client id.

        Returns:
            Whether each shadow run trains on each row, bool `[shadows, N]`.
        """
        unit = self.unit.unique(return_inverse=True)[1]
        label = most_common_stratum(self.stratum, unit)
        assignments = []
        for pair in range(shadows // 2):
            tiebreak = torch.rand(
                len(label),
                generator=keyed_generator("audit", seed, "halves", client, pair),
                dtype=torch.float64,
            )
            # Sort by stratum, in random order within each stratum.
            order = torch.argsort(label.double() + tiebreak)
            chosen = torch.zeros(len(label), dtype=torch.bool)
            chosen[order[pair % 2 :: 2]] = True
            assignments += [chosen[unit], ~chosen[unit]]
        return torch.stack(assignments)

    def shadow_rows(self, inside: Tensor) -> Examples:
        """Return the training rows of a shadow run.

        Args:
            inside: Whether the shadow run trains on each candidate row, bool `[N]`.
        """
        return concatenate_examples(
            [self.others, self.examples.select_rows(inside.nonzero().squeeze(1))]
        )


def candidates(data: FederatedData, client: str, seed: int) -> Candidates:
    """Select the rows of a client for a membership attack at random.

    The number of training rows of each stratum (see `hetero_fl.data.row_strata`) equals the number
    of validation and test rows of the stratum.

    Args:
        data: The data of the run.
        client: Client id.
        seed: Seed of the audit.

    Returns:
        The candidate rows, at most 1000 members and 1000 non-members.

    Raises:
        UserError: If fewer than 5 members and 5 non-members can be selected.
    """
    train = unprocessed_rows(data, client, ["train"])
    holdout = unprocessed_rows(data, client, ["test", "validation"])
    draws = keyed_generator("audit", seed, "candidates", client)
    both = concatenate_examples([train, holdout])
    stratum = row_strata(both.labels, data.task)
    pairs: list[Tensor] = []
    for value in stratum.unique():
        rows = torch.nonzero(stratum == value).squeeze(1)
        sides = [rows[rows < len(train)], rows[rows >= len(train)]]
        n = min(map(len, sides))
        pairs.append(
            torch.stack([side[torch.randperm(len(side), generator=draws)[:n]] for side in sides], 1)
        )
    pair = torch.cat(pairs)
    pair = pair[torch.randperm(len(pair), generator=draws)[:MAX_CANDIDATES]]
    if len(pair) < MIN_CANDIDATES:
        raise ArgumentError(
            f"clients: '{client}' has only {len(pair)} pairs of a training row and another row "
            f"of the same class, but an attack needs {MIN_CANDIDATES}; choose another client"
        )
    chosen = torch.cat([pair[:, 0], pair[:, 1]])
    rest = torch.ones(len(train), dtype=torch.bool)
    rest[pair[:, 0]] = False
    unit = torch.arange(len(both)) if both.patient is None else both.patient
    return Candidates(
        examples=both.select_rows(chosen),
        member=torch.arange(len(chosen)) < len(pair),
        others=train.select_rows(rest.nonzero().squeeze(1)),
        unit=unit[chosen],
        stratum=stratum[chosen],
    )


def train_shadow(
    prepared: PreparedRun, train: Mapping[str, Examples], seed: int, rounds: int
) -> dict[str, SavedModel]:
    """Train a shadow run, which repeats a run with different training rows for some clients.

    The seed of the shadow run also changes initial weights, cohorts, batches and noise.

    Args:
        prepared: The run.
        train: Training rows for some clients, keyed by client id.
        seed: Seed of the shadow run.
        rounds: Number of rounds.

    Returns:
        The final models of these clients, keyed by client id.
    """
    client_rows = prepared.data.client_rows
    resampled = {
        client: {**client_rows[client], "train": RowSelection.all_rows(examples)}
        for client, examples in train.items()
    }
    rows = ClientRows({**client_rows.assigned, **resampled}, client_rows.lazy_partition)
    data = prepared.data.with_rows(rows, unscanned=train)
    original = prepared.federation
    models = (
        {client_id: info.models for client_id, info in original.client_infos.items()}
        if prepared.method.needs.models_per_client
        else [profile.models for profile in original.client_infos.profiles]
    )
    federation = replace(
        original, data=data, seed=seed, evaluated_clients=list(train), _initial={}
    ).with_models(models)
    shadow = replace(prepared, data=data, federation=federation)
    with TemporaryDirectory() as folder:

        def model_path(client_id: str) -> Path:
            return Path(folder) / f"{client_id}.safetensors"

        def save(client_id: str, model: bytes) -> None:
            model_path(client_id).write_bytes(model)

        trainer = shadow.make_trainer()
        try:
            prepared.start.load_into(trainer)
            while trainer.completed < rounds:
                trainer.run_round()
            trainer.evaluate(details=True, save=save)
        finally:
            trainer.executor.close()
        return {
            client_id: SavedModel.load(model_path(client_id), allow_code=True)
            for client_id in train
        }


def shadow_seed(seed: int, shadow: int) -> int:
    """Derive the seed of a shadow run from the seed of the audit and the index of the run."""
    return stream_key("audit", seed, "shadow", shadow) >> 1


def client_logits(model: SavedModel, examples: Examples) -> Tensor:
    """Compute the personalized logits of a saved model for raw examples, `[N, outputs]`."""
    return model.logits(map_rows(examples.x, Preprocess.of_model(model)), personal=True)


def targets(examples: Examples) -> Tensor:
    """Return the labels of examples, with float labels in the default floating-point type."""
    y = examples.labels
    return y.to(torch.get_default_dtype()) if y.is_floating_point() else y
