"""KT-pFL: personalized teachers, which are learned mixtures of all clients' predictions."""

from __future__ import annotations

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Items, Needs, may_share, register_algorithm
from hetero_fl.algorithms.distillation import TEACHER, InitialPhase
from hetero_fl.algorithms.local_training import local_fit
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import MIN_PROBABILITY, Coefficients
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import ItemSpec, Payload
from hetero_fl.core.plan import Fit, Plan, TensorRows

# Slot of a linear layer with bias 0. Column k of the weight contains the coefficients of client k.
MIX = "mix"


@register_algorithm("kt_pfl")
class KTpFL(InitialPhase):
    """Distill a personalized mixture of all clients' proxy predictions into each client's model.

    The teacher of client k is Σ_j c_kj p_j, where p_j are softened predictions on the proxy set
    (Zhang et al. 2021, Algorithm 1). The server learns c by gradient steps on Σ_k KL(Σ_j c_kj p_j ‖
    p_k)·T² + ρ‖c_k − 1/K‖² for the K participants of the round, and projects each row onto the
    probability simplex after every step. Clients upload predictions after local training, before
    distillation.

    With partial participation, the server learns only the coefficients among the participants of
    the round, and teachers are mixtures of the participants' predictions. The server keeps a
    coefficient for each pair of clients seen so far. New coefficients start at 1/N for N clients.

    Use this method where clients form groups with similar data. The method is not suited to very
    many clients, because the number of coefficients grows with the square of the number of clients.

    Deviations: the authors normalize c with a softmax and use the mean squared error for
    distillation. The authors also train each model on the client's own rows before the first round.
    Here, this phase is off by default (`initial_phase`) and is followed by local training in the
    first round.

    References:
        Zhang et al., "Parameterized Knowledge Transfer for Personalized Federated Learning",
            NeurIPS 2021. https://arxiv.org/abs/2111.02862

    Example:
        >>> from hetero_fl.algorithms import KTpFL
        >>> KTpFL(rho=0.5).uploads["predictions"].use  # the server needs each client's predictions
        'each'
    """

    title = "KT-pFL"
    evaluated_when = "after distillation of the newest mixture, as deployed with the next broadcast"
    shared = ()
    uploads = {"predictions": ItemSpec("rows", use="each", private=True, share="predictions")}
    needs = Needs(proxy_set="required", tasks=("multiclass",), shared_model=True)

    temperature: PositiveFloat = 10.0
    initial_private_epochs: PositiveInt = Field(
        1, description="initial phase: epochs on the client's own rows"
    )
    digest_epochs: PositiveInt = Field(
        1, description="epochs of distillation at the client after each broadcast"
    )
    rho: NonNegativeFloat = Field(
        0.7, description="weight ρ of the coefficients' distance to uniform weights 1/K"
    )
    coefficient_lr: PositiveFloat = Field(0.01, description="learning rate of the coefficients")
    coefficient_steps: NonNegativeInt = Field(
        5, description="gradient steps per round on the coefficients; 0: uniform means"
    )

    @staticmethod
    def coefficient_indices(server: Participant, client_ids: list[str]) -> Tensor:
        """Return the indices of clients in the matrix of coefficients, int64 `[K]`."""
        index = {client_id: i for i, client_id in enumerate(server.state["seen"])}
        return torch.tensor([index[client_id] for client_id in client_ids])

    @override
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
        """Return the logits of a teacher whose softened prediction is a mixture of predictions.

        The softmax of the logits at temperature T equals the mixture.

        Args:
            weights: Weights of the mixture, shape `[K]`, which sum to 1.
            p: Predictions of K clients, shape `[K, D, C]`.

        Returns:
            Logits of shape `[D, C]`.
        """
        mixture = torch.einsum("k,kdc->dc", weights, p)
        return self.temperature * mixture.clamp(min=MIN_PROBABILITY).log()

    @override
    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        if TEACHER in received:
            yield self.distill(client, received, self.digest_epochs)

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.initial_training(client)
        yield from self.deploy(client, received)
        yield local_fit(client)
        if not may_share(client, "predictions"):
            return {}
        logits = yield from self.predict_proxy(client, self.proxy_indices(client))
        return {"predictions": (logits / self.temperature).softmax(-1)}

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        sent = uploads.containing("predictions")
        if not sent:
            return
        p = torch.stack([u.payload["predictions"] for u in sent])
        client_ids = [u.client for u in sent]
        c = self.extend_coefficients(server, client_ids, p)
        indices = self.coefficient_indices(server, client_ids)
        among = c[indices][:, indices]
        if self.coefficient_steps:
            learned = yield from self.update_coefficients(server, normalize_rows(among), p)
            c[indices[:, None], indices] = learned * among.sum(1, keepdim=True)
        self.store_teacher(server, coefficients=c, predictions=p, senders=client_ids)
        uniform = p.new_full((len(client_ids),), 1 / len(client_ids))
        yield from self.train_student(server, self.mixed_teacher(uniform, p))

    @staticmethod
    def extend_coefficients(server: Participant, client_ids: list[str], p: Tensor) -> Tensor:
        """Add clients to the clients seen so far and return the extended matrix of coefficients.

        The coefficients of new clients are 1/N, where N is the number of all clients.

        Args:
            server: The server.
            client_ids: Participants of the round.
            p: Predictions of the participants, which determine the device and dtype of the result.

        Returns:
            Coefficients of the S clients seen so far, shape `[S, S]`.
        """
        previous = server.state.get("coefficients")
        seen = server.state.get("seen", [])
        known = set(seen)
        seen = [*seen, *(client_id for client_id in client_ids if client_id not in known)]
        server.state["seen"] = seen
        c = p.new_full((len(seen), len(seen)), 1 / len(server.peers))
        if previous is not None:
            c[: len(previous), : len(previous)] = previous
        return c

    def update_coefficients(self, server: Participant, mix: Tensor, p: Tensor) -> Plan[Tensor]:
        """Take this round's gradient steps on the coefficients.

        Args:
            server: The server.
            mix: Coefficients of the K participants, shape `[K, K]`.
            p: Predictions of the participants, shape `[K, D, C]`.

        Returns:
            The new coefficients, shape `[K, K]`.
        """
        k = len(mix)
        server.arch[MIX] = ModelSpec.from_config("linear", k, (k,))
        for _ in range(self.coefficient_steps):
            server.models[MIX] = {"head.weight": mix.t().contiguous(), "head.bias": torch.zeros(k)}
            yield Fit(
                {MIX: ("head.weight",)},
                Coefficients(self.temperature, self.rho),
                TensorRows({"x": torch.eye(k), "own": torch.arange(k)}),
                batch_size=k,
                # The loss is a sum over clients, but `Fit` minimizes the mean.
                optimizer=OptimizerConfig(name="sgd", lr=self.coefficient_lr * k),
                context={"predictions": p},
                label="coefficients",
            )
            mix = project_to_simplex(server.models[MIX]["head.weight"].t())
        del server.arch[MIX], server.models[MIX]
        return mix


def normalize_rows(weights: Tensor) -> Tensor:
    """Divide each row by the sum of the row. Rows whose sum is not positive become uniform."""
    total = weights.sum(-1, keepdim=True)
    return torch.where(
        total > 0,
        weights / total.clamp(min=MIN_PROBABILITY),
        torch.full_like(weights, 1 / weights.shape[-1]),
    )


def project_to_simplex(rows: Tensor) -> Tensor:
    """Project each row onto the probability simplex (Duchi et al. 2008, Figure 1).

    Example:
        >>> import torch
        >>> from hetero_fl.algorithms.kt_pfl import project_to_simplex
        >>> project_to_simplex(torch.tensor([[1.5, 0.5], [0.3, 0.3]]))
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000]])
    """
    u = rows.sort(-1, descending=True).values
    excess = (u.cumsum(-1) - 1) / torch.arange(
        1, rows.shape[-1] + 1, dtype=rows.dtype, device=rows.device
    )
    last = (u > excess).sum(-1, keepdim=True) - 1
    return (rows - excess.gather(-1, last)).clamp(min=0)
