"""Partial sharing and personal models: FedPer, LG-FedAvg, FedBN, FedRep, FedBABU and Ditto."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from hetero_fl.algorithms.averaging import FedAvg, FedAvgFT
from hetero_fl.algorithms.base import Needs, register_algorithm
from hetero_fl.algorithms.prediction import adjust_to_labels
from hetero_fl.algorithms.round_parts import SharedPart, common_part, local_fit, shared_part
from hetero_fl.core.objectives import Proximal
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Plan, Predict, Rows

BODY = ("backbone.",)
HEAD = ("head.",)


@register_algorithm("fedper")
class FedPer(FedAvg):
    """Average the backbone, while each client keeps its own head (Arivazhagan et al. 2019).

    Backbone and head are trained together. In the paper, one or more of the last layers stay at the
    client. Here, only the head stays.

    Use this method where clients' labels differ and local test accuracy matters. FedPer is the
    simplest personalized method. The global test accuracy is low, because a head does not predict
    classes that are absent from the client's rows.

    References:
        Arivazhagan et al., "Federated Learning with Personalization Layers", 2019.
            https://arxiv.org/abs/1912.00818

    Example:
        >>> from hetero_fl.algorithms import FedPer
        >>> FedPer.shared
        ('backbone.',)
    """

    title = "FedPer"
    shared = BODY
    needs = Needs(one_architecture=True)


@register_algorithm("lg_fedavg")
class LGFedAvg(FedAvg):
    """Average the head, while each client keeps its own backbone (Liang et al. 2020).

    Backbone and head are trained together. Few parameters are exchanged. With a common
    `feature_dim` and `clients.common: [head.]`, heads are averaged across architectures as well.

    Use this method where clients' inputs differ. The method is not suited to clients with little
    data, because backbones learn nothing from other clients. Deviation: the authors start from a
    model that was trained with FedAvg. Set `init_from` to start from such a model.

    References:
        Liang et al., "Think Locally, Act Globally: Federated Learning with Local and Global
            Representations", 2020. https://arxiv.org/abs/2001.01523

    Example:
        >>> from hetero_fl.algorithms import LGFedAvg
        >>> LGFedAvg.shared
        ('head.',)
    """

    title = "LG-FedAvg"
    shared = HEAD


def fit_part(client: Participant, part: tuple[str, ...], **changes: Any) -> Plan[None]:
    """Train one part of a client's own model.

    Nothing is trained if the part contains no parameters, like the backbone of the model `linear`.

    Args:
        client: The client.
        part: Prefixes of the names of the trained tensors.
        **changes: Further arguments of `local_fit`.
    """
    if any(n.startswith(part) for n in client.arch["model"].parameter_names):
        yield local_fit(client, train={"model": part}, **changes)


@register_algorithm("fedbn")
class FedBN(FedAvg):
    """Average all layers except BatchNorm, which each client keeps for its own data.

    Clients keep whole BatchNorm layers (Li et al. 2021, Algorithm 1) or only their running
    statistics (SiloBN, Andreux et al. 2020). The layers are identified by their type.

    Use this method where inputs differ between clients, for example images of different scanners.
    Models without BatchNorm are averaged as in FedAvg. Clients that never train keep the BatchNorm
    layers of the initial model.

    References:
        Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization",
            ICLR 2021. https://arxiv.org/abs/2102.07623

    Example:
        >>> from hetero_fl.algorithms import FedBN
        >>> FedBN().shared.local, FedBN(keep="statistics").shared.local
        ('batch_norm', 'batch_norm_statistics')
    """

    title = "FedBN"

    keep: Literal["layers", "statistics"] = Field(
        "layers",
        description="whether whole BatchNorm layers or only their running statistics stay local",
    )

    @property
    def shared(self) -> SharedPart:  # type: ignore[override]  # depends on a setting
        """Exchanged part: the whole model, without BatchNorm layers or without their statistics."""
        return SharedPart(local="batch_norm" if self.keep == "layers" else "batch_norm_statistics")


@register_algorithm("fedrep")
class FedRep(FedPer):
    """Average the backbone, while clients train their own heads first and the backbone afterwards.

    The backbone is frozen while the head is trained, and vice versa (Collins et al. 2021, Algorithm
    1). The paper trains heads for 10 epochs.

    Use this method like `fedper`, for many clients with little data each. The epochs of the head
    add to the time of local training.

    References:
        Collins et al., "Exploiting Shared Representations for Personalized Federated Learning",
            ICML 2021. https://arxiv.org/abs/2102.07078

    Example:
        >>> from hetero_fl.algorithms import FedRep
        >>> FedRep(head_epochs=10).shared
        ('backbone.',)
    """

    title = "FedRep"

    head_epochs: PositiveInt | None = Field(
        None, description="local epochs of the head; `null`: the client's `epochs` or `steps`"
    )
    body_epochs: PositiveInt = Field(1, description="local epochs of the backbone")

    @override
    def local_training(self, client: Participant, received: Payload) -> Plan[None]:
        yield from fit_part(client, HEAD, label="head", epochs=self.head_epochs)
        yield from fit_part(client, BODY, epochs=self.body_epochs)


@register_algorithm("fedbabu")
class FedBABU(FedAvgFT, FedPer):
    """Train and average the backbone with a frozen head, and fine-tune models before evaluation.

    All clients keep the same initial head during training. Before evaluation, each client
    fine-tunes a copy of the model (Oh et al. 2022, Algorithm 1 and section 5). The default of the
    client setting `fine_tune_epochs` is 5.

    Use this method where labels differ and clients, including new ones, can fine-tune the model
    before use. Clients are evaluated with the fine-tuned copies, also on the global test set. The
    server is evaluated with the model before fine-tuning.

    References:
        Oh et al., "FedBABU: Towards Enhanced Representation for Federated Image Classification",
            ICLR 2022. https://arxiv.org/abs/2106.06042

    Example:
        >>> from hetero_fl.algorithms import FedBABU
        >>> FedBABU(finetune="head").shared
        ('backbone.',)
    """

    title = "FedBABU"
    _broadcasts_means = FedAvg._broadcasts_means
    _removed = {"finetune_epochs": "the client option fine_tune_epochs"}

    finetune: Literal["all", "head"] = Field(
        "all", description="part that is fine-tuned: the whole model or the head"
    )

    @override
    def local_training(self, client: Participant, received: Payload) -> Plan[None]:
        yield from fit_part(client, BODY)

    @override
    def personalize(self, client: Participant, received: Payload) -> Plan[None]:
        epochs = client.settings.fine_tune_epochs
        if epochs:
            train = {"model": None if self.finetune == "all" else HEAD}
            label = "personalise"  # style: ok (label of a random stream)
            yield local_fit(client, train=train, epochs=epochs, label=label)

    @override
    def server_model(self, server: Participant) -> str | None:
        is_trained = any(
            common_part(shared_part(self, profile.settings), BODY)
            for profile in server.peers.profiles
        )
        # All clients have the same head.
        return next(iter(server.models)) if is_trained and len(server.models) == 1 else None


PERSONAL = "personal"


@register_algorithm("ditto")
class Ditto(FedAvg):
    """Average parameters, while each client also trains a personal model close to the average.

    The personal model v minimizes loss + (λ/2)‖v − θ‖², where θ is the received model (Li et al.
    2021, Algorithm 1). The personal model starts from the first received model and stays at the
    client. Clients are evaluated with the personal model on the local test set and with the shared
    model on the global test set. Clients that have not been trained use the shared model for both
    test sets.

    Use this method where you need good personal models and a good shared model. Local training
    takes twice as long. The global test accuracy equals the accuracy of FedAvg. With λ = 0, the
    personal model trains alone. The paper tunes λ between 0.1 and 1.

    References:
        Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021.
            https://arxiv.org/abs/2012.04221

    Example:
        >>> from hetero_fl.algorithms import Ditto
        >>> method = Ditto(weight=1.0)
        >>> list(method.uploads)  # the personal model is not uploaded
        ['model']
    """

    title = "Ditto"
    evaluated_when = (
        "personal model on local tests, the shared one on the global test, after aggregation "
        "(saved models: personal)"
    )

    needs = Needs(one_architecture=True, shared_model=True, unused_options=("fine_tune_epochs",))

    weight: NonNegativeFloat = Field(
        0.1, description="weight λ of the personal model's distance to the shared model"
    )
    personal_epochs: PositiveInt | None = Field(
        None,
        description="local epochs of the personal model; `null`: the client's `epochs` or `steps`",
    )

    @override
    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        client.arch[PERSONAL] = client.arch["model"]
        client.models.setdefault(PERSONAL, client.models["model"])

    @override
    def local_training(self, client: Participant, received: Payload) -> Plan[None]:
        objective = Proximal(client.task.kind, PERSONAL, mu=self.weight)
        personal = local_fit(
            client,
            objective,
            epochs=self.personal_epochs,
            context={"anchor": client.models["model"]},
            train={PERSONAL: None},
            label=PERSONAL,
        )
        yield [local_fit(client), personal]

    @override
    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        logits = yield Predict(PERSONAL if personal else "model", rows)
        return adjust_to_labels(self, client, logits, personal)
