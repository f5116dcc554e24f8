"""The method that docs/how_to/own_method.md builds."""

import torch
from pydantic import Field

from hetero_fl.algorithms import Algorithm, Needs, local_fit, may_share, register_algorithm
from hetero_fl.core.objectives import TeacherDistillation
from hetero_fl.core.payload import ItemSpec
from hetero_fl.core.plan import Predict, Rows


@register_algorithm("median_teacher")
class MedianTeacher(Algorithm):
    """Distill the elementwise median of the clients' logits on the proxy set."""

    title = "Median teacher"
    shared = ()  # no parameters are exchanged
    uploads = {"logits": ItemSpec("rows", use="each")}
    downloads = {"teacher": ItemSpec("rows", share="predictions")}
    needs = Needs(proxy_set="required")
    epochs: int = Field(1, ge=1, description="epochs on the proxy set before local training")

    def broadcast(self, server, recipient):
        return dict(server.state)

    def train(self, client, received):
        if "teacher" in received:
            rows = Rows("proxy", extra_columns={"teacher": received["teacher"]})
            yield local_fit(client, TeacherDistillation(), rows, epochs=self.epochs)
        yield local_fit(client)
        if may_share(client, "predictions"):
            return {"logits": (yield Predict("model", Rows("proxy")))}
        return {}

    def aggregate(self, server, uploads):
        logits = [upload.payload["logits"] for upload in uploads.containing("logits")]
        if logits:
            server.state["teacher"] = torch.stack(logits).quantile(0.5, dim=0)
