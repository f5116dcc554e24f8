"""FedLC: parameter averaging with calibrated margins in the local loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor
from typing_extensions import override

from hetero_fl.algorithms.base import Items, Needs, register_algorithm, upload_model
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.algorithms.local_training import local_fit
from hetero_fl.core.objectives import Batch, Context, ModelViews, Supervised
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Plan

Denominator = Literal["others", "all"]


@dataclass(frozen=True)
class CalibratedMargins(Supervised):
    """The cross-entropy of logits from which a margin is subtracted for each class (FedLC, eq. 5).

    The entry `margins` of the context, shape `[C]`, contains the margins τ·n_c^(-1/4), which are
    infinite for classes without examples.

    Args:
        denominator: Classes in the denominator of the softmax: `others` excludes the true class,
            `all` includes it.
    """

    denominator: Denominator = "others"

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        logits = nets[self.slot](batch.x).logits - context["margins"]
        if self.denominator == "all":
            return F.cross_entropy(logits, batch.y, reduction="none")
        is_true = torch.arange(logits.shape[-1], device=logits.device) == batch.y[:, None]
        others = logits.masked_fill(is_true, -torch.inf)
        true = logits.gather(-1, batch.y[:, None]).squeeze(-1)
        # If the client has a single class, the denominator is empty and the loss is 0.
        has_others = others.isfinite().any(-1)
        total = torch.where(has_others[:, None], others, 0.0).logsumexp(-1)
        return torch.where(has_others, total - true, 0.0)


def label_margins(counts: Tensor, tau: float) -> Tensor:
    """Return the margin τ·n_c^(−1/4) of each class, shape `[C]`.

    The margin of a class without examples is infinite.

    Args:
        counts: Number of examples of each class, shape `[C]`.
        tau: Factor of the margins.
    """
    margins = tau * counts.to(torch.get_default_dtype()).clamp(min=1).pow(-0.25)
    return margins.masked_fill(counts == 0, torch.inf)


@register_algorithm("fedlc")
class FedLC(FedAvg):
    """Average parameters trained with margins that are larger for classes with few examples.

    Clients minimize the cross-entropy of z_c − τ·n_c^(−1/4), where the client has n_c examples of
    class c (Zhang et al. 2022, eq. 5). In the paper's equation, the denominator of the softmax
    excludes the true class. The margin of classes without examples is infinite, which removes these
    classes from the softmax. The exchange is the same as in FedAvg.

    Use this method where labels are skewed and all clients have the same model. The related rule of
    Menon et al. (2021) is available for other methods as the setting `logit_adjustment`.

    The implementation has not been compared with the authors' code, which does not seem to be
    public, and the paper does not state τ. Other implementations use 0.1 or 1, and the usual
    denominator (`all`).

    References:
        Zhang et al., "Federated Learning with Label Distribution Skew via Logits Calibration", ICML
            2022. https://arxiv.org/abs/2209.00189

    Example:
        >>> from hetero_fl.algorithms import FedLC
        >>> FedLC(tau=0.1).denominator
        'others'
    """

    title = "FedLC"
    needs = Needs(
        one_architecture=True,
        tasks=("multiclass",),
        shared_model=True,
        unused_options=("logit_adjustment", "class_weights", "objective"),
    )

    tau: NonNegativeFloat = Field(1.0, description="factor τ of the margins")
    denominator: Denominator = Field(
        "others",
        description="classes in the denominator of the softmax: all but the true class, or all",
    )

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        objective = CalibratedMargins(client.task.kind, denominator=self.denominator)
        margins = label_margins(client.counts, self.tau)
        yield local_fit(client, objective, context={"margins": margins})
        return upload_model(self, client, self.weight_of(client))
