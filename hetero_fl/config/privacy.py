"""Settings of differential privacy."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, model_validator

from hetero_fl.config.base import ConfigSection, choice_type


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
