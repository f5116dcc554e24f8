"""Shared parameters combined with distillation: Hybrid, FedDF and clients that join later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from hetero_fl.aggregation.teachers import TeacherKind, proxy_predictions
from hetero_fl.aggregation.uploads import Upload, Uploads
from hetero_fl.algorithms.averaging import FedAvg
from hetero_fl.algorithms.base import Algorithm, Needs, register_algorithm
from hetero_fl.algorithms.distillation import (
    COUNTS,
    TEACHER,
    Alignment,
    ProxyDistillation,
    ProxyTraining,
)
from hetero_fl.algorithms.prediction import proxy_sample, recalibrated_tensors, recalibrates
from hetero_fl.algorithms.round_parts import Items, SharedPart, local_fit, may_share, upload_part
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.objectives import log_prior
from hetero_fl.core.participant import ClientDirectory, ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Plan, Predict, Recalibrate, Rows


class GroupDistillation(ProxyDistillation, FedAvg):
    """Base class of methods that distill into the average of each architecture at the server."""

    _broadcasts_means = False

    distill_epochs: PositiveInt = Field(
        3, description="epochs of distillation per round into each architecture's average"
    )
    distilled_statistics: Literal["proxy", "clients"] = Field(
        "proxy",
        description="BatchNorm statistics of a distilled model; `proxy`: from the proxy rows; "
        "`clients`: the mean of the clients' statistics, for proxy rows of another distribution",
    )

    def distill_into_groups(
        self, server: Participant, teacher: Tensor, senders: Iterable[ClientInfo], epochs: int
    ) -> Plan[None]:
        """Distill this round's teacher into the server's model of each architecture group.

        Args:
            server: The server.
            teacher: Logits of the round's proxy rows, shape `[D, C]`.
            senders: Clients that uploaded a model. Models of groups without such a client are not
                changed.
            epochs: Number of epochs. If 0, only the BatchNorm statistics are computed, on all proxy
                rows.
        """
        # The client with the first id in string order determines the preprocessing of its group.
        preprocess = {
            c.arch.spec_id: c.preprocess
            for c in sorted(senders, key=lambda c: c.client_id, reverse=True)
        }
        averages = {group: server.models[group] for group in preprocess}
        if epochs:
            yield [
                self.server_fit(server, group, teacher, epochs, preprocess[group])
                for group in sorted(preprocess)
            ]
        elif self.distilled_statistics == "proxy":
            for group, view in preprocess.items():
                server.models[group] = yield from recalibrated_tensors(
                    server, group, proxy_sample(server, view)
                )
        if self.distilled_statistics == "clients":
            for group, average in averages.items():
                buffers = average.keys() - server.arch[group].parameter_names
                of_clients = {name: average[name] for name in buffers}
                server.models[group] = {**server.models[group], **of_clients}


@register_algorithm("hybrid")
class Hybrid(GroupDistillation):
    """Average shared parameters and distill the consensus of all clients on a public proxy set.

    The server averages each tensor over the clients that share the tensor and distills the
    consensus of all clients into the average of each architecture, with the loss KL·T². The setting
    `shares` of each client determines the content of the upload: parameters, backbone, predictions
    on the proxy set, or several of these.

    Five defaults make distillation work under label skew: a logit-adjusted local loss (Menon et al.
    2021), a contrast-weighted teacher, the alignment of the teacher with label frequencies,
    BatchNorm statistics that are recomputed for predictions on proxy rows, and replay, the
    distillation of the teacher during local training. The weights and the alignment of the teacher
    need label counts (`statistics` in `shares`). Distillation needs public rows that resemble the
    private rows.

    Without these defaults, the method equals FedAvg if all clients have the same architecture and
    there is no proxy set. If all architectures differ and clients distill, the method equals FedMD
    with the KL divergence. Without replay, the method equals FedDF with the same settings.

    References:
        Menon et al., "Long-tail learning via logit adjustment", ICLR 2021.
            https://arxiv.org/abs/2007.07314

    Example:
        >>> from hetero_fl.algorithms import Hybrid
        >>> method = Hybrid(heads="keep", align=0.5)
        >>> method.shared.received
        ('backbone.',)
        >>> sorted(method.uploads), method.needs.proxy_set
        (['counts', 'logits', 'model'], 'optional')
    """

    title = "Hybrid"
    _renamed = {
        "rehearse": "replay_weight",  # style: ok (former name)
        "distil_at": "distill_at",
        "distil_epochs": "distill_epochs",
    }
    needs = Needs(proxy_set="optional", one_architecture=True, shared_model=True)

    teacher: TeacherKind = "contrast"
    align: Alignment = 1.0
    heads: Literal["take", "keep"] = Field(
        "take", description="whether clients take the server's head or keep their own"
    )
    distill_at: Literal["server", "client", "both"] = Field(
        "server", description="where the teacher is distilled"
    )
    replay_weight: NonNegativeFloat = Field(
        0.5, description="weight of the teacher on proxy rows in local training; 0 disables it"
    )
    distill_rounds: PositiveInt | None = Field(
        None,
        description="number of rounds at the start in which the server distills; later, it only "
        "recomputes BatchNorm statistics on proxy rows; `null`: all",
    )
    digest_epochs: PositiveInt = Field(
        1, description="epochs of distillation at the client after each broadcast"
    )

    downloads = {**FedAvg.downloads, **ProxyDistillation.downloads}

    @property
    @override
    def shared(self) -> SharedPart:  # type: ignore[override]  # depends on a setting
        """The whole model is exchanged. With `heads: keep`, clients receive only the backbone."""
        return SharedPart(received=("backbone.",) if self.heads == "keep" else None)

    @property
    @override
    def uploads(self) -> Mapping[str, ItemSpec]:  # type: ignore[override]  # depends on settings
        """Declarations of parameters, predictions, and label counts if the teacher is aligned."""
        return {"model": ItemSpec("params"), **super().uploads}

    @override
    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        clients.set_default("logit_adjustment", True)
        clients.set_default("recalibrate", ["proxy_predictions", "local_test"])
        return super().configure(clients)

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        replays = self.replay_weight > 0 and recipient.purpose == "train"
        needs_teacher = replays or self.distill_at != "server"
        teacher = self.teacher_for(server, recipient) if needs_teacher else {}
        return {**super().broadcast(server, recipient), **teacher}

    @override
    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        if TEACHER in received and self.distill_at != "server":
            yield self.distill(client, received, self.digest_epochs)

    @override
    def local_training(self, client: Participant, received: Payload) -> Plan[None]:
        yield self.proxy_replay(client, received, self.replay_weight)

    @override
    def distill_at_server(
        self, server: Participant, uploads: Uploads, teacher: Tensor
    ) -> Plan[None]:
        if self.distill_at != "client":
            rounds = self.distill_rounds
            is_early = rounds is None or server.round_context.round_idx < rounds
            epochs = self.distill_epochs if is_early else 0
            yield from self.distill_into_groups(server, teacher, uploads.senders("model"), epochs)
        yield from super().distill_at_server(server, uploads, teacher)


@register_algorithm("feddf")
class FedDF(GroupDistillation):
    """Average models per architecture, then distill the ensemble of all clients into each average.

    The teacher is the mean of all clients' logits on the proxy set. The server distills the teacher
    into the average of each architecture and broadcasts the result (Lin et al. 2020, Algorithm 3).
    Clients that do not share their whole model upload logits on the proxy set instead, which
    results in the same teacher. Label counts are uploaded only for a contrast-weighted teacher, an
    aligned teacher, or `prior_correction`.

    Use this method where clients may send parameters and the server has public rows and enough
    compute. Secure aggregation is not possible, because the server evaluates each uploaded model.
    Under label skew, set `logit_adjustment` and either `teacher: contrast` or `align`.

    Deviations from the authors' defaults (T = 1, batches of 128, up to 10,000 steps with early
    stopping): T = 2, batches of 32 and a fixed number of epochs with a constant learning rate.

    References:
        Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS
            2020. https://arxiv.org/abs/2006.07242

    Example:
        >>> from hetero_fl.algorithms import FedDF
        >>> method = FedDF(teacher="contrast", distill_epochs=5)
        >>> method.needs.proxy_set, method.uploads["model"].use
        ('required', 'each')
    """

    title = "FedDF"
    _renamed = {"distil_epochs": "distill_epochs"}
    uploads = {
        "model": ItemSpec("params", use="each"),
        "logits": ItemSpec("rows", use="each", private=True, share="predictions"),
        COUNTS: ItemSpec("counts", use="each", private=True, share="statistics"),
    }

    downloads = {**FedAvg.downloads}

    distill_epochs: PositiveInt = 2

    @override
    def upload_predictions(self, client: Participant) -> Plan[Items]:
        if upload_part(self, client.settings, client.round_context.round_idx) is not None:
            return (yield from super().upload_predictions(client))
        # The server predicts with the model of each client that has the proxy set.
        needs_counts = client.has_proxy and self.needs_counts(client)
        return {COUNTS: Item(client.counts, kind="counts")} if needs_counts else {}

    def needs_counts(self, client: Participant) -> bool:
        """Return whether the server needs a client's label counts, and the client shares them.

        The counts weight or correct the predictions of the client's model, or align the teacher.
        """
        uses_counts = self.teacher == "contrast" or client.settings.prior_correction or self.align
        is_multiclass = client.task.kind == "multiclass"
        return bool(uses_counts) and is_multiclass and may_share(client, "statistics")

    @override
    def mean_predictions(self, server: Participant, uploads: Uploads) -> Plan[Tensor | None]:
        round_idx = server.round_context.round_idx
        teachers = [
            u
            for u in uploads.containing("model")
            if "logits" not in u.payload
            and u.client_info.has_proxy
            and upload_part(self, u.client_info.settings, round_idx) is None
        ]
        models = yield from self.received_models(server, teachers)
        rows = self.proxy_indices(server)
        logits = yield [
            Predict(
                u.group,
                Rows("proxy", rows, preprocess=u.client_info.preprocess),
                tensors=models[u.client],
                arch=u.client_info.arch,
            )
            for u in teachers
        ]
        predictions = {
            u.client: self.predictions_of(server, u, z)
            for u, z in zip(teachers, logits, strict=True)
        }
        predictions |= {u.client: u.payload.item("logits") for u in uploads.containing("logits")}
        return uploads.consensus("logits", predictions)

    @override
    def distill_at_server(
        self, server: Participant, uploads: Uploads, teacher: Tensor
    ) -> Plan[None]:
        senders = uploads.senders("model")
        yield from self.distill_into_groups(server, teacher, senders, self.distill_epochs)
        yield from super().distill_at_server(server, uploads, teacher)

    def received_models(
        self, server: Participant, teachers: list[Upload]
    ) -> Plan[dict[str, Tensors]]:
        """Return the tensors with which each client's model predicts the proxy rows.

        BatchNorm statistics are recomputed on proxy rows for clients with the setting `recalibrate:
        [proxy_predictions]`.

        Args:
            server: The server.
            teachers: Uploads with a whole model.

        Returns:
            The tensors of the models, keyed by client id.
        """
        models = {u.client: {**server.models[u.group], **u.payload["model"]} for u in teachers}
        recalibrated = [
            u for u in teachers if recalibrates(u.client_info.settings, "proxy_predictions")
        ]
        statistics = yield [
            Recalibrate(
                u.group,
                proxy_sample(server, u.client_info.preprocess),
                tensors=models[u.client],
                arch=u.client_info.arch,
            )
            for u in recalibrated
        ]
        for u, changed in zip(recalibrated, statistics, strict=True):
            models[u.client].update(changed)
        return models

    def predictions_of(self, server: Participant, upload: Upload, logits: Tensor) -> Item:
        """Return an item with the predictions of a client's model and their weight in the teacher.

        Args:
            server: The server.
            upload: The client's upload.
            logits: Logits of the client's model on the proxy rows, shape `[D, C]`.
        """
        counts = upload.payload.get(COUNTS)
        if counts is not None and upload.client_info.settings.prior_correction:
            prior = log_prior(server.task, counts.clamp(min=0))
            logits = logits if prior is None else logits - prior
        return proxy_predictions(
            server.task,
            self.teacher,
            logits,
            counts,
            upload.client_info.num_rows,
        )


BACKBONE = "backbone"
SCRATCH = "scratch"
BOTH = "both"
HEAD = ("head.",)


class JoiningClient(ProxyTraining):
    """Train one new client on its own rows, starting from a shared backbone, a teacher or both.

    A client that receives a teacher distills the teacher before local training. Local training then
    also distills the teacher on proxy rows, which preserves what the model has learned. A client
    that receives only a backbone trains the new head alone before it trains the whole model (linear
    probing followed by fine-tuning, Kumar et al. 2022).

    The server's state contains `backbone` (a dictionary of tensors), `teacher` (logits of the proxy
    rows, shape `[D, outputs]`), both or neither. The client receives these items once. The method
    is not registered, because it is not meant for runs of several rounds.
    """

    evaluated_when = "after local training"
    shared = ()
    uploads = {}
    downloads = {**ProxyTraining.downloads, BACKBONE: ItemSpec("params")}
    needs = Needs(counts_traffic=False)

    digest_epochs: PositiveInt = Field(
        10, description="epochs on the proxy set before local training"
    )
    replay_weight: NonNegativeFloat = Field(
        1.0, description="weight of the teacher on proxy rows in local training; 0 disables it"
    )
    probe: bool = Field(
        True,
        description="whether to train the head alone first if only a backbone is received",
    )

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        names = (BACKBONE, TEACHER) if recipient.purpose == "train" else ()
        return {name: server.state[name] for name in names if name in server.state}

    @override
    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        if BACKBONE in received:
            client.load("model", received[BACKBONE])
        yield from ()

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        if TEACHER in received:
            yield self.distill(client, received, self.digest_epochs)
        elif BACKBONE in received and self.probe:
            yield local_fit(client, train={"model": HEAD}, label="head")
        yield self.proxy_replay(client, received, self.replay_weight)
        return {}
