"""The base class of methods, and the objective that a client's settings ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from hetero_fl.aggregation.means import interpolate_model
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.config.base import StalenessConfig
from hetero_fl.config.clients import ClientSettings
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.objectives import Objective, Supervised, log_prior
from hetero_fl.core.participant import (
    ClientDirectory,
    ClientInfo,
    Part,
    Participant,
    common_part,
    exclude_part,
    floating_tensors,
    select_part,
)
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Fit, Plan, Predict, Rows, track_plans
from hetero_fl.core.task import Task
from hetero_fl.utils.registry import Registry, import_reference

# The local objective of a client: the supervised loss with what it reads besides the batch, or a
# class of the user's own.


def load_objective(reference: str | None, task: Task) -> Objective:
    """The supervised loss, or what `python:package.module:Name` names, made with the kind of task.

    Raises UserError if there is no such class.
    """
    if reference is None:
        return Supervised(task.kind)
    made: Objective = import_reference(reference, "objective", Objective)(task.kind)
    return made


def objective_context(
    task: Task, counts: Tensor, settings: ClientSettings, logit_adjustment: bool
) -> dict[str, Tensor]:
    """What the supervised loss on rows with these label counts reads besides the batch."""
    prior = log_prior(task, counts) if logit_adjustment else None
    given = {} if prior is None else {"log_prior": prior}
    weights = settings.class_weights
    if weights is not None and task.kind == "multiclass":
        n = counts.to(torch.get_default_dtype())
        w = 1 / n.clamp(min=1) if weights == "balanced" else torch.tensor(weights, dtype=n.dtype)
        # the mean over the training rows is one
        given["class_weights"] = w * n.sum() / (w * n).sum()
    return given


# What a method is: what travels, what is optimized, how the server combines it. How it is computed
# is the runtime's part.
#
# Subclass `Algorithm`, register it with `@algorithm("name")`, and override what differs. Settings
# are pydantic fields of the class; they stand beside `algorithm.name` in the configuration. Every
# hook that may compute is a plan (see hetero_fl.core.plan).

STUDENT = "student"  # the server's slot for the one model that it distils for itself
register_algorithm: Registry[type[Algorithm]] = Registry(
    "algorithm", lambda: Algorithm, all_of="`hetero-fl methods`"
)
PLANS = ("deploy", "train", "aggregate", "personalize", "predict")  # the hooks that return plans
Items = dict[str, Any]  # name -> Item, tensor or named tensors


class Algorithm(BaseModel):
    """A federated method. As it stands: FedAvg of the `shared` part, within each architecture."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # the part of the model that travels: None all, () nothing, else prefixes
    shared: ClassVar[Part] = None
    slot: ClassVar[str] = "model"  # the client's slot that it is a part of
    uploads: ClassVar[Mapping[str, ItemSpec]] = {"model": ItemSpec("params")}
    # what compression has to know of broadcast items
    downloads: ClassVar[Mapping[str, ItemSpec]] = {}
    needs_proxy: ClassVar[bool] = False
    is_distillation: ClassVar[bool] = False  # whether it can train a student at the server
    # False for bounds, which send nothing that a federation would
    counts_traffic: ClassVar[bool] = True
    # whether it needs all clients' rows or models in one place
    needs_all_clients: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("multiclass", "multilabel", "regression")
    # what it needs besides, in words that tables print; subclasses add to it
    requires: ClassVar[tuple[str, ...]] = ()
    # whether it is for asynchronous running and for nothing else
    asynchronous: ClassVar[bool] = False
    # whether clients upload once, in the last round: such a run cannot be extended
    one_shot: ClassVar[bool] = False
    # when a model is, for tables
    evaluated_when: ClassVar[str] = "after aggregation, as deployed with the next broadcast"

    logit_adjustment: bool = Field(
        False,
        description="train on z + log π with the client's own label frequencies π; at home read z + log π",
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        track_plans(cls, PLANS)

    @property
    def buffer_size(self) -> int | None:
        """Asynchronous: uploads after which the server aggregates; None: what `runtime.buffer` says."""
        return None

    @property
    def staleness_config(self) -> StalenessConfig | None:
        """Asynchronous: what a stale upload is worth; None: what `runtime.staleness` says."""
        return None

    @property
    def reads_proxy_labels(self) -> bool:
        """Whether clients train on the labels of the proxy set; they are there only with `data.proxy.labels`."""
        return False

    # What the method needs besides -------------------------------------------------------------------------------
    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        """The method with the settings that were left open derived from the federation, and lines that say so.

        Called once, before anything is built; the run's `config.yaml` holds the result. Raises UserError for settings
        that do not fit the clients.
        """
        return self, []

    @property
    def has_models_per_client(self) -> bool:
        """Whether clients with equal settings may get different models: then everybody's is asked for."""
        return False

    def model_spec(self, client_info: ClientInfo) -> ModelSpec:
        """The model that a client trains under this method: its own, unless all need something in common. Asked once for
        all clients with the same settings."""
        return client_info.arch

    def extra_models(self, arch: ModelSpec) -> dict[str, ModelSpec]:
        """The models that a client with this one has besides, by slot."""
        return {}

    def display_name(self, client_info: ClientInfo) -> str:
        """What a client trains, for a reader: the name of its model."""
        return client_info.arch.name

    # What travels ------------------------------------------------------------------------------------------------
    def aggregation_group(self, client_info: ClientInfo) -> str:
        """Whose tensors may be averaged with this client's: the server's slot for them. Its architecture, as a rule."""
        return client_info.arch.spec_id

    def local_tensor_names(self, arch: ModelSpec) -> frozenset[str]:
        """Names of tensors that stay with a client of this architecture, whatever part of its model travels."""
        return frozenset()

    def shareable_tensors(
        self, arch: ModelSpec, tensors: Mapping[str, Tensor], part: Part
    ) -> Tensors:
        """The tensors of that part which do travel: the same at client and server."""
        stays = self.local_tensor_names(arch)
        return {
            n: t for n, t in floating_tensors(select_part(tensors, part)).items() if n not in stays
        }

    def shared_part(self, settings: ClientSettings) -> Part:
        """What this client shares of its model: the method's part, as far as the client is willing."""
        return common_part(self.shared, settings.shared_prefixes)

    def upload_part(self, settings: ClientSettings, round_idx: int) -> Part:
        """What of its model the client uploads in this round."""
        return self.shared_part(settings) if self.uploads_in_round(settings, round_idx) else ()

    def download_part(self, settings: ClientSettings, round_idx: int) -> Part:
        """What of its model the client replaces by the server's: in the round after each in which it sends."""
        return self.shared_part(settings) if round_idx % settings.share_every == 0 else ()

    def kept_state(self, client: Participant) -> dict[str, Tensors]:
        """What of its models a client keeps between rounds: whatever the next broadcast does not replace."""
        replaced = (
            self.download_part(client.settings, 0) if client.settings.share_every == 1 else ()
        )
        own = client.models[self.slot]
        stays = self.local_tensor_names(client.arch[self.slot])
        kept = {
            **client.models,
            self.slot: {
                **exclude_part(own, replaced),
                **{n: t for n, t in own.items() if n in stays},
            },
        }
        # counters alone are not worth it
        return {slot: tensors for slot, tensors in kept.items() if floating_tensors(tensors)}

    @staticmethod
    def uploads_in_round(settings: ClientSettings, round_idx: int) -> bool:
        """Whether the client uploads in this round."""
        return (round_idx + 1) % settings.share_every == 0

    def upload_phase(self, share_every: int, round_idx: int, num_rounds: int) -> int:
        """What of the round decides the form of an upload, besides the broadcast: those of equal phases are alike in form."""
        return round_idx % share_every

    def with_worst_case_size(self) -> Algorithm:
        """The method as a bound on its bytes takes it: where a size follows from what is learnt, the largest."""
        return self

    def may_share(self, client: Participant, share: str) -> bool:
        """Whether the client uploads that kind of thing ("predictions", "statistics", "features") in this round."""
        able = share != "predictions" or client.has_proxy
        return (
            able
            and share in client.settings.shares
            and self.uploads_in_round(client.settings, client.round_context.round_idx)
        )

    # The round, in its order -------------------------------------------------------------------------------------
    def setup(self, server: Participant) -> None:
        """Prepare the server's state before the first round."""

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        """What the server sends to one client."""
        part = self.download_part(recipient.settings, server.round_context.round_idx)
        return (
            {}
            if part == ()
            else {
                "model": self.shareable_tensors(
                    recipient.arch, server.models[self.aggregation_group(recipient)], part
                )
            }
        )

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        """Make the model that this client would use now."""
        for slot, arch in self.extra_models(client.arch["model"]).items():
            client.arch[slot] = arch
            client.models[slot] = {
                **arch.initial_tensors(client.round_context.seed),
                **client.models.get(slot, {}),
            }
        if self.slot in received:
            client.load(self.slot, received[self.slot])
        yield from ()

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        """The client's round; returns its upload."""
        yield from self.deploy(client, received)
        yield self.fit(client)
        return self.share(client)

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        """The server's round."""
        if "model" in self.uploads:
            self.average(server, uploads)
        yield from ()

    def personalize(self, client: Participant, received: Payload) -> Plan[None]:
        """What the client does with the deployed model before it is read; on a copy."""
        yield from ()

    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        """Logits `[N, C]` of the client's model; `personal`: on its own patients, where its own label frequencies hold."""
        slot, view = self.inference_model(client)
        logits = yield Predict(slot, rows if view is None else replace(rows, preprocess=view))
        return self.add_log_prior(client, logits) if personal else logits

    def inference_model(self, client: Participant) -> tuple[str, Any]:
        """The slot of the model that a deployed client uses, and the preprocessing it needs if not the client's own."""
        return "model", None

    def server_model_slot(self, server: Participant) -> str | None:
        """The slot of the server's own model, if it has one: the student, else the global model of a single group."""
        if STUDENT in server.models:
            return STUDENT
        # else its head was never trained
        whole = any(self.shared_part(kind.settings) is None for kind in server.peers.profiles)
        return next(iter(server.models)) if whole and len(server.models) == 1 else None

    # Pieces to build with ----------------------------------------------------------------------------------------
    def fit(
        self,
        client: Participant,
        objective: Objective | None = None,
        data: Rows | None = None,
        *,
        context: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Fit:
        """The client's local training with its own settings; another objective, rows or `Fit` field on request."""
        s = client.settings
        objective = objective or load_objective(s.objective, client.task)
        data = data or Rows()
        base: dict[str, Any] = {"batch_size": s.batch_size, "optimizer": client.optimizer}
        base |= {} if "epochs" in changes else {"epochs": s.epochs, "steps": s.steps}
        base |= {"augment": s.augment.or_none} if data.name == "train" else {}
        reads = isinstance(objective, Supervised) and self.reads_label_counts(client.task, s)
        extra = (
            objective_context(client.task, client.counts, s, self.logit_adjustment) if reads else {}
        )
        return Fit(
            {"model": None},
            objective,
            data,
            context={**extra, **(context or {})},
            **{**base, **changes},
        )

    def reads_label_counts(self, task: Task, settings: ClientSettings) -> bool:
        """Whether the supervised loss reads label counts; where rows are private that costs."""
        return task.kind == "multiclass" and (
            self.logit_adjustment or settings.class_weights is not None
        )

    def add_log_prior(self, client: Participant, logits: Tensor) -> Tensor:
        """z + log π where the method trains with logit adjustment, else z."""
        prior = log_prior(client.task, client.counts) if self.logit_adjustment else None
        return logits if prior is None else logits + prior

    def share(self, client: Participant) -> Items:
        """The client's part of the model, with its weight."""
        part = self.upload_part(client.settings, client.round_context.round_idx)
        if part == ():
            return {}
        tensors = self.shareable_tensors(client.arch[self.slot], client.models[self.slot], part)
        return {self.slot: Item(tensors, self.weight_of(client), "params")} if tensors else {}

    def weight_of(self, client: Participant | ClientInfo) -> float:
        """The weight of a client's parameters in the mean: its training rows."""
        return float(client.num_rows)

    def average(self, server: Participant, uploads: Uploads, rate: float = 1.0) -> None:
        """Move each group's model to the mean over the owners of each tensor."""
        for group, mean in uploads.mean_by_group("model").items():
            parameters = server.arch[group].parameter_names
            server.models[group] = interpolate_model(server.models[group], mean, rate, parameters)


track_plans(Algorithm)
