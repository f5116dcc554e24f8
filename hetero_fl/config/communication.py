"""Settings of the channel: compression and secure aggregation."""

from __future__ import annotations

import math
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_serializer,
    model_validator,
)

from hetero_fl.config.base import ConfigSection
from hetero_fl.utils.errors import suggest_or_list

# What a secure sum is configured by, and what follows from it for a cohort.


class SecureAggregationConfig(ConfigSection):
    """The server learns the sum of a round's uploads and no single one (Bonawitz et al. 2017)."""

    threshold: float = Field(
        2 / 3,
        description="clients that have to stay until a round's end, or it is given up: a share of the cohort above one half, "
        "or a number from 2 on",
    )
    range: PositiveFloat = Field(
        65536.0,
        description="largest number that a client may send, weighted: |value| × weight / largest weight; what is larger "
        "leaves the client out of the round",
    )
    fraction_bits: PositiveInt | None = Field(
        None,
        description="binary digits after the point; none: as many as fit, cohort × range × 2^bits < 2^63",
    )
    neighbours: PositiveInt | None = Field(
        None,
        description="clients with whom each shares masks (SecAgg+), an even number; none: everybody in a small cohort, in "
        "a large one as many as are safe if a fifth of all tell the server what they know",
    )

    @field_validator("threshold")
    @classmethod
    def _share_or_number(cls, value: float) -> float:
        if not (0.5 < value <= 1 or (value >= 2 and value == int(value))):
            raise ValueError(
                f"found {value:g}; give a share above 0.5 and at most 1, or a number of clients from 2 on"
            )
        return value

    @field_validator("neighbours")
    @classmethod
    def _check_even(cls, value: int | None) -> int | None:
        if value is not None and value % 2:
            raise ValueError(
                f"found {value}; half of them stand on either side, choose {value - 1} or {value + 1}"
            )
        return value

    def min_survivors(self, cohort: int) -> int:
        """How many of a cohort have to stay: the fewest uploads that a sum is ever told of."""
        if self.threshold > 1:
            return int(self.threshold)
        return max(2, cohort // 2 + 1, math.ceil(self.threshold * cohort - 1e-9))

    def num_fraction_bits(self, cohort: int) -> int:
        """Binary digits after the point; the most that fit unless they are given. Below 1: not even one does."""
        return (
            self.fraction_bits if self.fraction_bits is not None else self.max_fraction_bits(cohort)
        )

    def max_fraction_bits(self, cohort: int) -> int:
        """The most binary digits with which no sum over a cohort leaves 64-bit integers: cohort · range · 2^bits < 2^63."""
        return math.ceil(63 - math.log2(cohort * self.range)) - 1


# The channel's side of the configuration: what happens to items on their way up and down.

SPARSE = ("topk", "randk", "lowrank")  # what they leave out of a change is nought at the receiver
FORMATS = ("quantize", "half")  # how numbers are written: the end of a chain
STAGES = (*SPARSE, "top_classes", *FORMATS)


class StageConfig(ConfigSection):
    """One stage of a chain: exactly one of these keys (with `bucket` beside `quantize`)."""

    topk: float | None = Field(
        None,
        gt=0,
        description="of a model's change: send the largest numbers, a share below 1 or a count; the rest is kept for later",
    )
    randk: float | None = Field(
        None,
        gt=0,
        description="of a model's change: send numbers drawn by a key that both ends know, a share below 1 or a count, divided "
        "by the rate at which they are kept",
    )
    lowrank: float | None = Field(
        None,
        gt=0,
        le=1,
        description="of a model's change: send matrices as the fewest terms with this share of the energy; the rest is kept",
    )
    top_classes: PositiveInt | None = Field(
        None, description="of predictions: send so many classes a row, and the mean of the others"
    )
    quantize: int | None = Field(None, ge=1, le=16, description="send each number in so many bits")
    bucket: PositiveInt | None = Field(
        None, description="quantize: so many numbers share a scale; none: those of a tensor"
    )
    half: bool = Field(
        False, description="send each number in half precision (also as the word `half` alone)"
    )

    @field_validator("topk", "randk")
    @classmethod
    def _share_or_count(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and value != int(value):
            raise ValueError(f"found {value:g}; a share below 1, or a whole number of values")
        return value

    @model_validator(mode="after")
    def _check_single_key(self) -> StageConfig:
        stages = [name for name in STAGES if getattr(self, name)]
        if len(stages) != 1:
            raise ValueError(
                f"found {' and '.join(stages) or 'no stage'}; each stage has an entry of its own: {', '.join(STAGES)}"
            )
        if self.bucket is not None and self.quantize is None:
            raise ValueError(f"found bucket with {stages[0]}; it is for quantize")
        return self

    @model_serializer(mode="plain")
    def _as_written(self) -> dict[str, Any]:
        return {name: value for name in type(self).model_fields if (value := getattr(self, name))}

    @property
    def kind(self) -> str:
        """Which stage it is."""
        return next(name for name in STAGES if getattr(self, name))


def _expand_words(chain: Any) -> Any:
    """A chain with the word `half` written out. Raises ValueError for other words and for what is no list."""
    if not isinstance(chain, list | tuple):
        raise ValueError(
            f"found {str(chain)[:60]!r}; a list of stages was meant, as [topk: 0.01, quantize: 8], "
            "or [] for none"
        )
    for entry in chain:
        if isinstance(entry, str) and entry in STAGES and entry != "half":
            raise ValueError(f"found {entry!r} alone; it takes a number, as in [{entry}: 8]")
        if isinstance(entry, dict) and "name" in entry:
            named = entry["name"] if entry["name"] in STAGES else "topk"
            share = {"topk": 0.01, "randk": 0.01, "lowrank": 0.9}.get(named, 8)
            written = "half" if named == "half" else f"{{{named}: {share}}}"
            raise ValueError(
                f"found the key 'name'; a stage is its own key, as in {written}; choose from {', '.join(STAGES)}"
            )
        if isinstance(entry, str) and entry != "half":
            raise ValueError(f"found {entry!r}{suggest_or_list(entry, STAGES)}")
    return [{"half": True} if entry == "half" else entry for entry in chain]


Chain = Annotated[tuple[StageConfig, ...], BeforeValidator(_expand_words)]


PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "compress": [{"topk": 0.01}, {"quantize": 8}],
        "compress_down": [{"topk": 0.05}, {"quantize": 4}],
        "entropy": True,
    }
}


class ChannelConfig(ConfigSection):
    """What happens to items between client and server. Stages of a chain follow one another; each takes the items that it is
    made for, the others pass."""

    preset: Literal["small"] | None = Field(
        None,
        description="recommended chains: small, for models of a million parameters or more; other keys of the section replace "
        "those of the preset",
    )

    compress: Chain = Field(
        (),
        description="stages of what clients send, as `[topk: 0.01, quantize: 8]`; `[]`: as it is",
    )
    compress_down: Chain = Field(
        (),
        description="stages of what the server sends; topk, randk and lowrank send changes of the model, and what they leave out "
        "is part of the next change; `[]`: as it is",
    )
    entropy: bool = Field(
        False,
        description="topk: code the places of what is sent without loss, where that makes them shorter",
    )

    secure_sum: SecureAggregationConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(name, str) or name not in PRESETS:
            return values
        given = {key: values[key] for key in PRESETS[name] if key in values}
        if given.keys() == PRESETS[name].keys():
            own = cls(**given)
            preset = cls(**PRESETS[name])
            if all(getattr(own, key) != getattr(preset, key) for key in given):
                raise ValueError(
                    f"found preset {name} and {', '.join(given)}, which replace all of it; remove them"
                )
        return {**PRESETS[name], **values}

    @field_validator("compress", "compress_down")
    @classmethod
    def _ordered(cls, chain: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        names = [stage.kind for stage in chain]
        twice = [name for name, times in Counter(names).items() if times > 1]
        if twice:
            raise ValueError(f"found {twice[0]} twice; a chain has each stage once")
        formats = [name for name in names if name in FORMATS]
        if len(formats) > 1:
            raise ValueError(
                f"found {' and '.join(formats)}; numbers are written in one way: take one of them"
            )
        if formats and names[-1] != formats[0]:
            raise ValueError(
                f"found {names[-1]} after {formats[0]}; {formats[0]} has to be the last"
            )
        if "randk" in names and {"topk", "lowrank"} & set(names):
            other = next(name for name in names if name in ("topk", "lowrank"))
            raise ValueError(
                f"found randk and {other}; randk scales up what it keeps, {other} keeps the rest: take one"
            )
        return chain
