"""What a finished run leaves to somebody who was not in it: a shared backbone, a consensus, and the public rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import common_part, shareable_tensors, shared_part, shared_part_of
from hetero_fl.config import Config, expand_population
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.population import Population
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data import Preprocess
from hetero_fl.data.preprocessing import usable_rows
from hetero_fl.experiment.preparation import PreparedRun, load_config, make_algorithm, prepare
from hetero_fl.reporting.run import Run
from hetero_fl.utils.errors import UserError

BODY = ("backbone.",)


@dataclass
class TransferSource:
    """A finished run as a newcomer finds it. Only what clients were willing to share leaves it: the part of their models that
    travelled, and predictions."""

    run: Run
    notes: list[str] = field(default_factory=list)

    @cached_property
    def config(self) -> Config:
        """The run's resolved configuration."""
        return load_config(self.run.path / "config.yaml", allow_code=self.run.permission)

    @cached_property
    def clients(self) -> Population:
        """Who took part."""
        return expand_population(self.config.clients)

    @cached_property
    def method(self) -> Algorithm:
        """The method, with the run's settings."""
        return make_algorithm(self.config)

    @cached_property
    def models(self) -> dict[str, SavedModel]:
        """The clients' models as they were used last."""
        return {id: model for id, model in self.run.models.items() if id in self.clients}

    @property
    def task(self) -> Task:
        """What was learned."""
        return next(iter(self.models.values())).task

    @property
    def most_common_model(self) -> str:
        """The name of the most frequent model; of equals the first client's."""
        return Counter(self.clients[id].model[0].name for id in self.models).most_common(1)[0][0]

    def settings_for(self, name: str) -> tuple[ClientSettings, bool]:
        """How somebody with a model of that name trains: as the first client of the run that has it; else by the run's
        defaults, with that model's. Whether anybody has it is the second."""
        for id in self.models:
            if self.clients[id].model[0].name == name:
                return self.clients[id], True
        return self.config.clients.defaults, False

    def backbone(self, arch: ModelSpec) -> Tensors | None:
        """The mean of what clients with this architecture shared of their backbones; None if nobody did."""
        if shared_part_of(self.method).slot != "model":
            return None
        sent = []
        for id, model in self.models.items():
            part = common_part(shared_part(self.method, self.clients[id]), BODY)
            if model.arch == arch and part != ():
                sent.append(shareable_tensors(self.method, arch, model.tensors, part))
        names = dict.fromkeys(n for tensors in sent for n in tensors)
        return {n: torch.stack([t[n] for t in sent if n in t]).mean(0) for n in names} or None

    def consensus(self, x: Tensor) -> Tensor:
        """Logits `[N, outputs]` of all clients' models together, each through its own preprocessing, on raw rows: the log of
        their mean probability; of regressions the mean. Whose view has nothing of a row, or lacks what it has to see, says
        nothing of it; NaN where all are silent."""
        said = []
        able = []
        for model in self.models.values():
            view = Preprocess(**model.preprocess)
            found = view.shape(tuple(x.shape[1:]), "the run's preprocessing")
            if found != model.arch.input_shape:
                raise UserError(
                    f"--data: examples are {found} to the run's models, which take {model.arch.input_shape}"
                )
            able.append(usable_rows(x, view))
            said.append(model.logits(view(x)))
        sees = torch.stack(able)[..., None]
        count = sees.sum(0)

        def mean(values: Tensor) -> Tensor:
            return values.masked_fill(~sees, 0.0).sum(0) / count

        if self.task.kind == "regression":
            return mean(torch.stack(said))
        if self.task.kind == "multilabel":
            return mean(torch.stack(said).sigmoid()).logit(eps=1e-7)
        return (
            torch.stack(said).log_softmax(-1).masked_fill(~sees, -torch.inf).logsumexp(0)
            - count.log()
        )

    @cached_property
    def data(self) -> PreparedRun | None:
        """The run's data, dealt out as it was; None, with a note, where it cannot be had here."""
        known: dict[str, Any] = self.run.summary["data"]
        try:
            prepared = prepare(self.config)
        except UserError as error:
            self.notes.append(f"the run's own data cannot be had here ({error})")
            return None
        data = prepared.data
        found = {
            "name": data.name,
            "n_train": data.n_train,
            "n_proxy": data.n_proxy,
            "n_test": data.n_test,
        }
        if any(known[key] != value for key, value in found.items()):
            self.notes.append("the run's own data is not what its configuration names now")
            return None
        return prepared

    @property
    def public(self) -> Tensor | None:
        """The run's public rows, raw; None if it had none, or they cannot be had here."""
        return (
            self.data.data.raw_examples("proxy")
            if self.data is not None and self.data.data.n_proxy
            else None
        )

    def num_seen(self, x: Tensor) -> int:
        """How many of these raw rows somebody in the run has trained on."""
        if self.data is None or tuple(x.shape[1:]) != self.data.data.input_shape:
            return 0
        mine = rows_as_bytes(x)
        asked = set(mine)
        known: set[bytes] = set()
        for rows in self.data.data.private_rows():
            known |= asked.intersection(rows_as_bytes(rows))
        return sum(map(known.__contains__, mine))

    def overlap(self, x: Tensor, rows: str, description: str) -> str:
        """Return a note on raw rows that somebody in the run has trained on; empty if there are none.

        Args:
            x: The raw rows.
            rows: What they are called.
            description: Who or what has too good figures because of them.
        """
        count = self.num_seen(x)
        verb = "is also in the run's" if count == 1 else "are also in the run's"
        return (
            f"{count} of {rows} {verb} training rows: figures flatter {description}"
            if count
            else ""
        )


def rows_as_bytes(x: Tensor) -> list[bytes]:
    """The bytes of each row."""
    flat = np.ascontiguousarray(x.flatten(1).numpy())
    found: list[bytes] = flat.view(np.dtype((np.void, flat.itemsize * flat.shape[1])))[
        :, 0
    ].tolist()
    return found
