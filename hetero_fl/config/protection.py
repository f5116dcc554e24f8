"""Settings of differential privacy, robust aggregation and simulated attacks."""

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


class AdaptiveClipConfig(ConfigSection):
    """Clipping bound that tracks a quantile of the update norms (Andrew et al. 2021)."""

    quantile: float = Field(
        0.5, ge=0, le=1, description="share of the updates whose norm is below the bound"
    )
    lr: PositiveFloat = Field(
        0.2,
        description="step size: in each round the bound C is multiplied by "
        "exp(−lr·(share of unclipped updates − quantile))",
    )
    noise: PositiveFloat | None = Field(
        None,
        description="standard deviation of the noise added to the number of unclipped updates; "
        "`null`: 1/20 of the cohort size",
    )


class PrivacyConfig(ConfigSection):
    """Differential privacy for training rows or clients.

    Example:
        >>> import hetero_fl as hfl
        >>> config = {"data": {"name": "digits"}, "clients": {"count": 4}, "rounds": 1}
        >>> federation = hfl.Federation.from_config(config)
        >>> privacy = hfl.Privacy(target_epsilon=8.0, delta=1e-3)
        >>> defaults = ["clients.defaults.model=mlp"]
        >>> prepared = federation.prepare(hfl.FedAvg(), privacy=privacy, overrides=defaults)
        >>> round(prepared.config.privacy.noise_multiplier, 1)
        0.5
    """

    unit: choice_type("record", "client", "local") = Field(  # type: ignore[valid-type]
        "record",
        description="what is protected and where noise is added; `record`: one training row, at "
        "its client (DP-SGD); `client`: all data of a client, at the server (DP-FedAvg); `local`: "
        "all data of a client, at the client",
    )
    target_epsilon: PositiveFloat | None = Field(
        None,
        description="upper bound of ε; without `noise_multiplier` it determines the noise; "
        "training stops before a round that would exceed it; `null`: no bound",
    )
    noise_multiplier: PositiveFloat | None = Field(
        None,
        description="noise multiplier z, the standard deviation of the noise divided by the "
        "sensitivity; `null`: computed from `target_epsilon` and the number of rounds",
    )
    delta: float = Field(
        1e-5,
        gt=0,
        lt=1,
        description="δ; choose it well below 1/n for n training rows (`record`) or clients",
    )
    accountant: choice_type("prv", "rdp") = Field(  # type: ignore[valid-type]
        "prv",
        description="privacy accountant of Opacus; `prv` is tighter, `rdp` slightly faster",
    )
    clip: PositiveFloat | dict[str, PositiveFloat] = Field(
        1.0,
        description="maximum L2 norm of a row's gradient (`record`) or of a client's update "
        "(`client`, `local`; also by item, such as `{model: 1, logits: 50}`)",
    )
    sample_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="`record`: probability of each row to be in a batch; a common rate gives all "
        "clients the same ε, and large clients large batches; `null`: batch size divided by the "
        "client's number of rows",
    )
    statistics_clip: PositiveFloat = Field(
        10.0,
        description="`record`: maximum L2 norm of a row's contribution to class statistics "
        "(features, logits)",
    )
    statistics_noise: PositiveFloat = Field(
        4.0,
        description="`record`: noise multiplier of class statistics and label counts, as a "
        "multiple of `noise_multiplier`; unlike training steps, they use all rows",
    )
    poisson_cohorts: bool = Field(
        False,
        description="`client`: sample each client independently with probability "
        "per_round / clients, which reduces ε; otherwise the cohort size is fixed and ε is "
        "computed without amplification by sampling",
    )
    adaptive_clip: AdaptiveClipConfig | None = Field(
        None, description="`client`: adapt the clipping bound; `null`: a fixed bound"
    )
    votes: bool = Field(
        False,
        description="`client`: upload each prediction as one vote; the teacher is the class with "
        "the most votes after noise (PATE)",
    )
    distributed: bool = Field(
        False,
        description="`client`: with `channel.secure_sum`, each client adds a share of the noise, "
        "so that the server never sees a sum without noise; the noise suffices if "
        "`channel.secure_sum.threshold` clients complete the round",
    )

    @model_validator(mode="after")
    def _check_combination(self) -> PrivacyConfig:
        """Check that the noise is determined and that all settings apply to the unit."""
        if self.target_epsilon is None and self.noise_multiplier is None:
            raise ValueError("set target_epsilon or noise_multiplier")
        if self.unit == "record" and isinstance(self.clip, dict):
            raise ValueError("clip by item requires unit=client or unit=local, got unit=record")
        for unit, names in {
            "record": ("sample_rate",),
            "client": ("poisson_cohorts", "adaptive_clip", "votes", "distributed"),
        }.items():
            for name in names:
                if getattr(self, name) and self.unit != unit:
                    raise ValueError(f"{name} requires unit={unit}, got unit={self.unit}")
        if self.distributed and self.adaptive_clip is not None:
            raise ValueError(
                "distributed cannot be combined with adaptive_clip, "
                "for which the server adds noise; set one of them"
            )
        if self.votes and self.adaptive_clip is not None:
            raise ValueError(
                "votes cannot be combined with adaptive_clip, "
                "as all votes have the same norm; remove adaptive_clip"
            )
        return self

    def with_placeholder_noise(self) -> PrivacyConfig:
        """Return a copy for dry runs, in which the noise multiplier is 1 if it was None."""
        return self.model_copy(update={"noise_multiplier": self.noise_multiplier or 1.0})

    @property
    def known_noise_multiplier(self) -> float:
        """The noise multiplier, which must not be None. Prepared runs always have one."""
        assert self.noise_multiplier is not None
        return self.noise_multiplier

    def clip_norm(self, item: str) -> float:
        """Return the maximum L2 norm of a client's contribution to an item of an upload.

        Args:
            item: Name of the item, such as `model`. If `clip` is a dictionary without this item,
                the result is 1.
        """
        return self.clip.get(item, 1.0) if isinstance(self.clip, dict) else self.clip


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
