"""The optimisers of local training."""

from __future__ import annotations

import math

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from hetero_fl.config.base import Section, choice


class OptimizerConfig(Section):
    """A torch optimiser and how its learning rate moves over the rounds."""

    name: choice("sgd", "adam", "adamw") = Field(  # type: ignore[valid-type]
        "adam", description="torch's optimiser, made anew each round"
    )
    lr: PositiveFloat = Field(1e-3, description="learning rate of the first round")
    head_lr: PositiveFloat | None = Field(None, description="the head's own learning rate; none: the same")
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    nesterov: bool = Field(False, description="of sgd with momentum")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty; adamw: decoupled from the gradient")
    clip_norm: PositiveFloat | None = Field(None, description="largest norm of the whole gradient")
    schedule: choice("constant", "cosine", "step", "linear") = Field("constant", description="of lr over the rounds")  # type: ignore[valid-type]
    gamma: float = Field(0.1, gt=0, le=1, description="step: the factor; cosine, linear: the last lr over the first")
    step_rounds: PositiveInt = Field(10, description="step: rounds between two reductions")

    @model_validator(mode="after")
    def _meaningful(self) -> OptimizerConfig:
        if self.nesterov and (self.name != "sgd" or not self.momentum):
            raise ValueError("nesterov needs name: sgd and momentum above 0")
        if self.momentum and self.name != "sgd":
            raise ValueError(f"momentum belongs to sgd, not {self.name}")
        return self

    def at(self, round: int, rounds: int) -> OptimizerConfig:
        """The optimiser of one round (from 0) of so many, its learning rates moved along the schedule."""
        done = round / max(1, rounds - 1)
        factor = {
            "constant": 1.0,
            "step": self.gamma ** (round // self.step_rounds),
            "cosine": self.gamma + (1 - self.gamma) * (1 + math.cos(math.pi * min(1.0, done))) / 2,
            "linear": 1 - (1 - self.gamma) * min(1.0, done),
        }[self.schedule]
        if factor == 1.0:
            return self
        head = None if self.head_lr is None else self.head_lr * factor
        return self.model_copy(update={"lr": self.lr * factor, "head_lr": head})


class OptimizerLayer(OptimizerConfig):
    """Settings over those of an optimiser: whether they go together is seen once the layers are merged."""

    @model_validator(mode="after")
    def _meaningful(self) -> OptimizerLayer:
        if "name" in self.model_fields_set and self.name != "sgd" and (self.momentum or self.nesterov):
            raise ValueError(f"{'momentum' if self.momentum else 'nesterov'} belongs to sgd, not {self.name}")
        return self
