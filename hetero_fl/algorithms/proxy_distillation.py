"""Distillation on a proxy set without shared parameters: FedMD, DS-FL and KT-pFL."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor
from typing_extensions import override

from hetero_fl.aggregation.teachers import MIN_LOG_PROBABILITY, Sharpening
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Needs, register_algorithm
from hetero_fl.algorithms.distillation import (
    TEACHER,
    ProxyDistillation,
    ProxyPredictions,
    predicted_probabilities,
)
from hetero_fl.algorithms.round_parts import Items, load_objective, local_fit
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import MIN_PROBABILITY, Coefficients, TeacherDistillation
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Fit, Plan, Rows, TensorRows

DONE = "initial_phase"


class InitialPhase(ProxyPredictions):
    """Base class of methods with an initial training phase before a client's first round.

    In its first round, a client trains on the labeled proxy set (FedMD only) and then on its own
    rows, before the regular training. The completed phase is recorded in the client's private state
    and repeated only if the round fails. Models that are evaluated earlier are untrained. The
    number of epochs is fixed, whereas the authors stop early. Clients use their own optimizers.

    FedMD needs `data.proxy.labels: true`, unless `initial_public_epochs` is 0. The phase cannot be
    combined with `privacy.unit: record` and is not part of the simulated time.
    """

    initial_phase: bool = Field(
        False, description="whether clients train before the first round in which they participate"
    )
    initial_private_epochs: PositiveInt = Field(
        25, description="initial phase: epochs on the client's own rows"
    )

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        if self.initial_phase and DONE not in client.state:
            yield from self.initial_training(client)
            client.state[DONE] = True
        return (yield from super().train(client, received))

    def initial_training(self, client: Participant) -> Plan[None]:
        """Run the initial phase of a client, by default on the client's own rows only."""
        yield local_fit(client, epochs=self.initial_private_epochs, label="initial private")


@register_algorithm("fedmd")
class FedMD(InitialPhase, ProxyDistillation):
    """Distill the mean of all clients' predictions on a public proxy set into each client's model.

    Clients first distill the last round's consensus on the proxy set, then train on their own rows
    (Li and Wang 2019, Algorithm 1). Clients upload logits, shape `[D, C]` for D proxy rows and C
    classes, and receive the mean of all uploads. Labels of the proxy set are used in the initial
    phase only.

    Use this method where all models differ and no parameter may leave a client. The method needs
    public rows that resemble the private rows. Under label skew, set `logit_adjustment` and either
    `teacher: contrast` or `align`.

    Deviations: the default distance is the KL divergence with T = 2, whereas the authors' code uses
    the mean absolute error of logits. The paper's initial phase is off by default
    (`initial_phase`), so that the proxy set needs no labels. The initial phase has no early
    stopping and is followed by local training in the first round.

    References:
        Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", 2019.
            https://arxiv.org/abs/1910.03581

    Example:
        >>> from hetero_fl.algorithms import FedMD
        >>> FedMD(distance="mae").uploads["logits"].needed_share
        'predictions'
        >>> FedMD(initial_phase=True).needs.proxy_set
        'labeled'
    """

    title = "FedMD"
    evaluated_when = "after local training, as in the paper"
    shared = ()
    _broadcasts_means = ProxyDistillation._broadcasts_means

    distance: Literal["kl", "mae"] = Field(
        "kl", description="distance between a client's logits and the consensus"
    )
    digest_epochs: PositiveInt = Field(
        1, description="epochs on the proxy set before local training"
    )
    initial_phase: bool = Field(
        False,
        description="whether clients train on the labeled proxy set (`data.proxy.labels`) and then "
        "on their own rows before their first round",
    )
    initial_public_epochs: NonNegativeInt = Field(
        20, description="initial phase: epochs on the labeled proxy set"
    )

    @model_validator(mode="after")
    def _check_distance(self) -> FedMD:
        if self.distance == "mae" and self.sharpen != "none":
            raise ValueError(
                "sharpen cannot be combined with distance=mae, because sharpened logits are "
                "defined up to a constant; set only one of them"
            )
        return self

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # depends on settings
        """Requirements of the method: a proxy set, with labels for the initial phase."""
        reads_labels = self.initial_phase and self.initial_public_epochs > 0
        return Needs(proxy_set="labeled" if reads_labels else "required")

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return self.teacher_for(server, recipient) if recipient.purpose == "train" else {}

    @override
    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        if TEACHER in received:
            loss = TeacherDistillation(client.task.kind, self.temperature, self.distance)
            yield self.distill(client, received, self.digest_epochs, objective=loss)

    @override
    def initial_training(self, client: Participant) -> Plan[None]:
        if self.initial_public_epochs and client.has_proxy:
            # Logit adjustment and class weights depend on the client's own rows.
            yield Fit(
                {"model": None},
                load_objective(client.settings.objective, client.task),
                Rows("proxy"),
                epochs=self.initial_public_epochs,
                batch_size=self.proxy_batch_size,
                optimizer=client.optimizer,
                label="initial public",
            )
        yield from super().initial_training(client)


@register_algorithm("ds_fl")
class DSFL(ProxyDistillation):
    """Distill the sharpened mean of all clients' probabilities on sampled proxy rows.

    Clients train, upload probabilities on the round's proxy rows, and distill the sharpened mean,
    as does the server's student (Itahara et al. 2020, Algorithm 1). The teacher is broadcast as
    logits.

    The default `sharpen: era` is the entropy reduction of the paper, and `power` is the sharpening
    of SCARLET (Azuma et al. 2025).

    Use this method where the mean prediction is uncertain.

    References:
        Itahara et al., "Distillation-Based Semi-Supervised Federated Learning for
            Communication-Efficient Collaborative Training with Non-IID Private Data", IEEE TMC
            2023. https://arxiv.org/abs/2008.06180
        Azuma et al., "Soft-Label Caching and Sharpening for Communication-Efficient Federated
            Distillation", 2025. https://arxiv.org/abs/2504.19602

    Example:
        >>> from hetero_fl.algorithms import DSFL
        >>> list(DSFL(era_temperature=0.5).uploads), list(DSFL(align=0.5).uploads)
        (['probabilities'], ['probabilities', 'counts'])
    """

    title = "DS-FL"
    _renamed = {"distil_epochs": "distill_epochs"}
    shared = ()
    _broadcasts_means = ProxyDistillation._broadcasts_means
    predictions = {"probabilities": ItemSpec("rows", private=True, share="predictions")}
    needs = Needs(proxy_set="required", tasks=("multiclass", "multilabel"), shared_model=True)
    evaluated_when = (
        "after distillation of the newest consensus, as deployed with the next broadcast"
    )

    _removed = {
        "cache_life": "a smaller proxy_rows for fewer bytes",
        "bits": "channel.compress=[{quantize: 4}] for fewer bytes",
    }

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

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return self.teacher_for(server, recipient)

    @override
    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        if TEACHER in received:
            yield self.distill(client, received, self.distill_epochs)

    @override
    def weighted_predictions(self, client: Participant, logits: Tensor) -> Item:
        p = predicted_probabilities(client.task, logits)
        if self.averages_logarithms(client.task):
            p = p.log().clamp(min=MIN_LOG_PROBABILITY)
        return replace(super().weighted_predictions(client, logits), values=p)

    @override
    def teacher_from_mean(self, server: Participant, uploads: Uploads, mean: Tensor) -> Tensor:
        p = mean
        if self.averages_logarithms(server.task):
            p = self.align_teacher(server, uploads, mean).softmax(-1)
        elif self.align and server.task.kind == "multiclass":
            logits = mean.clamp(min=MIN_PROBABILITY).log()
            p = self.align_teacher(server, uploads, logits).softmax(-1)
        return self.sharpened_logits(server.task, p)


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
    downloads = {
        **InitialPhase.downloads,
        TEACHER: ItemSpec(
            "rows",
            share="predictions",
            description="the client's mixture of all predictions of proxy rows, `[D, C]`",
        ),
    }
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
    def coefficients(server: Participant, client_id: str, others: list[str]) -> list[float]:
        """Return a client's coefficients of other clients' predictions, which start at 1/N."""
        learned = server.state.get("coefficients", {}).get(client_id, {})
        return [learned.get(other, 1 / len(server.peers)) for other in others]

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        if "senders" not in server.state or not recipient.has_proxy:
            return {}
        p = server.state["predictions"]
        weights = self.coefficients(server, recipient.client_id, server.state["senders"])
        teacher = self.mixed_teacher(normalize_rows(p.new_tensor(weights)), p)
        return {**self.teacher_for(server, recipient), TEACHER: teacher}

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
    def prediction_items(self, client: Participant, logits: Tensor) -> Items:
        return {"predictions": (logits / self.temperature).softmax(-1)}

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        sent = uploads.containing("predictions")
        if not sent:
            return
        p = torch.stack([u.payload["predictions"] for u in sent])
        client_ids = [u.client for u in sent]
        c = p.new_tensor(
            [self.coefficients(server, client_id, client_ids) for client_id in client_ids]
        )
        if self.coefficient_steps:
            learned = yield from self.update_coefficients(server, normalize_rows(c), p)
            c = learned * c.sum(1, keepdim=True)
        known = server.state.setdefault("coefficients", {})
        for client_id, row in zip(client_ids, c.tolist(), strict=True):
            known.setdefault(client_id, {}).update(zip(client_ids, row, strict=True))
        self.store_teacher(server, predictions=p, senders=client_ids)
        uniform = p.new_full((len(client_ids),), 1 / len(client_ids))
        yield from self.train_student(server, self.mixed_teacher(uniform, p))

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
        >>> from hetero_fl.algorithms.proxy_distillation import project_to_simplex
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
