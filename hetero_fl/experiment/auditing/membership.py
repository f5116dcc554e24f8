"""Membership inference attacks that use the loss or shadow runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from hetero_fl.core.objectives import supervised_loss
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data import FederatedData, row_strata
from hetero_fl.data.client_rows import ClientRows
from hetero_fl.data.dataset import Examples, concatenate_examples
from hetero_fl.data.federated_data import unprocessed_rows
from hetero_fl.data.inference import logits_of_rows
from hetero_fl.data.partition.units import most_common_stratum
from hetero_fl.data.splits import RowSelection
from hetero_fl.experiment.preparation import PreparedRun
from hetero_fl.reporting.run import Run
from hetero_fl.utils.errors import ArgumentError
from hetero_fl.utils.seeding import keyed_generator, stream_key
from hetero_fl.utils.text import pluralize

# False positive rate at which the true positive rate is computed.
FALSE_ALARMS = 0.01
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
        logits: Model outputs, float64 `[N, outputs]`.
        y: Class indices `[N]`, or targets `[N, outputs]`.

    Returns:
        Confidence, float64 `[N]`.
    """
    if task.kind == "multiclass":
        others = logits.scatter(1, y[:, None], -torch.inf).logsumexp(1)
        return logits.gather(1, y[:, None]).squeeze(1) - others
    if task.kind == "multilabel":
        return ((2 * y - 1) * logits).mean(1)
    return -supervised_loss(task.kind, logits, y).clamp(min=MIN_VARIANCE).log()


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
    mean_in = (shadows * inside).sum(0) / inside.sum(0)
    mean_out = (shadows * ~inside).sum(0) / (~inside).sum(0)
    residuals = shadows - torch.where(inside, mean_in, mean_out)
    # Two means are estimated for each example.
    variance = residuals.square().sum() / (shadows.numel() - 2 * len(target))
    return (target - (mean_in + mean_out) / 2) / variance.clamp(min=MIN_VARIANCE).sqrt()


def score_attack(scores: Tensor, member: Tensor) -> dict[str, Any]:
    """Compute how well scores separate members from non-members.

    Args:
        scores: Scores, larger for members, `[N]`.
        member: Whether each example is a member, bool `[N]`.

    Returns:
        A dictionary with these keys:

        - `auroc`: area under the ROC curve.
        - `auroc_se`: standard error of `auroc` for random examples (see `auroc_error`). It does not
          include the randomness of training.
        - `hits`: true positive rate at a false positive rate of 1%. With fewer than 100
          non-members, no false positive is allowed.
        - `curve`: ROC curve as a list of [false positive rate, true positive rate], from [0, 0] to
          [1, 1].
        - `at_chance`: whether `auroc` differs from 0.5 by at most two standard errors.
    """
    levels = scores.unique().flip(0)[:, None]
    hits = torch.cat([torch.zeros(1), (scores[member] >= levels).double().mean(1)])
    alarms = torch.cat([torch.zeros(1), (scores[~member] >= levels).double().mean(1)])
    auroc = float(torch.trapezoid(hits, alarms))
    error = auroc_error(auroc, int(member.sum()), int((~member).sum()))
    return {
        "auroc": auroc,
        "auroc_se": error,
        "hits": float(hits[alarms <= FALSE_ALARMS].max()),
        "curve": torch.stack([alarms, hits], 1).tolist(),
        "at_chance": abs(auroc - 0.5) <= 2 * error,
    }


def auroc_error(auroc: float, positives: int, negatives: int) -> float:
    """Return the standard error of an area under the ROC curve.

    This is equation 1 of Hanley & McNeil (1982), with the probabilities of equation 2.

    Args:
        auroc: The area, from 0 to 1.
        positives: Number of positive examples.
        negatives: Number of negative examples.
    """
    # Probability that two positive examples have larger scores than one negative example.
    two_positives = auroc / (2 - auroc)
    # Probability that one positive example has a larger score than two negative examples.
    two_negatives = 2 * auroc**2 / (1 + auroc)
    variance = (
        auroc * (1 - auroc)
        + (positives - 1) * (two_positives - auroc**2)
        + (negatives - 1) * (two_negatives - auroc**2)
    ) / (positives * negatives)
    return sqrt(variance)


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
            draws = keyed_generator("audit", seed, "halves", client, pair)
            tiebreak = torch.rand(len(label), generator=draws, dtype=torch.float64)
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
        chosen = [side[torch.randperm(len(side), generator=draws)[:n]] for side in sides]
        pairs.append(torch.stack(chosen, 1))
    pair = torch.cat(pairs)
    pair = pair[torch.randperm(len(pair), generator=draws)[:MAX_CANDIDATES]]
    if len(pair) < MIN_CANDIDATES:
        raise ArgumentError(
            f"clients: '{client}' has only {len(pair)} pairs of a training row and another row "
            f"of the same class, but an attack needs {MIN_CANDIDATES}; choose another client"
        )
    rows = pair.T.flatten()
    is_other = torch.ones(len(train), dtype=torch.bool)
    is_other[pair[:, 0]] = False
    unit = torch.arange(len(both)) if both.patient is None else both.patient
    return Candidates(
        examples=both.select_rows(rows),
        member=rows < len(train),
        others=train.select_rows(is_other.nonzero().squeeze(1)),
        unit=unit[rows],
        stratum=stratum[rows],
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
    known = prepared.data.client_rows
    resampled = {
        client: {**known[client], "train": RowSelection.all_rows(examples)}
        for client, examples in train.items()
    }
    rows = ClientRows({**known.assigned, **resampled}, known.lazy_partition)
    data = prepared.data.with_rows(rows, unscanned=train)
    infos = prepared.federation.client_infos
    models = (
        {client_id: info.models for client_id, info in infos.items()}
        if prepared.method.needs.models_per_client
        else [profile.models for profile in infos.profiles]
    )
    federation = replace(
        prepared.federation, data=data, seed=seed, evaluated_clients=list(train), _initial={}
    ).with_models(models)
    trainer = replace(prepared, data=data, federation=federation).make_trainer()
    with TemporaryDirectory() as folder:

        def save(name: str, model: bytes) -> None:
            (Path(folder) / name).write_bytes(model)

        try:
            prepared.start.load_into(trainer)
            while trainer.completed < rounds:
                trainer.run_round()
            trainer.evaluate(details=True, save=save)
        finally:
            trainer.executor.close()
        return {client: SavedModel.load(Path(folder) / client, allow_code=True) for client in train}


def attack_membership(
    run: Run,
    prepared: PreparedRun,
    clients: Sequence[str],
    *,
    shadows: int,
    seed: int,
    notes: list[str],
    log: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Attack the last models of clients by the loss and, with shadow runs, by LiRA.

    Args:
        run: The run, with its models.
        prepared: The same run, prepared with its data.
        clients: Ids of the clients to attack.
        shadows: Number of shadow runs. If 0, only the loss attack is made.
        seed: Seed of the audit.
        notes: List to which remarks about the results are appended.
        log: Function that is called with each line of progress.

    Returns:
        One dictionary for each client and attack, with the keys `client`, `attack` ("loss" or
        "lira"), `members`, `others` (numbers of rows), and those of `score_attack`.
    """
    task = prepared.data.task
    rows = {client: candidates(prepared.data, client, seed) for client in clients}
    if any(c.examples.time is not None for c in rows.values()):
        notes.append(
            "rows are split by date: non-members are later than members, so the loss attack "
            "may detect dates instead of membership"
        )
    scores: dict[tuple[str, str], Tensor] = {}
    for client, c in rows.items():
        logits = logits_of_rows(run.models[client], c.examples.x, personal=True).double()
        scores[client, "loss"] = -supervised_loss(task.kind, logits, _targets(c.examples))
    if shadows:
        ratios = _likelihood_ratios(run, prepared, rows, shadows=shadows, seed=seed, log=log)
        scores |= {(client, "lira"): ratio for client, ratio in ratios.items()}
    return [
        {
            "client": client,
            "attack": attack,
            "members": int(c.member.sum()),
            "others": int((~c.member).sum()),
            **score_attack(scores[client, attack], c.member),
        }
        for client, c in rows.items()
        for attack in ("loss", "lira")
        if (client, attack) in scores
    ]


def _likelihood_ratios(
    run: Run,
    prepared: PreparedRun,
    rows: Mapping[str, Candidates],
    *,
    shadows: int,
    seed: int,
    log: Callable[[str], None],
) -> dict[str, Tensor]:
    """Train the shadow runs and return the scores of the candidate rows of each client."""
    rounds = run.summary["rounds_completed"]
    seconds = run.summary["seconds"]["training"]
    log(
        f"{pluralize(shadows, 'shadow run')} of {pluralize(rounds, 'round')}; "
        f"the run itself trained for {seconds:.0f} s"
    )
    inside = {client: c.shadow_assignments(shadows, seed, client) for client, c in rows.items()}
    found: dict[str, list[Tensor]] = {client: [] for client in rows}

    def add_confidence(models: Mapping[str, SavedModel]) -> None:
        for client, c in rows.items():
            logits = logits_of_rows(models[client], c.examples.x, personal=True).double()
            found[client].append(confidence(prepared.data.task, logits, _targets(c.examples)))

    for shadow in range(shadows):
        started = time.perf_counter()
        train = {client: c.shadow_rows(inside[client][shadow]) for client, c in rows.items()}
        shadow_seed = stream_key("audit", seed, "shadow", shadow) >> 1
        add_confidence(train_shadow(prepared, train, shadow_seed, rounds))
        log(f"shadow {shadow + 1} of {shadows}: {time.perf_counter() - started:.0f} s")
    add_confidence(run.models)
    return {
        client: likelihood_ratio(target, torch.stack(of_shadows), inside[client])
        for client, (*of_shadows, target) in found.items()
    }


def _targets(examples: Examples) -> Tensor:
    """Return class indices, or float64 targets."""
    return examples.labels.double() if examples.labels.is_floating_point() else examples.labels
