"""Settings of compression, secure aggregation and homomorphic encryption.

A compression chain is a sequence of stages that are applied to a message in order.
"""

from __future__ import annotations

import math
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

from hetero_fl.config.base import ConfigSection, ShareOrCount
from hetero_fl.utils.errors import describe_removed
from hetero_fl.utils.text import format_list

# Stages that send some of the numbers of a model update. The receiver sets the others to zero.
SPARSE = ("topk", "randk")

# Stages that encode numbers and must be the last stage of a chain.
FORMATS = ("quantize", "half")

STAGES = (*SPARSE, "top_classes", *FORMATS)


class SecureAggregationConfig(ConfigSection):
    """Secure aggregation, with which the server learns only sums (Bonawitz et al. 2017)."""

    _removed = {"neighbors": "at most 200 clients in a round, which all share masks"}

    threshold: ShareOrCount | None = Field(
        None,
        description="clients that must complete the round, else it is discarded: a share of the "
        "cohort > 0.5, or a number >= 2; `null`: more than two thirds",
    )
    range: PositiveFloat = Field(
        65536.0,
        description="largest value that a client may send, after multiplication by its weight "
        "divided by the largest weight; clients with larger values are left out of the round",
    )
    fraction_bits: PositiveInt | None = Field(
        None,
        description="binary digits after the point; `null`: as many as satisfy "
        "cohort size × range × 2^bits < 2^63",
    )

    @field_validator("threshold")
    @classmethod
    def _check_threshold(cls, value: int | float | None) -> int | float | None:
        """Check that the value is a share of the cohort or a number of clients."""
        if value is not None and not (value >= 2 if isinstance(value, int) else value > 0.5):
            raise ValueError(
                f"must be a share > 0.5 and <= 1 or a number of clients >= 2, got {value}"
            )
        return value

    def min_survivors(self, cohort: int) -> int:
        """Return the minimum number of clients in a cohort that must complete the round.

        By default, the server may collude with less than a third of the cohort (Bonawitz et al.
        2017, section 6.2).
        """
        if self.threshold is None:
            return max(2, 2 * cohort // 3 + 1)
        if isinstance(self.threshold, int):
            return self.threshold
        return max(2, cohort // 2 + 1, math.ceil(self.threshold * cohort - 1e-9))

    def max_fraction_bits(self, cohort: int) -> int:
        """Return the maximum number of binary digits for which no sum over a cohort overflows.

        The maximum is the largest number of bits with cohort · range · 2^bits < 2^63.
        """
        return math.ceil(63 - math.log2(cohort * self.range)) - 1


class HomomorphicConfig(ConfigSection):
    """Homomorphic encryption (CKKS), with which the server learns neither uploads nor their sum."""

    range: PositiveFloat = Field(
        1024.0,
        description="largest value that a client may send, after multiplication by its weight "
        "divided by the largest weight; clients with larger values are left out of the round",
    )
    fraction_bits: PositiveInt | None = Field(
        None,
        description="binary digits after the point; `null`: as many as are exact in a sum over the "
        "cohort of values up to `range`",
    )

    def num_noise_bits(self, cohort: int) -> int:
        """Return the number of binary digits below the last exact digit, which contain the noise.

        The noise of a ciphertext has a standard deviation of 147 (degree 4096, secret key). A sum
        of n ciphertexts is rounded correctly if its noise is less than 2^(bits - 1), which is at
        least 13.9 standard deviations.
        """
        return 12 + math.ceil(math.log2(cohort) / 2)

    def max_fraction_bits(self, cohort: int) -> int:
        """Return the maximum number of binary digits for which no sum over a cohort overflows.

        The maximum is the largest number with cohort · range · 2^(bits + noise bits) < 2^58, which
        is a quarter of the ciphertext modulus.
        """
        return math.ceil(58 - self.num_noise_bits(cohort) - math.log2(cohort * self.range)) - 1


def num_fraction_bits(config: SecureAggregationConfig | HomomorphicConfig, cohort: int) -> int:
    """Return the number of binary digits after the point.

    If `fraction_bits` is None, the maximum is returned, which is less than 1 if no digit fits.

    Args:
        config: The section `channel.secure_sum` or `channel.homomorphic`.
        cohort: Number of clients in a cohort.
    """
    if config.fraction_bits is not None:
        return config.fraction_bits
    return config.max_fraction_bits(cohort)


class StageConfig(ConfigSection):
    """One stage of a compression chain, which has a single key."""

    _removed = {
        "lowrank": "topk or randk",
        "entropy": "topk, whose positions are always compressed",
        "bucket": "quantize alone, which has one scale per tensor",
    }

    topk: ShareOrCount | None = Field(
        None,
        gt=0,
        description="model changes: send the values of largest magnitude, a share <= 1.0 or a "
        "number >= 1; the rest is added to the next change (error feedback)",
    )
    randk: ShareOrCount | None = Field(
        None,
        gt=0,
        description="model changes: send randomly chosen values, a share <= 1.0 or a number >= 1, "
        "divided by the probability to be chosen",
    )
    top_classes: PositiveInt | None = Field(
        None,
        description="predictions: send the values of this number of classes per row and the mean "
        "of the others",
    )
    quantize: Literal[1, 2, 4, 8, 16] | None = Field(
        None, description="send each number with this number of bits"
    )
    half: bool = Field(
        False, description="send numbers in half precision; the stage may be written as `half`"
    )

    @model_validator(mode="after")
    def _check_single_key(self) -> StageConfig:
        """Check that the entry defines exactly one stage."""
        stages = [name for name in STAGES if getattr(self, name)]
        if len(stages) != 1:
            raise ValueError(
                f"expected one stage per entry, got {' and '.join(stages) or 'none'}; "
                f"choose from {', '.join(STAGES)}"
            )
        return self

    @model_serializer(mode="plain")
    def _as_written(self) -> dict[str, Any]:
        return {name: value for name in type(self).model_fields if (value := getattr(self, name))}

    @property
    def kind(self) -> str:
        """Name of the stage, which is one of `STAGES`."""
        return next(name for name in STAGES if getattr(self, name))


def _expand_half(chain: Any) -> Any:
    """Convert the stage `half` to a mapping, and reject other stages without a number."""
    if not isinstance(chain, list | tuple):
        return chain
    for entry in chain:
        if isinstance(entry, str) and entry != "half":
            removed = describe_removed(entry, StageConfig._removed)
            expected = f"expected {{stage: number}} with a stage of {', '.join(STAGES)}"
            raise ValueError(removed or f"{expected}, got '{entry}'")
    return [{"half": True} if entry == "half" else entry for entry in chain]


Chain = Annotated[tuple[StageConfig, ...], BeforeValidator(_expand_half)]


PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "compress": [{"topk": 0.01}, {"quantize": 8}],
        "compress_down": [{"quantize": 4}],
    }
}


class ChannelConfig(ConfigSection):
    """Compression and protection of messages between clients and server.

    The stages of a chain are applied in order, each to the items that the stage supports.

    Example:
        >>> import hetero_fl as hfl
        >>> config = {"data": {"name": "digits"}, "clients": {"count": 4}, "rounds": 1}
        >>> federation = hfl.Federation.from_config(config)
        >>> channel = hfl.Channel(compress=[{"quantize": 8}])
        >>> federation.prepare(hfl.FedAvg(), channel=channel).config.channel.compress[0].quantize
        8
    """

    _removed = {"entropy": StageConfig._removed["entropy"]}
    _former_defaults = {"entropy": False}

    preset: Literal["small"] | None = Field(
        None,
        description="recommended chains: `small` is for models of a million parameters or more; "
        "other keys of this section replace those of the preset; `null`: no preset",
    )
    compress: Chain = Field(
        (),
        description="compression of uploads, such as `[topk: 0.01, quantize: 8]`; `[]`: none",
    )
    compress_down: Chain = Field(
        (),
        description="compression of broadcasts by `top_classes`, `quantize` or `half`; `[]`: none",
    )
    secure_sum: SecureAggregationConfig | None = Field(
        None, description="secure aggregation; `null`: the server receives individual uploads"
    )
    homomorphic: HomomorphicConfig | None = Field(
        None,
        description="homomorphic encryption under a key of the clients; `null`: the server can "
        "read its models",
    )

    @property
    def summed(self) -> str:
        """Name of the setting with which the server receives no single uploads, or ""."""
        names = ("secure_sum", "homomorphic")
        return next((name for name in names if getattr(self, name) is not None), "")

    @model_validator(mode="after")
    def _check_single_protection(self) -> ChannelConfig:
        """Check that uploads are protected in one way."""
        if self.secure_sum is not None and self.homomorphic is not None:
            raise ValueError("cannot combine secure_sum with homomorphic; choose one of them")
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        """Set the keys that are not set to the values of the preset."""
        name = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(name, str) or name not in PRESETS:
            return values
        return {**PRESETS[name], **values}

    @field_validator("compress", "compress_down")
    @classmethod
    def _check_chain(cls, chain: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        """Check that the stages can be combined in this order."""
        names = [stage.kind for stage in chain]
        if len(set(names)) < len(names):
            raise ValueError(f"each stage may occur once, got {format_list(names)}")
        for kinds in (SPARSE, FORMATS):
            used = [name for name in names if name in kinds]
            if len(used) > 1:
                raise ValueError(f"cannot combine {' with '.join(used)}; choose one of them")
        if formats := [name for name in names[:-1] if name in FORMATS]:
            raise ValueError(f"{formats[0]} must be the last stage, got {names[-1]} after it")
        return chain

    @field_validator("compress_down")
    @classmethod
    def _check_dense(cls, chain: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        """Check that broadcasts are not compressed by sparse stages."""
        for stage in chain:
            if stage.kind in SPARSE:
                raise ValueError(
                    f"expected quantize, half or top_classes, got {stage.kind}, which is for "
                    "uploads only"
                )
        return chain
