"""Membership inference with shadow runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from hetero_fl.core.objectives import supervised_loss
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data import FederatedData, Preprocess, row_strata
from hetero_fl.data.client_rows import ClientRows
from hetero_fl.data.dataset import Examples, RowSelection, concatenate_examples
from hetero_fl.data.federated_data import unprocessed_rows
from hetero_fl.data.partition import most_common_stratum
from hetero_fl.experiment.preparation import PreparedRun
from hetero_fl.experiment.runner import load_inherited_models
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.seeding import Key, keyed_generator, stream_key

# Membership inference: the scores of an attack, and what they are worth. Tensors in, numbers out.

FALSE_ALARMS = 0.01  # the rate at which hits are counted
RESAMPLES = 1000  # of the bootstrap
SMALLEST = 1e-12  # a variance, and a squared error


def confidence(task: Task, logits: Tensor, y: Tensor) -> Tensor:
    """How sure a model is of what is true, on a scale on which that is about normal, float64 `[N]`.

    Classes: the log-odds of the true one, log p_y − log(1 − p_y) (Carlini et al. 2022, section V.A), computed from the logits
    so that no certainty overflows. Labels: the mean over them. Regression: minus the logarithm of the mean squared error.
    """
    z = logits.double()
    if task.kind == "multiclass":
        others = z.scatter(1, y[:, None], -torch.inf).logsumexp(1)
        return z.gather(1, y[:, None]).squeeze(1) - others
    if task.kind == "multilabel":
        return ((2 * y - 1) * z).mean(1)
    return -supervised_loss(task.kind, z, y.double()).clamp(min=SMALLEST).log()


def loss_score(task: Task, logits: Tensor, y: Tensor) -> Tensor:
    """Minus the loss: whoever is fitted well is taken for a member (Yeom et al. 2018), float64 `[N]`."""
    return -supervised_loss(task.kind, logits.double(), y.double() if y.is_floating_point() else y)


def likelihood_ratio(target: Tensor, shadows: Tensor, inside: Tensor) -> Tensor:
    """Log-likelihood ratio of each example's being a member, up to a factor common to all, `[N]` (after Carlini et al. 2022).

    LiRA compares N(φ; μ_in, σ²_in) with N(φ; μ_out, σ²_out). Of few shadows no example's gap μ_in − μ_out can be told, and no
    variance. So the gap and the variance σ² are those of all examples (as section VI.D of the paper has the variance), and an
    example's own is only its level μ = (μ_in + μ_out)/2. The ratio is gap·(φ − μ)/σ² then: how much surer the model is
    than other models are, half of them trained on the example. Returned is (φ − μ)/σ; members are the surer.

    Args:
        target: confidence of the attacked model, `[N]`.
        shadows: of the shadow models, `[S, N]`.
        inside: which of them were trained on the example, bool `[S, N]`; at least two with and two without it.
    """
    means = []
    squares = torch.zeros((), dtype=target.dtype)
    freedom = 0
    for side in (inside, ~inside):
        means.append((shadows * side).sum(0) / side.sum(0))
        squares = squares + ((shadows - means[-1]) * side).square().sum()
        freedom += int((side.sum(0) - 1).sum())
    return (target - (means[0] + means[1]) / 2) / (squares / freedom).clamp(min=SMALLEST).sqrt()


@dataclass(frozen=True)
class AttackScore:
    """What an attack achieved: area under its ROC curve, hits at 1% false alarms, their standard errors, and the curve."""

    auroc: float
    auroc_se: float
    hits: float
    hits_se: float
    curve: list[list[float]]  # [false alarms, hits], from (0, 0) to (1, 1)

    @property
    def at_chance(self) -> bool:
        """Whether one half lies within two standard errors of the area."""
        return abs(self.auroc - 0.5) <= 2 * self.auroc_se


def score_attack(scores: Tensor, member: Tensor, *key: Key) -> AttackScore:
    """Of scores `[N]`, high for members, and who is one, bool `[N]`. Standard errors by a bootstrap over members and over
    non-members, drawn by the key; they do not know of the luck of training, in the target or in the shadows."""
    ins = scores[member]
    outs = scores[~member].sort().values
    draws = keyed_generator(*key)
    picked_in = torch.randint(len(ins), (RESAMPLES, len(ins)), generator=draws)
    picked_out = torch.randint(len(outs), (RESAMPLES, len(outs)), generator=draws)
    areas = []
    hits = []
    for i, o in zip(picked_in, picked_out, strict=True):
        some = outs[o].sort().values
        areas.append(_roc_area(ins[i], some))
        hits.append(_true_positive_rate(ins[i], some))
    se = [float(torch.tensor(values, dtype=torch.float64).std()) for values in (areas, hits)]
    return AttackScore(
        _roc_area(ins, outs), se[0], _true_positive_rate(ins, outs), se[1], _curve(ins, outs)
    )


def _roc_area(ins: Tensor, outs: Tensor) -> float:
    """P(a member's score is above a non-member's), ties counted half; `outs` sorted."""
    both = torch.searchsorted(outs, ins) + torch.searchsorted(outs, ins, right=True)
    return float(both.double().mean()) / (2 * len(outs))


def _true_positive_rate(ins: Tensor, outs: Tensor) -> float:
    """Share of members above a threshold that at most so many non-members exceed; `outs` sorted. Of fewer than a hundred
    non-members none may."""
    allowed = int(FALSE_ALARMS * len(outs))
    return float((ins > outs[len(outs) - 1 - allowed]).double().mean())


def _curve(ins: Tensor, outs: Tensor) -> list[list[float]]:
    """The ROC curve's corners."""
    levels = torch.cat([ins, outs]).unique().flip(0)
    hits = [(ins >= level).double().mean() for level in levels]
    alarms = [(outs >= level).double().mean() for level in levels]
    return [[0.0, 0.0], *([float(a), float(h)] for a, h in zip(alarms, hits, strict=True))]


# Shadow runs: what a run's models would be with other halves of the rows in question among a
# client's training rows.

MOST = 1000  # members in question of a client, and as many non-members
FEWEST = 5


@dataclass(frozen=True)
class Candidates:
    """The rows in question of one client: as many members as non-members, of each class as many of the one as of the other.

    Both were dealt to this client and told apart by a draw, so that nothing but training can tell them apart again.
    """

    examples: Examples
    member: Tensor  # bool [N]
    others: Examples  # its other training rows: in every shadow's training set, too
    unit: Tensor  # int64 [N], whose row it is: a patient's rows are in or out together
    stratum: Tensor  # int64 [N]

    def shadow_assignments(self, shadows: int, seed: int, client: str) -> Tensor:
        """Which rows each shadow trains on, bool `[shadows, N]`: drawn half of each class, and the other half for the next
        shadow, so that every row is in half of them."""
        unit = self.unit.unique(return_inverse=True)[1]
        label = most_common_stratum(self.stratum, unit)
        drawn = []
        for pair in range(shadows // 2):
            turn = torch.rand(
                len(label),
                generator=keyed_generator("audit", seed, "halves", client, pair),
                dtype=torch.float64,
            )
            order = torch.argsort(label.double() + turn)  # class by class, at random within each
            chosen = torch.zeros(len(label), dtype=torch.bool)
            chosen[order[pair % 2 :: 2]] = True
            drawn += [chosen[unit], ~chosen[unit]]
        return torch.stack(drawn)

    def shadow_rows(self, inside: Tensor) -> Examples:
        """A shadow's training rows: about as many as the client has."""
        return concatenate_examples(
            [self.others, self.examples.select_rows(inside.nonzero().squeeze(1))]
        )


def candidates(data: FederatedData, client: str, seed: int) -> Candidates:
    """Members: training rows. Non-members: test and validation rows, on which no parameter was ever trained.

    Raises UserError where too few are left once classes are matched.
    """
    train = unprocessed_rows(data, client, ["train"])
    held = unprocessed_rows(data, client, ["test", "validation"])
    task = data.task
    draws = keyed_generator("audit", seed, "candidates", client)
    both = concatenate_examples([train, held])
    stratum = row_strata(both.labels, task)
    pairs: list[Tensor] = []
    for kind in stratum.unique():
        rows = torch.nonzero(stratum == kind).squeeze(1)
        sides = [rows[rows < len(train)], rows[rows >= len(train)]]
        n = min(map(len, sides))
        pairs.append(
            torch.stack([side[torch.randperm(len(side), generator=draws)[:n]] for side in sides], 1)
        )
    pair = torch.cat(pairs)
    pair = pair[torch.randperm(len(pair), generator=draws)[:MOST]]
    if len(pair) < FEWEST:
        raise UserError(
            f"--clients: '{client}' has {len(pair)} rows that it did not train on and of which there is a training row of the "
            f"same class; an attack needs {FEWEST}; choose another client"
        )
    chosen = torch.cat([pair[:, 0], pair[:, 1]])
    rest = torch.ones(len(train), dtype=torch.bool)
    rest[pair[:, 0]] = False
    unit = torch.arange(len(both)) if both.patient is None else both.patient
    member = torch.arange(len(chosen)) < len(pair)
    return Candidates(
        both.select_rows(chosen), member, train.select_rows(rest.nonzero().squeeze(1)), unit[chosen], stratum[chosen]
    )  # fmt: skip


def train_shadow(
    prepared: PreparedRun,
    train: Mapping[str, Examples],
    seed: int,
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, SavedModel]:
    """The run once more, with these training rows of some clients and random draws of its own (initial weights, cohorts,
    batches, noise): those clients' models at the end."""
    held = prepared.data.client_rows
    resampled = {
        client: {**held[client], "train": RowSelection.all_rows(examples)}
        for client, examples in train.items()
    }
    rows = ClientRows({**held.assigned, **resampled}, held.lazy_partition)
    data = prepared.data.with_rows(rows, unscanned=train)
    method = prepared.method
    before = prepared.federation
    models = (
        {id: info.models for id, info in before.client_infos.items()}
        if method.needs.models_per_client
        else [profile.models for profile in before.client_infos.profiles]
    )
    federation = replace(
        before, data=data, seed=seed, evaluated_clients=list(train), _initial={}
    ).with_models(models)
    shadow = replace(prepared, data=data, federation=federation)
    with TemporaryDirectory() as folder:

        def save(client_id: str, model: bytes) -> None:
            (Path(folder) / f"{client_id}.safetensors").write_bytes(model)

        course = shadow.make_trainer()
        try:
            load_inherited_models(prepared.inherited, course)
            while course.completed < rounds:
                course.run_round()
                say(f"round {course.completed} of {rounds}")
            course.evaluate(details=True, save=save)
        finally:
            course.executor.close()
        return {
            id: SavedModel.load(Path(folder) / f"{id}.safetensors", allow_code=True) for id in train
        }


def shadow_seed(seed: int, shadow: int) -> int:
    """The seed of a shadow's own draws."""
    return stream_key("audit", seed, "shadow", shadow) >> 1


def client_logits(model: SavedModel, examples: Examples) -> Tensor:
    """Logits of a saved model for a client's rows, as it reads its own, `[N, outputs]`."""
    return model.logits(Preprocess(**model.preprocess)(examples.x), personal=True)


def targets(examples: Examples) -> Tensor:
    """What is true of a client's rows, as losses take it."""
    y = examples.labels
    return y.to(torch.get_default_dtype()) if y.is_floating_point() else y
