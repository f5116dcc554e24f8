"""DS-FL: a sharpened consensus of probabilities on public rows; with SCARLET's cache and CFD's soft labels of a few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.sharpening import Sharpening, sharpened
from hetero_fl.aggregation.sums import mean_of
from hetero_fl.aggregation.teachers import opinion
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Items, algorithm
from hetero_fl.algorithms.distillation import TEACHER
from hetero_fl.algorithms.public_rows import WithCache
from hetero_fl.channel.soft_labels import pack, quantised, unpack
from hetero_fl.payload import Item, ItemSpec, Payload
from hetero_fl.plan import Plan, Predict, Rows
from hetero_fl.state import Card, Participant
from hetero_fl.task import Task


@algorithm("ds_fl")
class DSFL(WithCache):
    """Clients train, say their probabilities on public rows drawn anew each round, and distil the sharpened mean of them, as
    does the server's student (Itahara et al. 2020, Algorithm 1).

    `era` (entropy reduction): softmax(p̄ / T), on probabilities; `power`: p̄^β / Σ p̄^β (Azuma et al. 2025, SCARLET). With
    `cache_life` a row is asked for, and sent, only where the receiver lacks it or it is too old (SCARLET). With `bits` clients
    send quantised probabilities (Sattler et al. 2020, CFD). The teacher travels as the logits of which it is the softmax.
    """

    shared = ()
    tasks = ("multiclass", "multilabel")
    reads = "after distillation of the newest consensus, as deployed with the next broadcast"

    temperature: PositiveFloat = 1.0
    distil_epochs: PositiveInt = Field(1, description="epochs of a client on these rows")
    sharpen: Sharpening = Field("era", description="of the mean: softmax(p/T), p^β/Σp^β, or as it is")
    era_temperature: PositiveFloat = Field(0.1, description="T of era; the lower, the sharper")
    beta: PositiveFloat = Field(1.5, description="β of power; 1 changes nothing")
    bits: int | None = Field(None, ge=1, le=8, description="of an uploaded probability; 1: a vote; none: a float")

    @property
    def uploads(self) -> Mapping[str, ItemSpec]:  # type: ignore[override]  # what travels follows from the settings
        """Sums will do, unless codes have to be read or who received what has to be known."""
        use: Literal["each", "sum"] = "sum" if self.bits is None and self.cache_life is None else "each"
        name = "probabilities" if self.bits is None else "codes"
        return {name: ItemSpec("rows", use, private=True, share="predictions")}

    # The round ---------------------------------------------------------------------------------------------------
    def broadcast(self, server: Participant, card: Card) -> Items:
        state, cached = server.state, self.cache_life is not None
        items = {"ask": self.due(server).int()} if cached and not card.reading else {}
        if TEACHER in state:
            items |= {name: state[name] for name in ("rows", TEACHER) if name in state}
        if TEACHER in state and cached:
            new = (state["made"] >= state["held"].get(card.id, 0)).nonzero()[:, 0]
            items |= {"new": new.int(), TEACHER: state[TEACHER][new]}
        return items

    def deploy(self, client: Participant, got: Payload) -> Plan[None]:
        yield from super().deploy(client, got)
        if TEACHER not in got:
            return
        teacher, rows = got[TEACHER], got["rows"].long() if "rows" in got else None
        if "new" in got:
            count = len(client.data("proxy", None)["x"])
            cache = client.state.get("cache", torch.zeros(count, client.task.outputs, dtype=teacher.dtype)).clone()
            cache[got["new"].long()] = teacher
            client.state["cache"], teacher = cache, cache[rows]
        if rows is None or len(rows) > 1:  # BatchNorm has no variance of one
            yield self.digest(client, teacher, self.distil_epochs, rows=rows)

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield from self.deploy(client, got)
        yield self.fit(client)
        asked = got["ask"].long() if "ask" in got else self.drawn(client)
        if (asked is not None and not len(asked)) or not self.gives(client, "predictions"):
            return {}
        z = yield Predict("model", Rows("proxy", asked))
        exclusive = client.task.kind == "multiclass"
        p = z.softmax(-1) if exclusive else z.sigmoid()
        said = self.said(client.task, p, self.released(client), client.n)
        if self.bits is None:
            return {"probabilities": said}
        return {"codes": Item(pack(quantised(p, self.bits, exclusive), self.bits), said.weight, "rows")}

    def said(self, task: Task, p: Tensor, counts: Tensor | None, n: int) -> Item:
        """Probabilities with the weight of the client's word; their clipped logarithm for the contrast-weighted teacher."""
        contrast = self.teacher == "contrast" and task.kind == "multiclass"
        return opinion(task, self.teacher, p.log() if contrast else p, counts, n)

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        mean = uploads.mean("probabilities") if self.bits is None else self.decoded(server, uploads)
        teacher, rows = None if mean is None else self.sharpened(server.task, mean), self.drawn(server)
        if self.cache_life is not None:
            teacher, rows = self.cached(server, uploads, teacher, rows)
        elif teacher is not None:
            server.state.update({TEACHER: teacher, **({} if rows is None else {"rows": rows.int()})})
        if teacher is not None and len(teacher) > 1:
            yield from self.train_student(server, teacher, rows)

    def decoded(self, server: Participant, uploads: Uploads) -> Tensor | None:
        """The mean of what quantised uploads say."""
        assert self.bits is not None
        items = []
        for upload in uploads.having("codes"):
            item = upload.payload.item("codes")
            levels = unpack(item.values, self.bits, server.task.outputs)  # type: ignore[arg-type]  # rows are a tensor
            p = levels.to(torch.get_default_dtype()) / (2**self.bits - 1)
            items.append(Item(self.said(server.task, p, None, 1).values, item.weight))
        return mean_of(items) if items else None

    def sharpened(self, task: Task, mean: Tensor) -> Tensor:
        """Logits of the teacher, from the mean of what was said."""
        p = mean.softmax(-1) if self.teacher == "contrast" and task.kind == "multiclass" else mean
        return sharpened(task, p, self.sharpen, self.era_temperature if self.sharpen == "era" else self.beta)
