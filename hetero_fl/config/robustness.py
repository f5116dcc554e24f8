"""Settings of robust aggregation and of simulated attacks."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from hetero_fl.config.base import ConfigSection, choice_type, rename_keys

RULES = ("mean", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "norm_bound")
PREDICTIONS = ("mean", "median", "agreement")
ATTACKS = (
    "label_flip",
    "backdoor",
    "sign_flip",
    "gaussian",
    "little_is_enough",
    "confident_wrong",
)


class AggregationConfig(ConfigSection):
    """Aggregation of uploads.

    All rules except `mean` weight clients equally, because malicious clients could report any
    number of rows.

    Example:
        >>> import hetero_fl as hfl
        >>> config = {"data": {"name": "digits"}, "clients": {"count": 4}, "rounds": 1}
        >>> federation = hfl.Federation.from_config(config)
        >>> aggregation = hfl.Aggregation(rule="median")
        >>> federation.prepare(hfl.FedAvg(), aggregation=aggregation).config.aggregation.rule
        'median'
    """

    rule: choice_type(  # type: ignore[valid-type]
        *RULES,
        prefix="python:",
        removed={"bulyan": "multi_krum", "fltrust": "median or norm_bound"},
    ) = Field(
        "mean",
        description="aggregation of parameters and model updates, for each tensor over the "
        "clients that have it",
    )
    predictions: choice_type(  # type: ignore[valid-type]
        *PREDICTIONS,
        prefix="python:",
        removed=dict.fromkeys(("spectral", "down_weight"), "median or agreement"),
    ) = Field("mean", description="aggregation of predictions on the proxy set")
    statistics: Literal["mean", "median"] = Field(
        "mean",
        description="aggregation of class statistics (prototypes, mean logits); `median`: of the "
        "clients' class means",
    )
    malicious: int | float = Field(
        0.2,
        description="malicious clients that a robust rule tolerates: a number, or a share < 0.5 "
        "of the clients that upload",
    )
    bound: PositiveFloat | None = Field(
        None,
        description="`norm_bound`: maximum L2 norm of a client's update; `null`: the median of the "
        "update norms",
    )

    @model_validator(mode="before")
    @classmethod
    def _rename_keys(cls, raw: Any) -> Any:
        former = {"liars": "malicious"}  # style: ok (former name)
        return rename_keys(raw, former, "aggregation")

    @field_validator("malicious")
    @classmethod
    def _check_malicious(cls, value: int | float) -> int | float:
        """Check that the value is a number of clients or a share below one half."""
        if value < 0 or (isinstance(value, float) and value >= 0.5):
            raise ValueError(f"must be an integer >= 0 or a share >= 0 and < 0.5, got {value}")
        return value

    @property
    def is_plain_mean(self) -> bool:
        """Whether all uploads are aggregated by their mean."""
        return self.rule == self.predictions == self.statistics == "mean"

    def num_malicious(self, num_senders: int) -> int:
        """Return how many of `num_senders` clients may be malicious.

        If `malicious` is a share, the number is rounded up.
        """
        if isinstance(self.malicious, int):
            return self.malicious
        return math.ceil(self.malicious * num_senders - 1e-9)


class AttacksConfig(ConfigSection):
    """Simulated attacks. Reported metrics are means over the honest clients.

    Example:
        >>> import hetero_fl as hfl
        >>> config = {"data": {"name": "digits"}, "clients": {"count": 4}, "rounds": 1}
        >>> federation = hfl.Federation.from_config(config)
        >>> attacks = hfl.Attacks(name="sign_flip", share=0.25)
        >>> federation.prepare(hfl.FedAvg(), attacks=attacks).config.attacks.name
        'sign_flip'
    """

    name: choice_type(  # type: ignore[valid-type]
        *ATTACKS,
        prefix="python:",
        removed=dict.fromkeys(("scaled", "inner_product"), "sign_flip")
        | dict.fromkeys(("flipped", "targeted", "collusion"), "confident_wrong"),
    ) = Field(
        description="attack; on training rows: `label_flip`, `backdoor`; on all uploads: "
        "`sign_flip`, `gaussian`, `little_is_enough`; on predictions: `confident_wrong`"
    )
    share: float = Field(
        0.2, gt=0, lt=1, description="share of the clients that are malicious; sampled by the seed"
    )
    clients: list[str] | None = Field(
        None, min_length=1, description="ids of the malicious clients; `null`: sampled by `share`"
    )
    from_round: PositiveInt = Field(1, description="first round of the attack")
    strength: PositiveFloat | None = Field(
        None,
        description="factor on the update (default for `sign_flip` 4, `backdoor` 1), on the noise "
        "norm (`gaussian` 10), on the standard deviation (`little_is_enough`: the theoretical "
        "maximum), on logits (`confident_wrong` 10); `null`: these defaults",
    )
    target: NonNegativeInt = Field(0, description="`backdoor`: class that the attack promotes")
    pairs: dict[int, int] | None = Field(
        None,
        description="`label_flip`: new class by old class; `null`: y becomes C − 1 − y for C "
        "classes",
    )
    stamped: float = Field(
        0.5,
        gt=0,
        le=1,
        description="`backdoor`: share of a malicious client's rows that receive the trigger",
    )
    trigger: PositiveInt = Field(
        3, description="`backdoor`: side length in pixels of the bright square, bottom right"
    )
