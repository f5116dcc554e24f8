"""Information that a finished run provides to a joining client.

The information consists of a backbone, which is the mean of the uploaded backbones; the consensus,
which is the mean prediction of all models; and the public rows of the run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

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
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data import Preprocess
from hetero_fl.data.inference import logits_of_rows
from hetero_fl.data.preprocessing import usable_rows
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.finished_runs import prepare_again
from hetero_fl.experiment.preparation import PreparedRun, make_algorithm
from hetero_fl.federation.federation import protect
from hetero_fl.reporting.run import Run
from hetero_fl.utils.errors import UserError

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

        """
        models = self.models.values()
        usable = torch.stack([usable_rows(x, Preprocess.of_model(model)) for model in models])
        usable = usable[..., None]
        logits = torch.stack([logits_of_rows(model, x) for model in models])
        count = usable.sum(0)
        if self.task.kind == "regression":
            return logits.masked_fill(~usable, 0.0).sum(0) / count
        if self.task.kind == "multilabel":
            return (logits.sigmoid().masked_fill(~usable, 0.0).sum(0) / count).logit(eps=1e-7)
        return logits.log_softmax(-1).masked_fill(~usable, -torch.inf).logsumexp(0) - count.log()

    @cached_property
    def prepared(self) -> PreparedRun | None:
        """The run, prepared again with its data.

        If the data is not available or has changed, the value is None and a note is added to
        `notes`.
        """
        try:
            return prepare_again(self.run)
        except UserError as error:
            self.notes.append(f"the run's public and training rows are not available ({error})")
            return None

    def public_rows(self, preprocess: Preprocess, shape: tuple[int, ...]) -> Tensor | None:
        """Return the raw public rows of the run that a joining client can use.

        If there are public rows but none is usable, a note is added to `notes`.

        Args:
            preprocess: Preprocessing of the joining client.
            shape: Shape of a raw example of the joining client.

        Returns:
            The rows, or None if no row is usable or the data of the run is not available.
        """
        if self.prepared is None or not self.prepared.data.n_proxy:
            return None
        public = self.prepared.data.raw_examples("proxy")
        if preprocess.shape(tuple(public.shape[1:])) != preprocess.shape(shape):
            problem = "have another shape than the joining client's rows"
        elif not bool(usable_rows(public, preprocess).any()):
            problem = "have no values that the joining client uses"
        else:
            return public
        self.notes.append(f"the run's public rows {problem}")
        return None
