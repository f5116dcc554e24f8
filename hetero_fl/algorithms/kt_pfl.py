"""KT-pFL: each client has a teacher of its own, a mixture of all clients' predictions with weights that are learned."""

from __future__ import annotations

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Items, Needs, may_share, register_algorithm
from hetero_fl.algorithms.distillation import TEACHER, InitialPhase
from hetero_fl.algorithms.local_training import local_fit
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import TINY, Coefficients
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import ItemSpec, Payload
from hetero_fl.core.plan import Fit, Plan, Predict, Rows, TensorRows

MIX = "mix"  # a linear layer without bias whose row k is c_k


@register_algorithm("kt_pfl")
class KTpFL(InitialPhase):
    """Distill into each client its own mixture of all clients' predictions, with weights that the server learns.

    Predictions are those on the proxy set (Zhang et al. 2021, Algorithm 1). Client k's teacher is Σ_j c_kj p_j, p_j softened; c takes gradient steps on Σ_k KL(Σ_j c_kj p_j ‖ p_k)·T² + ρ‖c_k − 1/N‖².
    Predictions are sent after local training and before distillation, or clients would repeat the teacher.

    Rows of c stay distributions: after each step they are projected onto the simplex. In a round in which only some take
    part, c is learned among them, each row's weight on the absent stays, and teachers are mixtures of those present. The
    server keeps `coefficients` `[S, S]` of the S clients `seen` so far; all others are 1/N.

    Deviation: the authors train each model on its own rows before round 1; here that is off by
    default (`initial_phase`), and with it the first round has its usual local epochs besides.
    """

    title = "KT-pFL"
    evaluated_when = "after distillation of the newest mixture, as deployed with the next broadcast"
    shared = ()
    uploads = {"predictions": ItemSpec("rows", use="each", private=True, share="predictions")}
    needs = Needs(proxy_set="required", tasks=("multiclass",))

    temperature: PositiveFloat = 10.0
    initial_private_epochs: PositiveInt = Field(
        1, description="initial phase: epochs on the client's own rows"
    )
    digest_epochs: PositiveInt = Field(1, description="epochs on the proxy set, after receiving")
    rho: NonNegativeFloat = Field(0.7, description="ρ: pull of the coefficients towards 1/N")
    coefficient_lr: PositiveFloat = Field(0.01, description="learning rate of the coefficients")
    coefficient_steps: NonNegativeInt = Field(
        5, description="gradient steps on the coefficients a round; 0: plain means"
    )

    @staticmethod
    def coefficient_indices(server: Participant, ids: list[str]) -> Tensor:
        """Rows and columns of clients that were seen in c, int64."""
        place = {id: i for i, id in enumerate(server.state["seen"])}
        return torch.tensor([place[id] for id in ids])

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        state = server.state
        if "senders" not in state or not recipient.has_proxy:
            return {}
        weights = state["predictions"].new_ones(len(state["senders"]))
        if recipient.client_id in state["seen"]:
            weights = state["coefficients"][
                self.coefficient_indices(server, [recipient.client_id]),
                self.coefficient_indices(server, state["senders"]),
            ]
        return {
            **self.teacher_for(server, recipient),
            TEACHER: self.mixed_teacher(normalize_rows(weights), state["predictions"]),
        }

    def mixed_teacher(self, weights: Tensor, p: Tensor) -> Tensor:
        """Logits `[D, C]` whose softmax at temperature T is the mixture of predictions `[K, D, C]`."""
        return self.temperature * torch.einsum("k,kdc->dc", weights, p).clamp(min=TINY).log()

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        if TEACHER in received:
            yield self.distill(client, received, self.digest_epochs)

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.initial_training(client)
        yield from self.deploy(client, received)
        yield local_fit(client)
        if not may_share(client, "predictions"):
            return {}
        logits = yield Predict("model", Rows("proxy", self.proxy_indices(client)))
        return {"predictions": (logits / self.temperature).softmax(-1)}

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        sent = uploads.having("predictions")
        if not sent:
            return
        p = torch.stack([u.payload["predictions"] for u in sent])
        ids = [u.client for u in sent]
        c = self.extend_coefficients(server, ids, p)
        place = self.coefficient_indices(server, ids)
        among = c[place][:, place]
        if self.coefficient_steps:
            learned = yield from self.update_coefficients(server, normalize_rows(among), p)
            c[place[:, None], place] = learned * among.sum(1, keepdim=True)
        self.store_teacher(server, coefficients=c, predictions=p, senders=ids)
        yield from self.train_student(
            server, self.mixed_teacher(p.new_full((len(ids),), 1 / len(ids)), p)
        )

    @staticmethod
    def extend_coefficients(server: Participant, ids: list[str], p: Tensor) -> Tensor:
        """c of all clients seen, these among them from now on; of the device and dtype of `p`."""
        had = server.state.get("coefficients")
        seen = server.state.get("seen", [])
        known = set(seen)
        server.state["seen"] = seen = [*seen, *(id for id in ids if id not in known)]
        c = p.new_full((len(seen), len(seen)), 1 / len(server.peers))
        if had is not None:
            c[: len(had), : len(had)] = had
        return c

    def update_coefficients(self, server: Participant, mix: Tensor, p: Tensor) -> Plan[Tensor]:
        """Coefficients `[K, K]` after this round's gradient steps."""
        k = len(mix)
        server.arch[MIX] = ModelSpec.from_config("linear", k, (k,))
        for _ in range(self.coefficient_steps):
            server.models[MIX] = {"head.weight": mix.t().contiguous(), "head.bias": torch.zeros(k)}
            yield Fit(
                {MIX: ("head.weight",)},
                Coefficients(self.temperature, self.rho),
                TensorRows({"x": torch.eye(k), "own": torch.arange(k)}),
                batch_size=k,
                # a sum over clients, not their mean
                optimizer=OptimizerConfig(name="sgd", lr=self.coefficient_lr * k),
                context={"predictions": p},
                label="coefficients",
            )
            mix = project_to_simplex(server.models[MIX]["head.weight"].t())
        del server.arch[MIX], server.models[MIX]
        return mix


def normalize_rows(weights: Tensor) -> Tensor:
    """Each row divided by its sum; equal shares where that is nought."""
    total = weights.sum(-1, keepdim=True)
    return torch.where(
        total > 0, weights / total.clamp(min=TINY), torch.full_like(weights, 1 / weights.shape[-1])
    )


def project_to_simplex(rows: Tensor) -> Tensor:
    """The nearest distribution to each row (Euclidean; Duchi et al. 2008, Figure 1)."""
    u = rows.sort(-1, descending=True).values
    excess = (u.cumsum(-1) - 1) / torch.arange(
        1, rows.shape[-1] + 1, dtype=rows.dtype, device=rows.device
    )
    last = (u > excess).sum(-1, keepdim=True) - 1
    return (rows - excess.gather(-1, last)).clamp(min=0)
