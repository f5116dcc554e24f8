"""DS-FL, with the prediction cache of SCARLET and the quantized soft labels of CFD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from typing_extensions import override

from hetero_fl.aggregation.teachers import MIN_LOG_PROBABILITY, Sharpening
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Items, Needs, may_share, register_algorithm
from hetero_fl.algorithms.distillation import TEACHER, ProxyDistillation, predicted_probabilities
from hetero_fl.algorithms.local_training import local_fit
from hetero_fl.core.objectives import MIN_PROBABILITY
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Plan
from hetero_fl.core.task import Task


def quantize_probabilities(p: Tensor, bits: int, sums_to_one: bool = True) -> Tensor:
    """Quantize probabilities to multiples of 1 / (2^bits − 1) (CFD, Sattler et al. 2020).

    Args:
        p: Probabilities, shape `[N, C]`.
        bits: Number of bits per probability. One bit is a vote for the most probable class.
        sums_to_one: Whether each row is a distribution. If True, all values are rounded down, and
            the missing levels are added to the largest remainders, so that quantized rows are
            distributions, too. Otherwise, each value is rounded to the nearest level.

    Returns:
        Levels from 0 to 2^bits − 1, uint8 `[N, C]`. A level divided by 2^bits − 1 is the quantized
        probability.

    Example:
        >>> import torch
        >>> from hetero_fl.algorithms.ds_fl import quantize_probabilities
        >>> quantize_probabilities(torch.tensor([[0.5, 0.3, 0.2]]), bits=2)
        tensor([[1, 1, 1]], dtype=torch.uint8)
    """
    top = 2**bits - 1
    if not sums_to_one:
        return (p * top).round().to(torch.uint8)
    down = (p * top).floor()
    missing = (top - down.sum(-1, keepdim=True)).round()
    order = (p * top - down).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(p.shape[-1], device=p.device).expand_as(order).contiguous()
    )
    return (down + (rank < missing)).to(torch.uint8)


def pack_labels(levels: Tensor, bits: int) -> Tensor:
    """Pack quantized levels of `bits` bits each into bytes.

    Args:
        levels: Levels, uint8 `[N, C]`.
        bits: Number of bits per level.

    Returns:
        Packed levels, uint8 `[N, ceil(C·bits / 8)]`.
    """
    single_bits = (levels.cpu()[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1
    packed = np.packbits(single_bits.flatten(1).numpy(), axis=1, bitorder="little")
    return torch.from_numpy(packed).to(levels.device)


def unpack_labels(packed: Tensor, bits: int, classes: int) -> Tensor:
    """Unpack the levels that `pack_labels` packed into bytes.

    Args:
        packed: Packed levels, uint8 `[N, ceil(C·bits / 8)]`.
        bits: Number of bits per level.
        classes: Number of classes C.

    Returns:
        Levels, uint8 `[N, C]`.
    """
    flat = np.unpackbits(packed.cpu().numpy(), axis=1, count=classes * bits, bitorder="little")
    single_bits = torch.from_numpy(flat).unflatten(1, (classes, bits))
    levels = (single_bits << torch.arange(bits, dtype=torch.uint8)).sum(-1).to(torch.uint8)
    return levels.to(packed.device)


# Entry of the server's state with the index of the round in which each cached row was computed.
CONSENSUS_ROUNDS = "made"


class CachedPredictions(ProxyDistillation):
    """Base class of methods that cache the consensus on proxy rows (SCARLET, Azuma et al. 2025).

    A row is requested and sent only if the cache of the receiver does not contain the row or the
    cached row has expired. The state of the server contains the `teacher`, shape `[D, C]`, the
    round in which each row of the teacher was computed, and the last round in which the cache of
    each client was up to date. The state of a client contains a `cache`, shape `[D, C]`.
    """

    cache_life: PositiveInt | None = Field(
        None, description="rounds after which a cached row expires; `null`: no cache"
    )

    @model_validator(mode="after")
    def _check_cache(self) -> CachedPredictions:
        if self.align and self.cache_life is not None:
            raise ValueError(
                "align cannot be combined with cache_life, as it needs the predictions of all rows "
                "of a round; set only one of them"
            )
        return self

    def requested_rows(self, server: Participant) -> Tensor:
        """Return the indices (int64) of the round's rows that are not cached or have expired."""
        assert self.cache_life is not None
        made = self.consensus_rounds(server)
        rows = self.proxy_indices(server)
        old = (made < 0) | (server.round_context.round_idx - made >= self.cache_life)
        return old.nonzero()[:, 0] if rows is None else rows[old[rows]]

    @staticmethod
    def consensus_rounds(server: Participant) -> Tensor:
        """Return the round in which the consensus on each row was computed, int64 `[D]`.

        The value is -1 for rows without a consensus.
        """
        made: Tensor | None = server.state.get(CONSENSUS_ROUNDS)
        if made is None:
            return torch.full((len(server.data("proxy", None)["x"]),), -1)
        # Proxy indices are on the CPU, so the result must be, too.
        return made.cpu()

    def cache_update(self, server: Participant, client_info: ClientInfo) -> Items:
        """Return the requested rows, and the rows of the teacher that the client lacks, as items.

        Rows are requested only for training. The dictionary is empty for clients without the proxy
        set.
        """
        if not client_info.has_proxy:
            return {}
        items: Items = {}
        if client_info.purpose == "train":
            items["ask"] = self.requested_rows(server).int()
        if TEACHER in server.state:
            last_round = server.state["held"].get(client_info.client_id, 0)
            new = (self.consensus_rounds(server) >= last_round).nonzero()[:, 0]
            items |= self.teacher_for(server, client_info)
            items |= {"new": new.int(), TEACHER: server.state[TEACHER][new]}
        return items

    def update_cache(
        self, server: Participant, uploads: Uploads, teacher: Tensor | None
    ) -> Tensor | None:
        """Store the consensus on requested rows in the cache.

        Args:
            server: The server.
            uploads: Uploads of the round.
            teacher: Logits of the requested rows, or None if no client uploaded predictions.

        Returns:
            Logits of all proxy rows of the round, or None if rows were requested but no client
            uploaded predictions.
        """
        requested = self.requested_rows(server)
        now = server.round_context.round_idx
        state = server.state
        state["held"] = {**state.get("held", {}), **{u.client: now for u in uploads.each}}
        if teacher is None and len(requested):
            return None
        if teacher is not None:
            made = self.consensus_rounds(server).clone()
            rows = server.state.get(TEACHER)
            rows = teacher.new_zeros(len(made), teacher.shape[1]) if rows is None else rows.clone()
            rows[requested] = teacher
            made[requested] = now
            state.update({CONSENSUS_ROUNDS: made, TEACHER: rows})
        self.store_teacher(server)
        cached = state[TEACHER]
        indices = self.proxy_indices(server)
        return cached if indices is None else cached[indices]

    @staticmethod
    def cached_teacher(client: Participant, received: Payload, rows: Tensor | None) -> Tensor:
        """Update the client's cache with the received rows and return the teacher.

        Args:
            client: The client.
            received: Received items, which include the teacher.
            rows: Indices of the rows to return. If None, all rows are returned.

        Returns:
            Logits of these rows, shape `[D, C]`. If the method does not use a cache, the received
            teacher.
        """
        teacher: Tensor = received[TEACHER]
        if "new" not in received:
            return teacher
        cache = client.state.get("cache")
        if cache is None:
            cache = teacher.new_zeros(len(client.data("proxy", None)["x"]), teacher.shape[1])
        else:
            cache = cache.clone()
        cache[received["new"].long()] = teacher
        client.state["cache"] = cache
        return cache if rows is None else cache[rows]


@register_algorithm("ds_fl")
class DSFL(CachedPredictions):
    """Distill the sharpened mean of all clients' probabilities on sampled proxy rows.

    Clients train, upload probabilities on the round's proxy rows, and distill the sharpened mean,
    as does the server's student (Itahara et al. 2020, Algorithm 1). The teacher is broadcast as
    logits.

    The default `sharpen: era` is the entropy reduction of the paper, and `power` is the sharpening
    of SCARLET (Azuma et al. 2025). With `cache_life`, only missing and expired rows are sent
    (SCARLET, where the authors use 50 rounds). With `bits`, clients upload probabilities that are
    quantized to multiples of 1/(2^b − 1) for b bits (CFD, Sattler et al. 2020).

    Use this method where the mean prediction is uncertain. Set `cache_life` and `bits` to reduce
    traffic.

    References:
        Itahara et al., "Distillation-Based Semi-Supervised Federated Learning for
            Communication-Efficient Collaborative Training with Non-IID Private Data", IEEE TMC
            2023. https://arxiv.org/abs/2008.06180
        Sattler et al., "Communication-Efficient Federated Distillation", 2020.
            https://arxiv.org/abs/2012.00632
        Azuma et al., "Soft-Label Caching and Sharpening for Communication-Efficient Federated
            Distillation", 2025. https://arxiv.org/abs/2504.19602

    Example:
        >>> from hetero_fl.algorithms import DSFL
        >>> list(DSFL(era_temperature=0.5).uploads), list(DSFL(bits=1).uploads)
        (['probabilities'], ['codes'])
    """

    title = "DS-FL"
    renamed_settings = {"distil_epochs": "distill_epochs"}
    shared = ()
    needs = Needs(proxy_set="required", tasks=("multiclass", "multilabel"), shared_model=True)
    evaluated_when = (
        "after distillation of the newest consensus, as deployed with the next broadcast"
    )

    temperature: PositiveFloat = 1.0
    proxy_rows: int | None = Field(
        1000,
        ge=2,
        description="proxy rows sampled in each round; `null`: the whole proxy set",
    )
    distill_epochs: PositiveInt = Field(
        1, description="epochs of distillation per round at the client"
    )
    sharpen: Sharpening = "era"
    bits: int | None = Field(
        None, ge=1, le=8, description="bits per uploaded probability; 1: a vote; `null`: a float"
    )

    @property
    @override
    def uploads(self) -> Mapping[str, ItemSpec]:  # type: ignore[override]  # depends on settings
        """Declarations of the uploaded items.

        Clients upload probabilities (quantized `codes` if `bits` is set), and label counts if the
        teacher is aligned.
        """
        # Codes cannot be summed, and the cache records which clients sent predictions.
        can_sum = self.bits is None and self.cache_life is None
        use: Literal["each", "sum"] = "sum" if can_sum else "each"
        name = "probabilities" if self.bits is None else "codes"
        return {
            name: ItemSpec("rows", use, private=True, share="predictions"),
            **self.label_counts_spec(),
        }

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        if self.cache_life is None:
            return self.teacher_for(server, recipient)
        return self.cache_update(server, recipient)

    @override
    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        if TEACHER in received:
            rows = self.teacher_rows(client, received)
            teacher = self.cached_teacher(client, received, rows)
            yield self.distill(client, received, self.distill_epochs, teacher)

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        yield local_fit(client)
        rows = received["ask"].cpu().long() if "ask" in received else self.proxy_indices(client)
        if (rows is not None and not len(rows)) or not may_share(client, "predictions"):
            return {}
        logits = yield from self.predict_proxy(client, rows)
        weighted = self.weighted_probabilities(client, logits)
        counts = self.label_counts(client)
        if self.bits is None:
            return {"probabilities": weighted, **counts}
        p = predicted_probabilities(client.task, logits)
        levels = quantize_probabilities(p, self.bits, client.task.kind == "multiclass")
        return {"codes": replace(weighted, values=pack_labels(levels, self.bits)), **counts}

    def weighted_probabilities(self, client: Participant, logits: Tensor) -> Item:
        """Return an item with a client's (log) probabilities and their weight in the teacher."""
        p = predicted_probabilities(client.task, logits)
        weighted = self.weighted_predictions(client, logits)
        return replace(weighted, values=self.averaged_form(client.task, p))

    def averaged_form(self, task: Task, p: Tensor) -> Tensor:
        """Return the values that are averaged: probabilities, or clipped log-probabilities."""
        return p.log().clamp(min=MIN_LOG_PROBABILITY) if self.averages_logarithms(task) else p

    def averages_logarithms(self, task: Task) -> bool:
        """Return whether log-probabilities are averaged instead of probabilities."""
        return self.teacher == "contrast" and task.kind == "multiclass"

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        if self.bits is None:
            mean = uploads.mean("probabilities")
        else:
            mean = self.decoded_mean(server, uploads)
        teacher = None
        if mean is not None:
            teacher = self.sharpened_teacher(server.task, self.align_mean(server, uploads, mean))
        if self.cache_life is not None:
            teacher = self.update_cache(server, uploads, teacher)
        elif teacher is not None:
            self.store_teacher(server, teacher=teacher)
        if teacher is not None:
            yield from self.train_student(server, teacher)

    def decoded_mean(self, server: Participant, uploads: Uploads) -> Tensor | None:
        """Return the mean of the decoded uploads, or None if no client uploaded codes."""
        assert self.bits is not None
        predictions = {}
        for upload in uploads.containing("codes"):
            item = upload.payload.item("codes")
            assert isinstance(item.values, Tensor)
            levels = unpack_labels(item.values, self.bits, server.task.outputs)
            p = levels.to(torch.get_default_dtype()) / (2**self.bits - 1)
            predictions[upload.client] = Item(self.averaged_form(server.task, p), item.weight)
        return uploads.consensus("codes", predictions)

    def align_mean(self, server: Participant, uploads: Uploads, mean: Tensor) -> Tensor:
        """Align the mean prediction with the label frequencies, before sharpening.

        The mean is returned unchanged if `align` is 0 or the task is not multiclass.

        Args:
            server: The server.
            uploads: Uploads of the round.
            mean: Mean of the uploaded (log) probabilities, shape `[D, C]`.
        """
        if not self.align or server.task.kind != "multiclass":
            return mean
        if self.averages_logarithms(server.task):
            return self.align_teacher(server, uploads, mean)
        logits = mean.clamp(min=MIN_PROBABILITY).log()
        return self.align_teacher(server, uploads, logits).softmax(-1)

    def sharpened_teacher(self, task: Task, mean: Tensor) -> Tensor:
        """Sharpen the mean of the (log) probabilities and return the teacher's logits."""
        return self.sharpened_logits(
            task, mean.softmax(-1) if self.averages_logarithms(task) else mean
        )
