"""The clients' side of the configuration: what each one runs, how it trains, how it sees its data, what it shares."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hetero_fl.config.base import (
    ConfigSection,
    OptimizerConfig,
    OptimizerLayer,
    UniqueNames,
    choice_type,
)
from hetero_fl.config.data import SourceConfig
from hetero_fl.config.simulation import DeviceConfig
from hetero_fl.utils.code_permission import CONTEXT, OWN


class ModelConfig(ConfigSection):
    """A model of the zoo: its name, a common feature width if wished, and the model's own options beside them."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        description="a name of model_zoo.list_models(), or timm:NAME, torchvision:NAME, python:module:Class"
    )
    feature_dim: PositiveInt | None = Field(
        None, description="width of the features; none: the model's own"
    )
    pretrained: bool = Field(False, description="published weights (timm: and torchvision: models)")

    @model_validator(mode="after")
    def _check_options(self, info: ValidationInfo) -> ModelConfig:
        """Check the options; those of a user's own model only in a context that permits to import it."""
        from model_zoo import ModelError, check_options

        if self.name.startswith(OWN) and not (info.context or {}).get(CONTEXT):
            return self
        try:
            check_options(self.name, self.options)
        except ModelError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The model's own options."""
        return dict(self.model_extra or {})


def expand_model_name(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _expand_models(value: object) -> object:
    """One model, several in turn, or a named group of the zoo (`group:resnet_family`) become a list."""
    if isinstance(value, str) and value.startswith("group:"):
        from model_zoo import ModelError, group_models

        try:
            return [{"name": name} for name in group_models(value.removeprefix("group:"))]
        except ModelError as error:
            raise ValueError(str(error)) from None
    if isinstance(value, list):
        return [expand_model_name(v) for v in value]
    return [expand_model_name(value)] if isinstance(value, str | dict) else value


Models = Annotated[list[ModelConfig], Field(min_length=1), BeforeValidator(_expand_models)]


class Normalize(ConfigSection):
    """Pixel values p in 0..1 become (p − mean) / std."""

    mean: float | Annotated[list[float], Field(min_length=1)] = Field(
        0.5,
        description="subtracted; a list: of each channel of an image, each column of a table or series",
    )
    std: PositiveFloat | Annotated[list[PositiveFloat], Field(min_length=1)] = Field(
        0.25, description="divided by; a list: as `mean`"
    )


class PreprocessConfig(ConfigSection):
    """How one participant sees every example, its own and the public ones: its columns, resize, channels, normalise; then
    what is missing."""

    columns: UniqueNames | None = Field(
        None,
        min_length=1,
        description="names of the columns (tables, series) or blocks (images and genes, say) that it has; none: all",
    )
    resize: PositiveInt | None = Field(None, description="side in pixels (bilinear)")
    channels: Literal[1, 3] | None = Field(None, description="1: grey, 3: RGB")
    normalize: Normalize | Literal["own"] | None = Field(
        None, description="fixed mean and std, or `own`: those of the participant's training rows"
    )
    missing: Literal["indicate"] | None = Field(
        None,
        description="indicate: a missing value (NaN) becomes 0 after normalising, and an indicator follows (1: it was missing), "
        "one a column, or one a block where there are blocks; none: missing values are refused",
    )


class AugmentConfig(ConfigSection):
    """Random changes of training images, drawn anew each step; never in evaluation."""

    crop: int = Field(0, ge=0, description="pad by so many pixels and crop back at random")
    flip: bool = Field(False, description="left and right at random")
    rotate: float = Field(0.0, ge=0, le=180, description="up to so many degrees either way")


class ScannerConfig(ConfigSection):
    """A site's own imaging device: what it does to the images made there (feature shift)."""

    contrast: PositiveFloat = Field(1.0, description="factor around the middle grey")
    brightness: float = Field(0.0, ge=-1, le=1, description="added, of the whole range")
    blur: float = Field(0.0, ge=0, description="Gaussian blur, sigma in pixels")
    noise: float = Field(0.0, ge=0, description="Gaussian noise, sigma of the whole range")
    resolution: float = Field(
        1.0, gt=0, le=1, description="scaled down by this factor and up again"
    )


class ClientSettings(ConfigSection):
    """Everything that may differ from client to client."""

    model: Models = Field(
        [ModelConfig(name="cnn_bn_small")], description="a model, or a list to take in turn"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: PositiveInt = Field(1, description="local epochs a round")
    steps: PositiveInt | None = Field(None, description="local steps a round in place of epochs")
    batch_size: PositiveInt = Field(32, description="examples a step, of private training")
    class_weights: Literal["balanced"] | list[float] | None = Field(
        None,
        description="of the cross-entropy: one number a class; balanced: the inverse of its frequency",
    )
    logit_adjustment: bool | None = Field(
        None,
        description="train on z + log π with the client's own label frequencies π, and predict its own rows with z + log π; "
        "none: as the method has it",
    )
    objective: str | None = Field(
        None,
        pattern="^python:",
        description="a local objective of your own (python:module:Class) in place of the supervised loss",
    )
    preprocess: PreprocessConfig = PreprocessConfig()
    augment: AugmentConfig = AugmentConfig()
    scanner: ScannerConfig = ScannerConfig()
    shares: list[
        choice_type("parameters", "backbone", "predictions", "statistics", "features", suffix=".")  # type: ignore[valid-type]
    ] = Field(
        ["parameters", "predictions", "statistics", "features"],
        description="what may leave: all parameters, the backbone only, or the tensors whose names begin so "
        "(`backbone.image.`; ends in a dot); proxy predictions, class statistics; features, prediction and label of each "
        "private row (FedGKT)",
    )
    share_every: PositiveInt = Field(1, description="uploads in every n-th round only")
    size: PositiveFloat = Field(1.0, description="how much data it gets, relative to the others")
    data: SourceConfig | None = Field(
        None, description="its own source in place of a part of the common one"
    )
    machine: DeviceConfig = DeviceConfig()

    @field_validator("shares")
    @classmethod
    def _check_extent(cls, value: list[str]) -> list[str]:
        extents = [share for share in ("parameters", "backbone") if share in value]
        parts = [share for share in value if share.endswith(".")]
        if extents and len(extents + parts) > 1:
            first, second, *_ = extents + parts
            raise ValueError(f"found both '{first}' and '{second}'; name the one that is meant")
        if len(set(value)) < len(value):
            raise ValueError(f"found {value}; each at most once")
        return value


class ClientGroup(ClientSettings):
    """Clients that are described together: so many, or this fraction of `clients.count`."""

    name: str = Field(
        pattern=r"^[A-Za-z][A-Za-z0-9_-]*$",
        description="ids are name_1, name_2 …, or the name alone for one",
    )
    count: PositiveInt | None = Field(
        None, description="clients in the group; none: one, or what `clients.count` leaves"
    )
    fraction: float | None = Field(
        None, gt=0, le=1, description="of `clients.count`, in place of `count`"
    )
    optimizer: OptimizerLayer = OptimizerLayer()

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if value.lower() == "server":  # in any case: file systems may not tell them apart
            raise ValueError(
                f"found '{value}', which is what the server is called; choose another name"
            )
        return value

    @model_validator(mode="after")
    def _check_size(self) -> ClientGroup:
        if self.count and self.fraction:
            raise ValueError("found count and fraction; give one of them")
        return self


class ClientOverride(ClientSettings):
    """Settings of the clients whose id matches a pattern (`clinic_*`), over those of their group."""

    match: str = Field(description="shell-style pattern of ids")
    optimizer: OptimizerLayer = OptimizerLayer()


class ClientsConfig(ConfigSection):
    """Who takes part: defaults, then groups, then overrides by id; the later wins, key by key."""

    count: PositiveInt | None = Field(
        None, description="number of clients; none: the sum of the groups"
    )
    per_round: PositiveInt | None = Field(None, description="clients sampled each round; none: all")
    defaults: ClientSettings = ClientSettings()
    groups: list[ClientGroup] = []
    overrides: list[ClientOverride] = []
    common: list[str] = Field(
        [], description="prefixes of tensors that are averaged across architectures too"
    )
