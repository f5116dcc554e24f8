"""FedDF: averaging within each architecture, then ensemble distillation at the server."""

from __future__ import annotations

from pydantic import Field, PositiveInt
from torch import Tensor
from typing_extensions import override

from hetero_fl.aggregation.teachers import proxy_predictions
from hetero_fl.aggregation.uploads import Upload, Uploads
from hetero_fl.algorithms.base import Items, may_share, register_algorithm, upload_part
from hetero_fl.algorithms.distillation import COUNTS, DistilledStatistics, ProxyDistillation
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.algorithms.recalibration import proxy_sample, recalibrates
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.objectives import log_prior
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Plan, Predict, Recalibrate, Rows


@register_algorithm("feddf")
class FedDF(ProxyDistillation, FedAvg):
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
    renamed_settings = {"distil_epochs": "distill_epochs"}
    uploads = {
        "model": ItemSpec("params", use="each"),
        "logits": ItemSpec("rows", use="each", private=True, share="predictions"),
        COUNTS: ItemSpec("counts", use="each", private=True, share="statistics"),
    }

    distill_epochs: PositiveInt = Field(
        2, description="epochs of distillation per round into each architecture's average"
    )
    distilled_statistics: DistilledStatistics = "proxy"

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        items: Items = yield from super().train(client, received)
        if upload_part(self, client.settings, client.round_context.round_idx) is not None:
            items |= yield from self.upload_predictions(client)
        elif client.has_proxy and self.needs_counts(client):
            # The server predicts with the model of each client that has the proxy set.
            items[COUNTS] = Item(client.counts, kind="counts")
        return items

    def needs_counts(self, client: Participant) -> bool:
        """Return whether the server needs a client's label counts, and the client shares them.

        The counts weight or correct the predictions of the client's model, or align the teacher.
        """
        uses_counts = self.teacher == "contrast" or client.settings.prior_correction or self.align
        is_multiclass = client.task.kind == "multiclass"
        return bool(uses_counts) and is_multiclass and may_share(client, "statistics")

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
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
        yield from super().aggregate(server, uploads)
        mean = uploads.consensus("logits", predictions)
        if mean is not None:
            teacher = self.teacher_from_mean(server, uploads, mean)
            senders = uploads.senders("model")
            yield from self.distill_into_groups(
                server, teacher, senders, self.distill_epochs, statistics=self.distilled_statistics
            )
            yield from self.train_student(server, teacher)

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
