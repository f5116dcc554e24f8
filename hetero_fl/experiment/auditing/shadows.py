"""Shadow runs: what a run's models would be with other halves of the rows in question among a client's training rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from hetero_fl.data import FederatedData, Preprocess, strata
from hetero_fl.data.base import Examples
from hetero_fl.data.patients import commonest
from hetero_fl.data.resampled import Resampled, as_made, joined
from hetero_fl.errors import UserError
from hetero_fl.experiment.course import start_from
from hetero_fl.experiment.prepared import Prepared
from hetero_fl.saved import SavedModel
from hetero_fl.seeding import generator, key

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

    def halves(self, shadows: int, seed: int, client: str) -> Tensor:
        """Which rows each shadow trains on, bool `[shadows, N]`: drawn half of each class, and the other half for the next
        shadow, so that every row is in half of them."""
        unit = self.unit.unique(return_inverse=True)[1]
        label, drawn = commonest(self.stratum, unit), []
        for pair in range(shadows // 2):
            turn = torch.rand(
                len(label), generator=generator("audit", seed, "halves", client, pair), dtype=torch.float64
            )
            order = torch.argsort(label.double() + turn)  # class by class, at random within each
            chosen = torch.zeros(len(label), dtype=torch.bool)
            chosen[order[pair % 2 :: 2]] = True
            drawn += [chosen[unit], ~chosen[unit]]
        return torch.stack(drawn)

    def training(self, inside: Tensor) -> Examples:
        """A shadow's training rows: about as many as the client has."""
        return joined([self.others, self.examples.take(inside.nonzero().squeeze(1))])


def candidates(data: FederatedData, client: str, seed: int) -> Candidates:
    """Members: training rows. Non-members: test and validation rows, on which no parameter was ever trained.

    Raises UserError where too few are left once classes are matched.
    """
    train, held = as_made(data, client, ["train"]), as_made(data, client, ["test", "validation"])
    task, draws = data.task, generator("audit", seed, "candidates", client)
    both = joined([train, held])
    stratum = strata(_targets(both), task)
    pairs: list[Tensor] = []
    for kind in stratum.unique():
        rows = torch.nonzero(stratum == kind).squeeze(1)
        sides = [rows[rows < len(train)], rows[rows >= len(train)]]
        n = min(map(len, sides))
        pairs.append(torch.stack([side[torch.randperm(len(side), generator=draws)[:n]] for side in sides], 1))
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
        both.take(chosen), member, train.take(rest.nonzero().squeeze(1)), unit[chosen], stratum[chosen]
    )  # fmt: skip


def train_shadow(
    prepared: Prepared, train: Mapping[str, Examples], seed: int, rounds: int, say: Callable[[str], None]
) -> dict[str, SavedModel]:
    """The run once more, with these training rows of some clients and random draws of its own (initial weights, cohorts,
    batches, noise): those clients' models at the end."""
    data, method, before = Resampled(prepared.data, train), prepared.method, prepared.federation
    archs = (
        {id: card.arch for id, card in before.cards.items()}
        if method.one_by_one
        else [k.arch for k in before.cards.kinds]
    )
    federation = replace(before, data=data, seed=seed, readers=list(train), _initial={}).with_models(archs)
    shadow = replace(prepared, data=data, federation=federation)
    with TemporaryDirectory() as folder:

        def save(id: str, model: bytes) -> None:
            (Path(folder) / f"{id}.safetensors").write_bytes(model)

        course = shadow.rounds()
        try:
            start_from(prepared.inherited, course)
            while course.completed < rounds:
                course.round()
                say(f"round {course.completed} of {rounds}")
            course.evaluate(details=True, save=save)
        finally:
            course.executor.close()
        return {id: SavedModel.load(Path(folder) / f"{id}.safetensors", allow_code=True) for id in train}


def shadow_seed(seed: int, shadow: int) -> int:
    """The seed of a shadow's own draws."""
    return key("audit", seed, "shadow", shadow) >> 1


def answers(model: SavedModel, examples: Examples) -> Tensor:
    """Logits of a saved model for a client's rows, as it reads its own, `[N, outputs]`."""
    return model.logits(Preprocess(**model.preprocess)(examples.x), home=True)


def _targets(examples: Examples) -> Tensor:
    assert examples.y is not None
    return examples.y


def targets(examples: Examples) -> Tensor:
    """What is true of a client's rows, as losses take it."""
    y = _targets(examples)
    return y.to(torch.get_default_dtype()) if y.is_floating_point() else y
