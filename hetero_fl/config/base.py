"""The base class of all sections, and the settings of optimizers and staleness weights."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from hetero_fl.utils.errors import suggest_or_list

# What every part of the configuration has in common: unknown keys, infinities and NaN are refused,
# values are frozen.


class ConfigSection(BaseModel):
    """A part of the configuration."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True
    )


def choice_type(*names: str, prefix: str | None = None, suffix: str | None = None) -> Any:
    """A string type that takes one of the names (or what starts with the prefix, or ends in the suffix) and suggests the
    nearest."""

    def check(value: object) -> object:
        if isinstance(value, str):
            other = (prefix and value.startswith(prefix)) or (suffix and value.endswith(suffix))
            if value in names or other:
                return value
        raise ValueError(f"found {value!r}{suggest_or_list(value, names)}")

    return Annotated[str, BeforeValidator(check)]


def _check_unique(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError(f"found {names}; each at most once")
    return names


UniqueNames = Annotated[list[str], AfterValidator(_check_unique)]


# The optimizers of local training.


class OptimizerConfig(ConfigSection):
    """A torch optimizer and how its learning rate moves over the rounds."""

    name: choice_type("sgd", "adam", "adamw") = Field(  # type: ignore[valid-type]
        "adam", description="torch's optimizer, made anew each round"
    )
    lr: PositiveFloat = Field(1e-3, description="learning rate of the first round")
    head_lr: PositiveFloat | None = Field(
        None, description="the head's own learning rate; none: the same"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    nesterov: bool = Field(False, description="of sgd with momentum")
    weight_decay: float = Field(
        0.0, ge=0, description="L2 penalty; adamw: decoupled from the gradient"
    )
    clip_norm: PositiveFloat | None = Field(None, description="largest norm of the whole gradient")
    schedule: choice_type("constant", "cosine", "step", "linear") = Field(  # type: ignore[valid-type]
        "constant", description="of lr over the rounds"
    )
    gamma: float = Field(
        0.1, gt=0, le=1, description="step: the factor; cosine, linear: the last lr over the first"
    )
    step_rounds: PositiveInt = Field(10, description="step: rounds between two reductions")

    @model_validator(mode="after")
    def _check_combination(self) -> OptimizerConfig:
        if self.nesterov and (self.name != "sgd" or not self.momentum):
            raise ValueError("nesterov needs name: sgd and momentum above 0")
        if self.momentum and self.name != "sgd":
            raise ValueError(f"momentum belongs to sgd, not {self.name}")
        return self


class OptimizerLayer(OptimizerConfig):
    """Settings over those of an optimizer: whether they go together is seen once the layers are merged."""

    @model_validator(mode="after")
    def _check_combination(self) -> OptimizerLayer:
        if (
            "name" in self.model_fields_set
            and self.name != "sgd"
            and (self.momentum or self.nesterov)
        ):
            raise ValueError(
                f"{'momentum' if self.momentum else 'nesterov'} belongs to sgd, not {self.name}"
            )
        return self


# What an upload is worth that comes from an older version of the server: settings of asynchronous
# running.

Kind = choice_type("constant", "polynomial", "hinge")
STEEPNESS = {"constant": 0.0, "polynomial": 0.5, "hinge": 10.0}  # a, as Xie et al. have it


class StalenessConfig(ConfigSection):
    """s(τ), τ being the versions that the server has made since the client was given its task (Xie et al. 2019, section 5.2)."""

    kind: Kind = Field(  # type: ignore[valid-type]
        "polynomial",
        description="constant: 1; polynomial: (1 + τ)^−a; hinge: 1 up to τ = b, 1/(a·(τ − b) + 1) after it",
    )
    a: NonNegativeFloat | None = Field(
        None, description="how steep; none: 0.5 of the polynomial, 10 of the hinge"
    )
    b: NonNegativeInt = Field(4, description="of the hinge: versions that cost nothing")

    @property
    def unused_keys(self) -> list[str]:
        """What is set, and means nothing to this kind."""
        steep = ["a"] if self.kind == "constant" and self.a is not None else []
        return [*steep, *(["b"] if self.kind != "hinge" and self.b != StalenessConfig().b else [])]

    def weight(self, staleness: int) -> float:
        """s(τ), 1 for an upload that is not stale."""
        a = STEEPNESS[self.kind] if self.a is None else self.a
        if self.kind == "polynomial":
            return float((1 + staleness) ** -a)
        return (
            1.0
            if self.kind == "constant" or staleness <= self.b
            else 1 / (a * (staleness - self.b) + 1)
        )
