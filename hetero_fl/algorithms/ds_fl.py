"""DS-FL, with SCARLET's prediction cache and CFD's quantized soft labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from hetero_fl.aggregation.teachers import CLIP, TINY, Sharpening, sharpen
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Items, Needs, may_share, register_algorithm
from hetero_fl.algorithms.distillation import TEACHER, ProxyDistillation
from hetero_fl.algorithms.local_training import local_fit
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Plan, Predict, Rows
from hetero_fl.core.task import Task

# Soft labels in a few bits: the constrained quantiser of CFD (Sattler et al. 2020), packed end to
# end.
#
# A distribution becomes the nearest one (in L1) whose probabilities are multiples of 1 / (2^b − 1).
# With one bit that is a vote for the most probable class.


def quantize_probabilities(p: Tensor, bits: int, sums_to_one: bool = True) -> Tensor:
    """Probabilities `[N, C]` as levels of 0 … 2^bits − 1, uint8 `[N, C]`; probability = level / (2^bits − 1).

    `sums_to_one`: so does each row, before and after: every level is rounded down, and what is missing goes to the largest
    remainders, the first of equals. Else each is rounded by itself (labels that do not exclude one another).
    """
    top = 2**bits - 1
    if not sums_to_one:
        return (p * top).round().to(torch.uint8)
    down = (p * top).floor()
    missing = (top - down.sum(-1, keepdim=True)).round()
    order = (p * top - down).sort(dim=-1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(
        -1, order, torch.arange(p.shape[-1], device=p.device).expand_as(order).contiguous()
    )
    return (down + (place < missing)).to(torch.uint8)


def pack_labels(levels: Tensor, bits: int) -> Tensor:
    """Pack levels `[N, C]` of so many bits end to end into uint8 `[N, ceil(C·bits / 8)]`."""
    singles = (levels.cpu()[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1
    packed = np.packbits(singles.flatten(1).numpy(), axis=1, bitorder="little")
    return torch.from_numpy(packed).to(levels.device)


def unpack_labels(packed: Tensor, bits: int, classes: int) -> Tensor:
    """Reverse `pack_labels`; return levels, uint8 `[N, classes]`."""
    flat = np.unpackbits(packed.cpu().numpy(), axis=1, count=classes * bits, bitorder="little")
    singles = torch.from_numpy(flat).unflatten(1, (classes, bits))
    levels = (singles << torch.arange(bits, dtype=torch.uint8)).sum(-1).to(torch.uint8)
    return levels.to(packed.device)


# The cache of a consensus, at the server and at the clients: what was said of a proxy row serves
# for several rounds.

CONSENSUS_ROUNDS = "made"


class CachedPredictions(ProxyDistillation):
    """A row is asked for, and sent, only where the receiver lacks it or it is too old (Azuma et al. 2025, SCARLET).

    The server's cache is `teacher` `[D, C]` with the round in which each row was `consensus_rounds`, and for each client seen the round
    in which it `held` all of it: it then lacks what was made since. A client's is `cache` `[D, C]`.
    """

    cache_life: PositiveInt | None = Field(
        None, description="rounds until a row is asked for again; none: no cache"
    )

    @model_validator(mode="after")
    def _whole_rounds(self) -> CachedPredictions:
        if self.align and self.cache_life is not None:
            raise ValueError(
                "align needs what is said of all rows of a round, but with cache_life few are asked for; leave one of them out"
            )
        return self

    # At the server -----------------------------------------------------------------------------------------------
    def requested_rows(self, server: Participant) -> Tensor:
        """Those of the round's rows that the cache lacks or has had too long: what clients are asked for, int64."""
        assert self.cache_life is not None
        made = self.consensus_rounds(server)
        rows = self.proxy_indices(server)
        old = (made < 0) | (server.round_context.round_idx - made >= self.cache_life)
        return old.nonzero()[:, 0] if rows is None else rows[old[rows]]

    @staticmethod
    def consensus_rounds(server: Participant) -> Tensor:
        """The round in which each proxy row's consensus was made, int64 `[D]`; −1: never."""
        made: Tensor | None = server.state.get(CONSENSUS_ROUNDS)
        if made is None:
            return torch.full((len(server.data("proxy", None)["x"]),), -1)
        return made.cpu()  # as the proxy indices

    def cache_update(self, server: Participant, client_info: ClientInfo) -> Items:
        """What this client is asked for, and what it lacks of the teacher."""
        if not client_info.has_proxy:
            return {}
        items: Items = (
            {"ask": self.requested_rows(server).int()} if client_info.purpose == "train" else {}
        )
        if TEACHER in server.state:
            new = (
                self.consensus_rounds(server) >= server.state["held"].get(client_info.client_id, 0)
            ).nonzero()[:, 0]
            items |= self.teacher_for(server, client_info) | {
                "new": new.int(),
                TEACHER: server.state[TEACHER][new],
            }
        return items

    def update_cache(
        self, server: Participant, uploads: Uploads, teacher: Tensor | None
    ) -> Tensor | None:
        """Set what was asked for into the cache; returns the teacher of all the round's rows, None if some lack a word."""
        asked = self.requested_rows(server)
        now = server.round_context.round_idx
        state = server.state
        state["held"] = {**state.get("held", {}), **{u.client: now for u in uploads.each}}
        if teacher is None and len(asked):
            return None
        if teacher is not None:
            made = self.consensus_rounds(server).clone()
            rows = server.state.get(TEACHER)
            rows = teacher.new_zeros(len(made), teacher.shape[1]) if rows is None else rows.clone()
            rows[asked], made[asked] = teacher, now
            state.update({CONSENSUS_ROUNDS: made, TEACHER: rows})
        self.store_teacher(server)
        known = state[TEACHER]
        use = self.proxy_indices(server)
        return known if use is None else known[use]

    # At the client -----------------------------------------------------------------------------------------------
    @staticmethod
    def cached_teacher(client: Participant, received: Payload, rows: Tensor | None) -> Tensor:
        """The teacher of these rows, or of all, from what was received and what the client has kept."""
        news: Tensor = received[TEACHER]
        if "new" not in received:
            return news
        kept = client.state.get("cache")
        kept = (
            news.new_zeros(len(client.data("proxy", None)["x"]), news.shape[1])
            if kept is None
            else kept.clone()
        )
        kept[received["new"].long()] = news
        client.state["cache"] = kept
        return kept if rows is None else kept[rows]


# DS-FL: a sharpened consensus of probabilities on proxy rows; with SCARLET's cache and CFD's soft
# labels of a few bits.


@register_algorithm("ds_fl")
class DSFL(CachedPredictions):
    """Distill the sharpened mean of all clients' class probabilities on public rows that change each round.

    Clients train, upload their probabilities on the round's proxy rows, and learn from the mean of all, made more decided, as
    does the server's student (Itahara et al. 2020, Algorithm 1).

    `era` (entropy reduction): softmax(p̄ / T), on probabilities; `power`: p̄^β / Σ p̄^β (Azuma et al. 2025, SCARLET). With
    `cache_life` a row is asked for, and sent, only where the receiver lacks it or it is too old (SCARLET). With `bits` clients
    send quantised probabilities (Sattler et al. 2020, CFD). The teacher travels as the logits of which it is the softmax.
    """

    title = "DS-FL"
    shared = ()
    needs = Needs(proxy_set="required", tasks=("multiclass", "multilabel"))
    evaluated_when = (
        "after distillation of the newest consensus, as deployed with the next broadcast"
    )

    temperature: PositiveFloat = 1.0
    proxy_rows: int | None = Field(
        1000,
        ge=2,
        description="proxy rows drawn anew each round; none, or more than there are: the whole set",
    )
    distil_epochs: PositiveInt = Field(
        1, description="epochs of a client on the proxy rows of a round"
    )
    sharpen: Sharpening = Field(
        "era", description="of the mean: softmax(p/T), p^β/Σp^β, or as it is"
    )
    era_temperature: PositiveFloat = Field(0.1, description="T of era; the lower, the sharper")
    beta: PositiveFloat = Field(1.5, description="β of power; 1 changes nothing")
    bits: int | None = Field(
        None, ge=1, le=8, description="of an uploaded probability; 1: a vote; none: a float"
    )

    @property
    def uploads(self) -> Mapping[str, ItemSpec]:  # type: ignore[override]  # what travels follows from the settings
        """Sums will do, unless codes have to be read or who received what has to be known."""
        use: Literal["each", "sum"] = (
            "sum" if self.bits is None and self.cache_life is None else "each"
        )
        name = "probabilities" if self.bits is None else "codes"
        return {
            name: ItemSpec("rows", use, private=True, share="predictions"),
            **self.label_counts_spec(),
        }

    # The round ---------------------------------------------------------------------------------------------------
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return (
            self.teacher_for(server, recipient)
            if self.cache_life is None
            else self.cache_update(server, recipient)
        )

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        if TEACHER in received:
            rows = self.teacher_rows(client, received)
            teacher = self.cached_teacher(client, received, rows)
            yield self.distill(client, received, self.distil_epochs, teacher)

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        yield local_fit(client)
        asked = received["ask"].cpu().long() if "ask" in received else self.proxy_indices(client)
        if (asked is not None and not len(asked)) or not may_share(client, "predictions"):
            return {}
        logits = yield Predict("model", Rows("proxy", asked))
        weighted = self.weighted_probabilities(client, logits)
        counts = self.label_counts(client)
        if self.bits is None:
            return {"probabilities": weighted, **counts}
        p = predicted_probabilities(client.task, logits)
        levels = quantize_probabilities(p, self.bits, client.task.kind == "multiclass")
        return {"codes": replace(weighted, values=pack_labels(levels, self.bits)), **counts}

    def weighted_probabilities(self, client: Participant, logits: Tensor) -> Item:
        """Return a client's probabilities, or their clipped logarithm, with their weight in the teacher."""
        p = predicted_probabilities(client.task, logits)
        weighted = self.weighted_predictions(client, logits)
        return replace(weighted, values=self.averaged_form(client.task, p))

    def averaged_form(self, task: Task, p: Tensor) -> Tensor:
        """What of probabilities is averaged."""
        return p.log().clamp(min=CLIP) if self.averages_logarithms(task) else p

    def averages_logarithms(self, task: Task) -> bool:
        """Whether the mean is one of log p."""
        return self.teacher == "contrast" and task.kind == "multiclass"

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        mean = (
            uploads.mean("probabilities")
            if self.bits is None
            else self.decoded_mean(server, uploads)
        )
        teacher = (
            None
            if mean is None
            else self.sharpened_teacher(server.task, self.align_mean(server, uploads, mean))
        )
        if self.cache_life is not None:
            teacher = self.update_cache(server, uploads, teacher)
        elif teacher is not None:
            self.store_teacher(server, teacher=teacher)
        if teacher is not None:
            yield from self.train_student(server, teacher)

    def decoded_mean(self, server: Participant, uploads: Uploads) -> Tensor | None:
        """The mean of what quantised uploads say."""
        assert self.bits is not None
        said = {}
        for upload in uploads.having("codes"):
            item = upload.payload.item("codes")
            levels = unpack_labels(item.values, self.bits, server.task.outputs)  # type: ignore[arg-type]  # rows are a tensor
            p = levels.to(torch.get_default_dtype()) / (2**self.bits - 1)
            said[upload.client] = Item(self.averaged_form(server.task, p), item.weight)
        return uploads.consensus("codes", said)

    def align_mean(self, server: Participant, uploads: Uploads, mean: Tensor) -> Tensor:
        """The mean of what was said, aligned before it is sharpened."""
        if not self.align or server.task.kind != "multiclass":
            return mean
        if self.averages_logarithms(server.task):
            return self.align_teacher(server, uploads, mean)
        return self.align_teacher(server, uploads, mean.clamp(min=TINY).log()).softmax(-1)

    def sharpened_teacher(self, task: Task, mean: Tensor) -> Tensor:
        """Logits of the teacher, from the mean of what was said."""
        p = mean.softmax(-1) if self.averages_logarithms(task) else mean
        return sharpen(
            task, p, self.sharpen, self.era_temperature if self.sharpen == "era" else self.beta
        )


def predicted_probabilities(task: Task, logits: Tensor) -> Tensor:
    """Of classes, or of each label by itself."""
    return logits.softmax(-1) if task.kind == "multiclass" else logits.sigmoid()
