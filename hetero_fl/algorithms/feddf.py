"""FedDF: ensemble distillation at the server, on top of averaging by architecture."""

from __future__ import annotations

from pydantic import Field, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.teachers import proxy_predictions
from hetero_fl.aggregation.uploads import Upload, Uploads
from hetero_fl.algorithms.base import Items, register_algorithm
from hetero_fl.algorithms.distillation import COUNTS, TeacherAlignment
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Plan, Predict, Rows


@register_algorithm("feddf")
class FedDF(TeacherAlignment, FedAvg):
    """Each architecture's average is the start, the mean of all clients' logits on the proxy set the teacher; the result
    goes back (Lin et al. 2020, Algorithm 3).

    A client whose whole model does not leave the house sends its proxy logits itself: the same teacher. Label counts
    travel only for the contrast-weighted teacher, and for one that is aligned.
    """

    uploads = {
        "model": ItemSpec("params", use="each"),
        "logits": ItemSpec("rows", use="each", private=True, share="predictions"),
        COUNTS: ItemSpec("counts", use="each", private=True, share="statistics"),
    }

    distil_epochs: PositiveInt = Field(
        2, description="epochs of each group's average on the proxy set"
    )

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        items: Items = yield from super().train(client, received)
        whole = self.upload_part(client.settings, client.round_context.round_idx) is None
        if not whole and self.may_share(client, "predictions"):
            items["logits"] = yield from self.proxy_predictions(client)
            items |= self.label_counts_item(client)
        elif whole and self.teacher == "contrast" and self.may_share(client, "statistics"):
            items[COUNTS] = Item(client.counts, kind="counts")
        elif whole and client.has_proxy:  # else its model has no voice in the teacher
            items |= self.label_counts_item(client)
        return items

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        whole = [u for u in uploads.having("model") if "logits" not in u.payload]
        whole = [
            u
            for u in whole
            if u.client_info.has_proxy
            and self.upload_part(u.client_info.settings, server.round_context.round_idx) is None
        ]
        rows = self.proxy_indices(server)
        logits = yield [
            Predict(
                u.group,
                Rows("proxy", rows, preprocess=u.client_info.preprocess),
                tensors={**server.models[u.group], **u.payload["model"]},
                arch=u.client_info.arch,
            )
            for u in whole
        ]
        said = {
            u.client: self.predictions_of(server, u, z) for u, z in zip(whole, logits, strict=True)
        }
        said.update({u.client: u.payload.item("logits") for u in uploads.having("logits")})
        yield from super().aggregate(server, uploads)
        teacher = uploads.consensus("logits", said)
        if teacher is not None:
            teacher = self.align_teacher(server, uploads, teacher)
            yield from self.distill_into_groups(
                server, teacher, uploads.senders("model"), self.distil_epochs
            )
            yield from self.train_student(server, teacher)

    def predictions_of(self, server: Participant, upload: Upload, logits: Tensor) -> Item:
        """The word of a client whose model the server holds."""
        return proxy_predictions(
            server.task,
            self.teacher,
            logits,
            upload.payload.get(COUNTS),
            upload.client_info.num_rows,
        )
