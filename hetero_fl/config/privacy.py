"""Differential privacy: of whom, how much noise, and how it is accounted."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, model_validator

from hetero_fl.config.base import ConfigSection, choice_type


class AdaptiveClipConfig(ConfigSection):
    """The bound follows a quantile of the updates' norms (Andrew et al. 2021)."""

    quantile: float = Field(
        0.5, ge=0, le=1, description="share of the updates that the bound is to leave as they are"
    )
    lr: PositiveFloat = Field(
        0.2, description="C becomes C·exp(−lr·(share that was left − quantile))"
    )
    noise: PositiveFloat | None = Field(
        None,
        description="standard deviation on the number of unclipped updates; none: a twentieth of the cohort",
    )


class PrivacyConfig(ConfigSection):
    """What one record, or one client, may change in everything that leaves."""

    unit: choice_type("record", "client", "local") = Field(  # type: ignore[valid-type]
        "record",
        description="record: one training row, noised at its client (DP-SGD); client: all of one client, noised once at the "
        "server (DP-FedAvg); local: all of one client, noised before it leaves",
    )
    target_epsilon: PositiveFloat | None = Field(
        None,
        description="largest ε: without `noise_multiplier` the noise follows from it and the planned rounds; the run stops "
        "before a round that would exceed it",
    )
    noise_multiplier: PositiveFloat | None = Field(
        None,
        description="z: standard deviation of the noise over the sensitivity; none: from `target_epsilon`",
    )
    delta: float = Field(
        1e-5,
        gt=0,
        lt=1,
        description="δ; well below one over the number of rows (record) or clients (client)",
    )
    accountant: choice_type("prv", "rdp") = Field(  # type: ignore[valid-type]
        "prv", description="opacus' accountant: prv is tighter, rdp a little faster"
    )
    clip: PositiveFloat | dict[str, PositiveFloat] = Field(
        1.0,
        description="largest L2 norm: of a row's gradient (record), of a client's update (client, local); there by item, too: "
        "{model: 1, logits: 50}",
    )
    sample_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="record: chance of each row to be in a step; none: batch_size over the client's rows. One rate for all gives "
        "them one ε, and large clients large batches",
    )
    statistics_clip: PositiveFloat = Field(
        10.0,
        description="record: largest L2 norm of what a row adds to class statistics (features, logits)",
    )
    statistics_noise: PositiveFloat = Field(
        4.0,
        description="record: noise multiplier of class statistics and label counts, in units of `noise_multiplier`: they see "
        "every row, training a sample",
    )
    poisson_cohorts: bool = Field(
        False,
        description="client: each client takes part with probability per_round / clients, which ε then counts on; else the "
        "cohort has a fixed size and nothing is gained from sampling",
    )
    adaptive_clip: AdaptiveClipConfig | None = Field(
        None, description="client: the bound follows the norms"
    )
    votes: bool = Field(
        False,
        description="client: a prediction on a public row leaves as one vote; the class with most votes, after noise, is "
        "the teacher's (PATE)",
    )

    distributed: bool = Field(
        False,
        description="client: under channel.secure_sum each client adds a share of the noise, so that not even the server sees a "
        "sum without it; enough as long as `threshold` clients stay and add theirs",
    )

    @model_validator(mode="after")
    def _check_goal(self) -> PrivacyConfig:
        if self.target_epsilon is None and self.noise_multiplier is None:
            raise ValueError("needs target_epsilon or noise_multiplier")
        if self.unit == "record" and isinstance(self.clip, dict):
            raise ValueError(
                "clip: by item is for unit: client or local; a row's gradient has one bound"
            )
        for unit, names in {
            "record": ("sample_rate",),
            "client": ("poisson_cohorts", "adaptive_clip", "votes", "distributed"),
        }.items():
            for name in names:
                if getattr(self, name) and self.unit != unit:
                    raise ValueError(f"{name} belongs to unit: {unit}, not {self.unit}")
        if self.distributed and self.adaptive_clip is not None:
            raise ValueError(
                "distributed: cannot be combined with adaptive_clip, whose counts the server noises"
            )
        if self.votes and self.adaptive_clip is not None:
            raise ValueError(
                "votes: cannot be combined with adaptive_clip: all votes have one norm"
            )
        return self

    def with_placeholder_noise(self) -> PrivacyConfig:
        """The section with some noise multiplier, for rehearsals in which no number matters."""
        return self.model_copy(update={"noise_multiplier": self.noise_multiplier or 1.0})

    @property
    def known_noise_multiplier(self) -> float:
        """The noise multiplier, once it is known."""
        assert self.noise_multiplier is not None  # the run was prepared
        return self.noise_multiplier

    def clip_norm(self, item: str) -> float:
        """The largest norm of what a client sends under that name."""
        return self.clip.get(item, 1.0) if isinstance(self.clip, dict) else self.clip
