"""Rules that bear liars, and liars for studies."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from hetero_fl.config.base import ConfigSection, choice_type

RULES = ("mean", "median", "trimmed_mean", "krum", "multi_krum", "bulyan", "norm_bound", "fltrust")
PREDICTIONS = ("mean", "median", "spectral", "down_weight", "agreement")
UPLOAD_ATTACKS = ("sign_flip", "scaled", "gaussian", "little_is_enough", "inner_product")
ROW_ATTACKS = ("flipped", "confident_wrong", "targeted", "collusion")
ATTACKS = ("label_flip", "backdoor", *UPLOAD_ATTACKS, *ROW_ATTACKS)


class AggregationConfig(ConfigSection):
    """How uploads are combined. A rule other than `mean` weighs all senders alike: anyone can claim any number of rows."""

    rule: choice_type(*RULES, prefix="python:") = Field(  # type: ignore[valid-type]
        "mean", description="of parameters and their updates, within the owners of each tensor"
    )
    predictions: choice_type(*PREDICTIONS, prefix="python:") = Field(  # type: ignore[valid-type]
        "mean", description="of predictions on proxy rows, over all who send any"
    )
    statistics: Literal["mean", "median"] = Field(
        "mean",
        description="of class sums (prototypes, logits by class); median: of the clients' class means",
    )
    liars: int | float = Field(
        0.2,
        description="how many liars a rule has to bear: a number, or a share (below 0.5) of those whose word it is",
    )
    bound: PositiveFloat | None = Field(
        None,
        description="norm_bound: largest norm of a client's update; none: the median of theirs",
    )

    @field_validator("liars")
    @classmethod
    def _check_malicious(cls, value: int | float) -> int | float:
        if value < 0 or (isinstance(value, float) and value >= 0.5):
            raise ValueError(
                f"found {value}; write a whole number of liars, or a share of 0 to below 0.5"
            )
        return value

    @property
    def is_plain_mean(self) -> bool:
        """Whether everything is combined by its mean."""
        return self.rule == self.predictions == self.statistics == "mean"

    def num_malicious(self, num_senders: int) -> int:
        """How many of so many senders may lie; a share is rounded up."""
        return (
            self.liars
            if isinstance(self.liars, int)
            else math.ceil(self.liars * num_senders - 1e-9)
        )


class AttacksConfig(ConfigSection):
    """Simulated liars, for studies. Figures are then means over the honest clients."""

    name: choice_type(*ATTACKS, prefix="python:") = Field(  # type: ignore[valid-type]
        description="what they do: to their training rows (label_flip, backdoor), to all that they upload (sign_flip, scaled, "
        "gaussian, little_is_enough, inner_product), to their predictions (flipped, confident_wrong, targeted, collusion)"
    )
    share: float = Field(0.2, gt=0, lt=1, description="of the clients, drawn by the seed")
    clients: list[str] | None = Field(
        None, min_length=1, description="ids of the liars, in place of a share"
    )
    from_round: PositiveInt = Field(1, description="the first round in which they lie")
    strength: PositiveFloat | None = Field(
        None,
        description="factor on the update (sign_flip 4, scaled 10, backdoor 1), on its size (gaussian 10), of deviations "
        "(little_is_enough: the most that theory lets pass), of the mean (inner_product 8), of logits (others 10); none: these",
    )
    target: NonNegativeInt = Field(
        0, description="backdoor, targeted: the class that liars want to be seen"
    )
    pairs: dict[int, int] | None = Field(
        None, description="label_flip: class to class; none: y to C − 1 − y"
    )
    stamped: float = Field(
        0.5, gt=0, le=1, description="backdoor: share of a liar's rows that bear the trigger"
    )
    trigger: PositiveInt = Field(
        3, description="backdoor: side of the bright square in the lower right corner, pixels"
    )
