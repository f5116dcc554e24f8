"""DS-FL: a sharpened consensus of probabilities on proxy rows; with SCARLET's cache and CFD's soft labels of a few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.sharpening import TINY, Sharpening, sharpened
from hetero_fl.aggregation.teachers import CLIP, opinion
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Items, algorithm
from hetero_fl.algorithms.distillation import TEACHER
from hetero_fl.algorithms.row_cache import WithCache
from hetero_fl.channel.soft_labels import pack, quantised, unpack
from hetero_fl.payload import Item, ItemSpec, Payload
from hetero_fl.plan import Plan, Predict, Rows
from hetero_fl.state import Card, Participant
from hetero_fl.task import Task


@algorithm("ds_fl")
class DSFL(WithCache):
    """Clients train, say their probabilities on proxy rows drawn anew each round, and distil the sharpened mean of them, as
    does the server's student (Itahara et al. 2020, Algorithm 1).

    `era` (entropy reduction): softmax(p̄ / T), on probabilities; `power`: p̄^β / Σ p̄^β (Azuma et al. 2025, SCARLET). With
    `cache_life` a row is asked for, and sent, only where the receiver lacks it or it is too old (SCARLET). With `bits` clients
    send quantised probabilities (Sattler et al. 2020, CFD). The teacher travels as the logits of which it is the softmax.
    """

    shared = ()
    tasks = ("multiclass", "multilabel")
    reads = "after distillation of the newest consensus, as deployed with the next broadcast"

    temperature: PositiveFloat = 1.0
    proxy_rows: int | None = Field(
        1000, ge=2, description="proxy rows drawn anew each round; none, or more than there are: the whole set"
    )
    distil_epochs: PositiveInt = Field(1, description="epochs of a client on the proxy rows of a round")
    sharpen: Sharpening = Field("era", description="of the mean: softmax(p/T), p^β/Σp^β, or as it is")
    era_temperature: PositiveFloat = Field(0.1, description="T of era; the lower, the sharper")
    beta: PositiveFloat = Field(1.5, description="β of power; 1 changes nothing")
    bits: int | None = Field(None, ge=1, le=8, description="of an uploaded probability; 1: a vote; none: a float")

    @property
    def uploads(self) -> Mapping[str, ItemSpec]:  # type: ignore[override]  # what travels follows from the settings
        """Sums will do, unless codes have to be read or who received what has to be known."""
        use: Literal["each", "sum"] = "sum" if self.bits is None and self.cache_life is None else "each"
        name = "probabilities" if self.bits is None else "codes"
        return {name: ItemSpec("rows", use, private=True, share="predictions"), **self.label_counts()}

    # The round ---------------------------------------------------------------------------------------------------
    def broadcast(self, server: Participant, card: Card) -> Items:
        return self.remembered(server, card) if self.cache_life is None else self.news(server, card)

    def deploy(self, client: Participant, got: Payload) -> Plan[None]:
        yield from super().deploy(client, got)
        if TEACHER in got:
            rows = self.taught(client, got)
            yield self.digest(client, self.told(client, got, rows), self.distil_epochs, rows)

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield from self.deploy(client, got)
        yield self.fit(client)
        asked = got["ask"].long() if "ask" in got else self.drawn(client)
        if (asked is not None and not len(asked)) or not self.gives(client, "predictions"):
            return {}
        z = yield Predict("model", Rows("proxy", asked))
        said = self.said(client.task, z, self.released(client), client.n)
        if self.bits is None:
            return {"probabilities": said, **self.told_labels(client)}
        p, exclusive = probabilities(client.task, z), client.task.kind == "multiclass"
        codes = Item(pack(quantised(p, self.bits, exclusive), self.bits), said.weight, "rows")
        return {"codes": codes, **self.told_labels(client)}

    def said(self, task: Task, logits: Tensor, counts: Tensor | None, n: int) -> Item:
        """Probabilities, or for the contrast-weighted teacher their clipped logarithm, with the weight of the client's word."""
        word = opinion(task, self.teacher, logits, counts, n)
        return replace(word, values=self.spoken(task, probabilities(task, logits)))

    def spoken(self, task: Task, p: Tensor) -> Tensor:
        """What of probabilities is averaged."""
        return p.log().clamp(min=CLIP) if self.of_logarithms(task) else p

    def of_logarithms(self, task: Task) -> bool:
        """Whether the mean is one of log p."""
        return self.teacher == "contrast" and task.kind == "multiclass"

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        mean = uploads.mean("probabilities") if self.bits is None else self.decoded(server, uploads)
        teacher = None if mean is None else self.sharpened(server.task, self.held_to_labels(server, uploads, mean))
        if self.cache_life is not None:
            teacher = self.cached(server, uploads, teacher)
        elif teacher is not None:
            self.remember(server, teacher=teacher)
        if teacher is not None:
            yield from self.train_student(server, teacher)

    def decoded(self, server: Participant, uploads: Uploads) -> Tensor | None:
        """The mean of what quantised uploads say."""
        assert self.bits is not None
        said = {}
        for upload in uploads.having("codes"):
            item = upload.payload.item("codes")
            levels = unpack(item.values, self.bits, server.task.outputs)  # type: ignore[arg-type]  # rows are a tensor
            p = levels.to(torch.get_default_dtype()) / (2**self.bits - 1)
            said[upload.client] = Item(self.spoken(server.task, p), item.weight)
        return uploads.consensus("codes", said)

    def held_to_labels(self, server: Participant, uploads: Uploads, mean: Tensor) -> Tensor:
        """The mean of what was said, aligned before it is sharpened."""
        if not self.align or server.task.kind != "multiclass":
            return mean
        if self.of_logarithms(server.task):
            return self.moved(server, uploads, mean)
        return self.moved(server, uploads, mean.clamp(min=TINY).log()).softmax(-1)

    def sharpened(self, task: Task, mean: Tensor) -> Tensor:
        """Logits of the teacher, from the mean of what was said."""
        p = mean.softmax(-1) if self.of_logarithms(task) else mean
        return sharpened(task, p, self.sharpen, self.era_temperature if self.sharpen == "era" else self.beta)


def probabilities(task: Task, logits: Tensor) -> Tensor:
    """Of classes, or of each label by itself."""
    return logits.softmax(-1) if task.kind == "multiclass" else logits.sigmoid()
