"""Hybrid, the method of this project: parameter averaging combined with ensemble distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt
from typing_extensions import override

from hetero_fl.aggregation.teachers import TeacherKind
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import (
    Algorithm,
    Items,
    Needs,
    SharedPart,
    register_algorithm,
    upload_model,
)
from hetero_fl.algorithms.distillation import (
    TEACHER,
    Alignment,
    DistilledStatistics,
    ProxyDistillation,
)
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.algorithms.local_training import local_fit
from hetero_fl.core.participant import ClientDirectory, ClientInfo, Participant
from hetero_fl.core.payload import ItemSpec, Payload
from hetero_fl.core.plan import Plan


@register_algorithm("hybrid")
class Hybrid(ProxyDistillation, FedAvg):
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
    renamed_settings = {
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
    distill_epochs: PositiveInt = Field(
        3, description="epochs of distillation per round into each architecture's average"
    )
    distill_rounds: PositiveInt | None = Field(
        None,
        description="number of rounds at the start in which the server distills; later, it only "
        "recomputes BatchNorm statistics on proxy rows; `null`: all",
    )
    distilled_statistics: DistilledStatistics = "proxy"
    digest_epochs: PositiveInt = Field(
        1, description="epochs of distillation at the client after each broadcast"
    )

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
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        if TEACHER in received and self.replay_weight:
            yield self.proxy_replay(client, received, self.replay_weight)
        else:
            yield local_fit(client)
        items = upload_model(self, client, self.weight_of(client))
        return {**items, **(yield from self.upload_predictions(client))}

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        yield from super().aggregate(server, uploads)
        teacher = self.update_teacher(server, uploads)
        if teacher is None:
            return
        if self.distill_at != "client":
            rounds = self.distill_rounds
            is_early = rounds is None or server.round_context.round_idx < rounds
            yield from self.distill_into_groups(
                server,
                teacher,
                uploads.senders("model"),
                self.distill_epochs if is_early else 0,
                statistics=self.distilled_statistics,
            )
        yield from self.train_student(server, teacher)
