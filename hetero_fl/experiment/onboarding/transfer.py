"""Information that a finished run provides to a joining client.

The information consists of a backbone, which is the mean of the uploaded backbones; the consensus,
which is the mean prediction of all models; and the public rows of the run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.round_parts import (
    common_part,
    shareable_tensors,
    shared_part,
    shared_parts,
)
from hetero_fl.config import Config, expand_population
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.population import Population
from hetero_fl.core.mapped_tensors import map_rows
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data import Preprocess
from hetero_fl.data.overlap import row_hashes
from hetero_fl.data.preprocessing import usable_rows
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import PreparedRun, make_algorithm, prepare
from hetero_fl.federation.federation import protect
from hetero_fl.reporting.run import Run
from hetero_fl.utils.errors import ArgumentError, UserError

BODY = ("backbone.",)


@dataclass
class TransferSource:
    """A finished run that provides initial tensors and predictions to a joining client.

    Only information that clients shared is used, which is the uploaded parts of models and the
    predictions of models.

    Args:
        run: The finished run.
        notes: Notes for the report of the results. Methods append notes to this list.
    """

    run: Run
    notes: list[str] = field(default_factory=list)

    @cached_property
    def config(self) -> Config:
        """Resolved configuration of the run."""
        return load_config(self.run.config(), allow_code=self.run.permission)

    @cached_property
    def clients(self) -> Population:
        """Clients of the run."""
        return expand_population(self.config.clients)

    @cached_property
    def method(self) -> Algorithm:
        """The algorithm of the run, with its settings."""
        return make_algorithm(self.config)

    @cached_property
    def models(self) -> dict[str, SavedModel]:
        """Final models of the clients, keyed by client id."""
        return {
            client_id: model
            for client_id, model in self.run.models.items()
            if client_id in self.clients
        }

    @property
    def task(self) -> Task:
        """Task of the run."""
        return next(iter(self.models.values())).task

    @property
    def most_common_model(self) -> str:
        """Name of the most frequent model, or of the first such model in a tie."""
        names = Counter(self.clients[client_id].model[0].name for client_id in self.models)
        return names.most_common(1)[0][0]

    def settings_for(self, name: str) -> tuple[ClientSettings, bool]:
        """Return client settings for a model, and whether a client of the run has this model.

        The settings are those of the first client with the model. If there is no such client, the
        default settings of the run are returned.
        """
        for client_id in self.models:
            if self.clients[client_id].model[0].name == name:
                return self.clients[client_id], True
        return self.config.clients.defaults, False

    def backbone(self, arch: ModelSpec) -> Tensors | None:
        """Return the mean of the backbone tensors that clients with an architecture shared.

        All clients have the same weight. Tensors that no client shared are omitted.

        Args:
            arch: The architecture.

        Returns:
            The mean tensors, keyed by name, or None if no backbone tensor was shared.
        """
        if "model" not in shared_parts(self.method):
            return None
        # Saved models do not contain the privacy settings of the run.
        protected = protect(arch, self.config.privacy)
        sent = []
        for client_id, model in self.models.items():
            part = common_part(shared_part(self.method, self.clients[client_id]), BODY)
            if model.arch == arch and part != ():
                sent.append(shareable_tensors(self.method, protected, model.tensors, part))
        names = dict.fromkeys(n for tensors in sent for n in tensors)
        means = {n: torch.stack([t[n] for t in sent if n in t]).mean(0) for n in names}
        return means or None

    def consensus(self, x: Tensor) -> Tensor:
        """Combine the predictions of all clients' models on raw rows.

        Each model uses the preprocessing of its client. If a row lacks values that a model needs,
        the model is skipped for this row.

        Args:
            x: Raw rows, `[N, ...]`.

        Returns:
            Logits of the mean probabilities, or the mean predictions for regression,
            `[N, outputs]`. Rows that no model can use contain NaN.

        Raises:
            UserError: If the rows do not fit the models.
        """
        logits = []
        usable = []
        for model in self.models.values():
            preprocess = Preprocess.of_model(model)
            found = preprocess.shape(tuple(x.shape[1:]), "the run's preprocessing")
            if found != model.arch.input_shape:
                raise ArgumentError(
                    f"data: examples have shape {found} after preprocessing, "
                    f"but the run's models expect {model.arch.input_shape}"
                )
            usable.append(usable_rows(x, preprocess))
            logits.append(model.logits(map_rows(x, preprocess)))
        mask = torch.stack(usable)[..., None]
        count = mask.sum(0)
        stacked = torch.stack(logits)

        def mean(values: Tensor) -> Tensor:
            return values.masked_fill(~mask, 0.0).sum(0) / count

        if self.task.kind == "regression":
            return mean(stacked)
        if self.task.kind == "multilabel":
            return mean(stacked.sigmoid()).logit(eps=1e-7)
        return stacked.log_softmax(-1).masked_fill(~mask, -torch.inf).logsumexp(0) - count.log()

    @cached_property
    def prepared(self) -> PreparedRun | None:
        """The run, prepared again with its data.

        If the data is not available or has changed, the value is None and a note is added to
        `notes`.
        """
        known: dict[str, Any] = self.run.summary["data"]
        try:
            prepared = prepare(self.config)
        except UserError as error:
            self.notes.append(f"the run's data is not available ({error})")
            return None
        data = prepared.data
        found = {
            "name": data.name,
            "n_train": data.n_train,
            "n_proxy": data.n_proxy,
            "n_test": data.n_test,
        }
        if any(known[key] != value for key, value in found.items()):
            self.notes.append("the run's data has changed since the run")
            return None
        return prepared

    @property
    def public(self) -> Tensor | None:
        """Raw public rows of the run, or None if there are none or the data is not available."""
        if self.prepared is None or not self.prepared.data.n_proxy:
            return None
        return self.prepared.data.raw_examples("proxy")

    def num_seen(self, x: Tensor) -> int:
        """Return the number of raw rows that were training rows in the run.

        The result is 0 if the data of the run is not available or has another shape.
        """
        if self.prepared is None or tuple(x.shape[1:]) != self.prepared.data.input_shape:
            return 0
        given = row_hashes(x)
        seen = np.zeros(len(given), dtype=bool)
        for rows in self.prepared.data.private_rows():
            seen |= np.isin(given, row_hashes(rows))
        return int(seen.sum())

    def overlap(self, x: Tensor, rows: str, description: str) -> str:
        """Describe how many raw rows were training rows in the run.

        The text is empty if there are no such rows.

        Args:
            x: Raw rows, `[N, ...]`.
            rows: Description of the rows, for the note.
            description: Description of the models whose scores are too optimistic, for the note.
        """
        count = self.num_seen(x)
        if not count:
            return ""
        verb = "is also in the run's" if count == 1 else "are also in the run's"
        return (
            f"{count} of {rows} {verb} training rows: scores are too optimistic for {description}"
        )
