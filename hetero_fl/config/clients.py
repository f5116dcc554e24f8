"""Settings of the clients: model, local training, preprocessing and uploads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
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
    Reference,
    UniqueNames,
    check_folder_name,
    choice_type,
)
from hetero_fl.config.data import SourceConfig
from hetero_fl.config.simulation import DeviceConfig
from hetero_fl.utils.code_permission import ALLOW_CODE, CODE_PREFIX
from hetero_fl.utils.objects import resolve_object


class ModelConfig(ConfigSection):
    """A model by name, with an optional feature width and options of the model."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        description="one of `model_zoo.list_models()`, `timm:NAME`, `torchvision:NAME` or "
        "`python:module:Class`"
    )
    feature_dim: PositiveInt | None = Field(
        None, description="width of the features; `null`: the model's default"
    )
    pretrained: bool = Field(
        False, description="load published weights (`timm:` and `torchvision:` models)"
    )

    @model_validator(mode="after")
    def _check_options(self, info: ValidationInfo) -> ModelConfig:
        """Check the options of the model.

        The options of a user-defined model are checked only if importing code is permitted.
        """
        from model_zoo import ModelError, check_options

        if self.name.startswith(CODE_PREFIX) and not (info.context or {}).get(ALLOW_CODE):
            return self
        try:
            check_options(resolve_object(self.name, "model"), self.options)
        except ModelError as error:
            raise ValueError(str(error).removeprefix("model ")) from None
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The options that are passed to the model, keyed by name."""
        return dict(self.model_extra or {})


def expand_model_name(value: object) -> object:
    """Convert a string to `{"name": value}`, and return other values unchanged."""
    return {"name": value} if isinstance(value, str) else value


def _expand_models(value: object) -> object:
    """Convert a model, a list, or a group such as `group:resnet_family` to a list of models."""
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
    """Normalization of inputs x to (x − mean) / std. Pixel values range from 0 to 1."""

    mean: float | Annotated[list[float], Field(min_length=1)] = Field(
        0.5,
        description="mean, one number or a list with one per image channel or table column",
    )
    std: PositiveFloat | Annotated[list[PositiveFloat], Field(min_length=1)] = Field(
        0.25, description="standard deviation, one number or a list as for `mean`"
    )


class PreprocessConfig(ConfigSection):
    """Preprocessing of all inputs of a participant, private and public.

    The steps are applied in this order: select columns, resize, convert channels, normalize, handle
    missing values, and apply `transform`.

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.Client("clinic", "cnn", preprocess=hfl.Preprocess(resize=32, channels=3))
        Client('clinic', model=cnn, preprocess={'resize': 32, 'channels': 3})
    """

    columns: UniqueNames | None = Field(
        None,
        min_length=1,
        description="available columns (tables, time series) or blocks (for example images and "
        "genes); `null`: all",
    )
    resize: PositiveInt | None = Field(
        None, description="side length of images in pixels (bilinear); `null`: the original size"
    )
    channels: Literal[1, 3] | None = Field(
        None, description="image channels: 1 is grayscale, 3 is RGB; `null`: as in the data"
    )
    normalize: Normalize | Literal["own"] | None = Field(
        None,
        description="fixed mean and std, or `own` for those of the participant's training rows; "
        "`null`: no normalization",
    )
    missing: Literal["indicate"] | None = Field(
        None,
        description="`indicate`: replace missing values (NaN) by 0 after normalization and append "
        "an indicator (1: missing) per column, or per block of data with blocks; `null`: missing "
        "values are an error",
    )
    transform: Reference | None = Field(
        None,
        description="function of a batch of inputs, applied last, that returns a batch of the same "
        "shape; `null`: none",
    )


class AugmentConfig(ConfigSection):
    """Random augmentation of training images, sampled in each step.

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.Client("clinic", "cnn", augment=hfl.Augment(crop=2, flip=True))
        Client('clinic', model=cnn, augment={'crop': 2, 'flip': True})
    """

    crop: int = Field(
        0, ge=0, description="padding in pixels before a random crop to the original size; 0: off"
    )
    flip: bool = Field(False, description="flip horizontally with probability 0.5")
    rotate: float = Field(
        0.0, ge=0, le=180, description="maximum rotation in degrees, in both directions"
    )
    transform: Reference | None = Field(
        None,
        description="function of a batch of training images, applied last, that returns images of "
        "the same shape, such as a transform of `torchvision.transforms.v2`; it may draw from "
        "PyTorch's global random number generator; `null`: none",
    )


NO_AUGMENT = AugmentConfig()


class ScannerConfig(ConfigSection):
    """Simulated imaging device that changes all images of a client (feature shift).

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.Client("clinic", "cnn", scanner=hfl.Scanner(contrast=0.5, blur=1))
        Client('clinic', model=cnn, scanner={'contrast': 0.5, 'blur': 1.0})
    """

    contrast: PositiveFloat = Field(1.0, description="contrast factor around middle gray")
    brightness: float = Field(
        0.0, ge=-1, le=1, description="offset added to pixel values in the range 0 to 1"
    )
    blur: float = Field(0.0, ge=0, description="σ of a Gaussian blur in pixels; 0: none")
    noise: float = Field(
        0.0, ge=0, description="σ of Gaussian noise on pixel values in the range 0 to 1"
    )
    resolution: float = Field(
        1.0, gt=0, le=1, description="factor by which images are scaled down and up again"
    )


REPLACED = {"epochs": "steps", "steps": "epochs"}
"""The client setting that each of these replaces, if a later layer sets it."""
Recalibration = Literal["proxy_predictions", "global_test", "local_test"]
Share = choice_type("parameters", "backbone", "predictions", "statistics", "features", suffix=".")


class ClientSettings(ConfigSection):
    """Settings that may differ between clients.

    Example:
        >>> import hetero_fl as hfl
        >>> defaults = hfl.ClientSettings(epochs=2, optimizer=hfl.SGD(lr=0.05, momentum=0.9))
        >>> defaults.batch_size, defaults.optimizer.lr
        (32, 0.05)
    """

    model: Models = Field(
        [ModelConfig(name="cnn_bn_small")],
        description="model, or a list of models that the clients use in turn",
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: PositiveInt = Field(1, description="local epochs per round")
    steps: PositiveInt | None = Field(
        None, description="local steps per round, instead of `epochs`; `null`: see `epochs`"
    )
    batch_size: PositiveInt = Field(32, description="examples per step of local training")
    class_weights: Literal["balanced"] | list[NonNegativeFloat] | None = Field(
        None,
        description="weights of the classes in the cross-entropy: one number per class, or "
        "`balanced` for inverse class frequencies; `null`: equal weights",
    )
    logit_adjustment: bool | None = Field(
        None,
        description="train on z + log π, where π are the client's label frequencies; `null`: the "
        "method's default",
    )
    local_prior: bool | None = Field(
        None,
        description="predict the client's own rows with z + log π; `null`: as `logit_adjustment`",
    )
    prior_correction: bool | None = Field(
        None,
        description="predict all other rows (proxy set, global test) with z − log π, for models "
        "trained without logit adjustment. It applies to models that the client itself trained "
        "last, not to averaged or distilled ones; of `feddf`, `hybrid`, `ds_fl` and `kt_pfl` only "
        "to the predictions on the proxy set. `null`: no",
    )
    recalibrate: list[Recalibration] | None = Field(
        None,
        description="predictions that use BatchNorm statistics recomputed on the proxy set: "
        "`proxy_predictions`, for uploads; `global_test`; `local_test`, on equal numbers of own "
        "and proxy rows. Without a proxy set or BatchNorm, it has no effect. `null`: the method's "
        "default",
    )
    fine_tune_epochs: NonNegativeInt | None = Field(
        None,
        description="epochs of training on the client's own rows before evaluation, with the "
        "supervised loss; `null`: the method's default",
    )
    fine_tune_before: Literal["all_tests", "local_tests"] | None = Field(
        None,
        description="tests before which the model is trained for `fine_tune_epochs`: `all_tests`, "
        "or `local_tests`, so that the global test evaluates the model as it was received; `null`: "
        "`all_tests`",
    )
    objective: Reference | None = Field(
        None,
        description="user-defined local loss: a function of logits and targets that returns the "
        "loss of a batch or of each example, or a subclass of `Objective`; `null`: the supervised "
        "loss of the task",
    )
    preprocess: PreprocessConfig = PreprocessConfig()
    augment: AugmentConfig = NO_AUGMENT
    scanner: ScannerConfig = ScannerConfig()
    shares: list[Share] = Field(  # type: ignore[valid-type]
        ["parameters", "predictions", "statistics", "features"],
        description="what the client may upload; `parameters`: all parameters; `backbone`: only "
        "the backbone; a prefix of tensor names that ends in a dot, such as `backbone.image.`; "
        "`predictions`: predictions on the proxy set; `statistics`: class statistics; `features`: "
        "features, prediction and label of each private row (FedGKT)",
    )
    share_every: PositiveInt = Field(1, description="the client uploads in every n-th round")
    size: PositiveFloat = Field(
        1.0, description="amount of data relative to the other clients (see `data.partition`)"
    )
    data: SourceConfig | None = Field(
        None, description="the client's own data source; `null`: a part of the common source"
    )
    machine: DeviceConfig = DeviceConfig()

    @model_validator(mode="after")
    def _check_amount(self) -> ClientSettings:
        """Check that not both `epochs` and `steps` are set.

        Resolved settings contain the default of `epochs`, which is accepted.
        """
        if self.steps is not None and self.epochs != type(self).model_fields["epochs"].default:
            raise ValueError(
                f"epochs cannot be combined with steps, got epochs={self.epochs} and "
                f"steps={self.steps}; set one of them"
            )
        return self

    @field_validator("shares")
    @classmethod
    def _check_extent(cls, value: list[str]) -> list[str]:
        """Check that the entries do not contradict each other and that each entry occurs once."""
        extents = [share for share in ("parameters", "backbone") if share in value]
        parts = [share for share in value if share.endswith(".")]
        if extents and len(extents + parts) > 1:
            first, second, *_ = extents + parts
            raise ValueError(f"'{first}' cannot be combined with '{second}', got {value}")
        if len(set(value)) < len(value):
            raise ValueError(f"each entry may occur once, got {value}")
        return value


RESERVED_IDS = {
    "server": "the reserved id of the server",
    "mean": "the name of the mean over the clients",
}
"""What each id that is not allowed for a client stands for, in lower case."""


def check_client_id(client_id: str) -> None:
    """Raise ValueError if an id is reserved, in any case, as some file systems ignore case."""
    if (use := RESERVED_IDS.get(client_id.lower())) is not None:
        raise ValueError(f"must differ from {use}, got '{client_id}'; choose another name")
    check_folder_name(client_id)


class ClientGroup(ClientSettings):
    """A group of clients with the same settings."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$",
        max_length=100,
        description="prefix of the client ids `name_1`, `name_2`, …; the id of a single client",
    )
    count: PositiveInt | None = Field(
        None,
        description="number of clients; `null`: 1, or with `clients.count` the remaining clients",
    )
    fraction: float | None = Field(
        None, gt=0, le=1, description="fraction of `clients.count`, instead of `count`"
    )
    optimizer: OptimizerLayer = OptimizerLayer()

    @model_validator(mode="after")
    def _check_size(self) -> ClientGroup:
        """Check that `count` and `fraction` are not combined."""
        if self.count and self.fraction:
            raise ValueError("count cannot be combined with fraction; set one of them")
        return self


class ClientOverride(ClientSettings):
    """Settings of the clients whose id matches a pattern.

    These settings take precedence over the settings of the group.
    """

    match: str = Field(description="shell-style pattern of client ids, such as `clinic_*`")
    optimizer: OptimizerLayer = OptimizerLayer()


class ClientsConfig(ConfigSection):
    """Clients and their settings.

    For each key, groups take precedence over defaults, and overrides over groups.
    """

    count: PositiveInt | None = Field(
        None, description="number of clients; `null`: the sum over the groups"
    )
    per_round: PositiveInt | None = Field(
        None, description="number of clients sampled in each round; `null`: all"
    )
    defaults: ClientSettings = ClientSettings()
    groups: list[ClientGroup] = []
    overrides: list[ClientOverride] = []
    common: list[str] = Field(
        [],
        description="prefixes of tensor names that are averaged across models of different "
        "architectures, too",
    )
