"""Reports of nodes, which the server validates: settings, data reports and evaluations.

The structure, types and bounds are checked. The server cannot verify that scores are correct,
because it does not have the test rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    InstanceOf,
    JsonValue,
    ValidationError,
    create_model,
)
from torch import Tensor

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.data_free import Dense
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.describe import describe_error
from hetero_fl.core.metrics import MAX_METRIC_VALUE, SMALLER_IS_BETTER, metric_names
from hetero_fl.core.model_spec import Tensors, freeze_lists
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.saved_model import SavedModel, read_model_file, split_local_tensors
from hetero_fl.core.task import Task
from hetero_fl.data.client_rows import RemoteDataInfo
from hetero_fl.data.preprocessing import Preprocess
from hetero_fl.deployment.messages import Body, Fields, RequestRefusedError, read
from hetero_fl.federation.client_runtime import EVALUATION_SETS, FORECAST_ROWS, ClientEvaluation
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.utils.code_permission import find_references, refused_code
from hetero_fl.utils.errors import UserError, is_printable, one_line
from hetero_fl.utils.serialization import DTYPES, CodecError, as_bytes, as_tensor, check_header

MAX_ROWS = 2**31
# Maximum side length in pixels to which a site may resize images, unless the server's configuration
# contains a larger value.
MAX_PIXELS = 1024
# Maximum number of characters of a name.
MAX_NAME_CHARS = 128
MAX_BASELINES = 32
# Number of bins of a calibration curve.
CALIBRATION_BINS = 15
MODEL_DTYPES = {torch.from_numpy(np.empty(0, dtype)).dtype for dtype in DTYPES.values()}
# Metrics without a lower bound.
UNBOUNDED = ("r2",)
# Times are 64-bit integers in any unit.
MAX_TIME = 2**63
MAX_SHARE = 1.0 + 1e-9


def _check_name(name: str) -> str:
    if not is_printable(name):
        raise ValueError("expected a printable name")
    return name


Count = Annotated[int, Field(ge=0, le=MAX_ROWS)]
Number = Annotated[float, Field(ge=-MAX_METRIC_VALUE, le=MAX_METRIC_VALUE)]
Share = Annotated[float, Field(ge=0, le=MAX_SHARE)]
Time = Annotated[float, Field(ge=-MAX_TIME, le=MAX_TIME)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS), AfterValidator(_check_name)]


class SiteSettings(Body):
    """Client settings that a site defines. `ClientSettings` validates the values."""

    model: JsonValue = None
    preprocess: JsonValue = None
    augment: JsonValue = None
    shares: JsonValue = None


class SettingsReport(Body):
    """Body of `here`."""

    settings: SiteSettings


class RowCounts(Body):
    """Numbers of rows of a client."""

    train: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    validation: Count
    test: Count


class DataReport(Body):
    """Data report of a client.

    Attributes:
        rows: Numbers of rows.
        hash: Keyed hash of the rows.
        labels: Number of training rows of each class, if the site discloses them.
        mean: Mean of the client's own normalization, if it has one.
        std: Standard deviation of the client's own normalization, if it has one.
    """

    rows: RowCounts
    hash: Name
    labels: list[Annotated[float, Field(ge=0, le=MAX_ROWS)]] | None
    mean: Number | list[Number] | None
    std: Number | list[Number] | None


def read_settings(tree: Any, names: Collection[str], largest: int = MAX_PIXELS) -> dict[str, Any]:
    """Validate the client settings that a node reports.

    Args:
        tree: Decoded report of the node.
        names: References to code (`python:module:Name`) in the server's configuration. A node may
            not reference other code.
        largest: Maximum side length in pixels to which a node may resize images.

    Returns:
        The settings.

    Raises:
        RequestRefusedError: If the settings are invalid or out of bounds.
    """
    report = read(SettingsReport, tree, "report of the site")
    found = report.settings.model_dump(exclude_unset=True)
    for name, key in refused_code(find_references(found), names).items():
        raise RequestRefusedError(
            f"settings: {key}: expected code that the server's configuration names, "
            f"got {name[:MAX_NAME_CHARS]}"
        )
    try:
        resize = ClientSettings.model_validate(found).preprocess.resize
    except ValidationError as error:
        raise RequestRefusedError(
            f"settings: {describe_error(error, found, ClientSettings)}"
        ) from None
    if resize is not None and resize > largest:
        got = one_line(resize, MAX_NAME_CHARS)
        raise RequestRefusedError(f"settings: preprocess.resize: must be <= {largest}, got {got}")
    return found


def data_info_tree(info: RemoteDataInfo) -> dict[str, Any]:
    """Return a client's data report as plain values."""
    return {
        "rows": dict(info.counts),
        "hash": info.content_hash,
        "labels": info.labels,
        "mean": None if info.view is None else info.view.mean,
        "std": None if info.view is None else info.view.std,
    }


def read_data_info(tree: Any, outputs: int, own: Preprocess | None = None) -> RemoteDataInfo:
    """Validate the data report of a client.

    Args:
        tree: Decoded report of the node.
        outputs: Number of outputs of the task.
        own: Preprocessing of the client without the mean and the standard deviation, which only
            the node can compute. If None, the report must not contain these.

    Returns:
        The validated data report.

    Raises:
        RequestRefusedError: If the report is invalid.
    """
    report = read(DataReport, tree, "data report")
    labels = report.labels
    if labels is not None and len(labels) != outputs:
        raise RequestRefusedError(
            f"data report: labels: expected {outputs} counts, got {len(labels)}"
        )
    for name, value in (("mean", report.mean), ("std", report.std)):
        if (value is None) != (own is None):
            problem = "missing" if value is None else "expected only with preprocess.normalize=own"
            raise RequestRefusedError(f"data report: {name}: {problem}")
    view = None
    if own is not None:
        view = replace(own, mean=freeze_lists(report.mean), std=freeze_lists(report.std))
    counts = None if labels is None else tuple(labels)
    return RemoteDataInfo(report.rows.model_dump(), report.hash, view, counts)


def evaluation_tree(evaluation: ClientEvaluation) -> dict[str, Any]:
    """Return an evaluation as plain values.

    The model is a tensor of bytes, or None if the evaluation contains no model.
    """
    tree = {field.name: getattr(evaluation, field.name) for field in fields(evaluation)}
    return {**tree, "model": as_tensor(evaluation.model) if evaluation.model else None}


def read_evaluation(
    tree: Any, client: str, federation: FederationSpec, method: Algorithm
) -> ClientEvaluation:
    """Validate the evaluation of a client's model.

    Args:
        tree: Decoded report of the node.
        client: Name of the client.
        federation: Federation of the run.
        method: Method of the run.

    Returns:
        The validated evaluation.

    Raises:
        RequestRefusedError: If the evaluation is invalid.
    """
    found = read(_evaluation_model(federation.task), tree, "evaluation")
    values = found.model_dump(exclude_unset=True)
    try:
        forecast = _read_forecast(values["forecast"], federation)
        model = b""
        if values["model"] is not None:
            client_info = federation.client_infos[client]
            model = _read_model(as_bytes(values["model"]), federation, client_info, method)
    except RequestRefusedError as error:
        raise RequestRefusedError(f"evaluation: {error}") from None
    return ClientEvaluation(**{**values, "forecast": forecast, "model": model})


@lru_cache(maxsize=8)
def _evaluation_model(task: Task) -> type[BaseModel]:
    """Return the type of the evaluations of models for a task."""
    names = metric_names(task)
    scores = _mapping("Scores", {name: _score(name) | None for name in names})
    outputs = task.outputs
    shape = (outputs, outputs) if task.kind == "multiclass" else (outputs, 2, 2)
    curve = _table(Share | None, CALIBRATION_BINS)
    count = _table(Count, CALIBRATION_BINS)
    calibration = _mapping(
        "Calibration",
        {"ece": Share | None, "confidence": curve, "accuracy": curve, "count": count},
    )
    return _mapping(
        "Evaluation",
        {
            "scores": _by_set(scores),
            "confusion": _by_set(_table(Count, *shape)),
            "calibration": _by_set(calibration),
            "baselines": _by_set(_by_name(scores)),
            "forecast": dict[str, JsonValue],
            # Attacks are only simulated.
            "triggered": None,
            "model": InstanceOf[Tensor] | None,
        },
    )


def _mapping(name: str, types: Mapping[str, Any]) -> type[BaseModel]:
    """Return the type of mappings with these keys."""
    required: dict[str, Any] = {key: (value, ...) for key, value in types.items()}
    return create_model(name, __base__=Body, **required)


def _by_set(value: Any) -> type[BaseModel]:
    """Return the type of mappings whose keys are names of evaluations."""
    optional: dict[str, Any] = dict.fromkeys(EVALUATION_SETS, (value, None))
    return create_model("Evaluations", __base__=Body, **optional)


def _by_name(value: Any) -> Any:
    """Return the type of mappings whose keys are names of baselines."""
    return Annotated[dict[Name, value], Field(max_length=MAX_BASELINES)]


def _table(value: Any, *shape: int) -> Any:
    """Return the type of nested lists of a shape."""
    for size in reversed(shape):
        value = Annotated[list[value], Field(min_length=size, max_length=size)]
    return value


def _score(name: str) -> Any:
    """Return the type of the values of a metric."""
    least = -MAX_METRIC_VALUE if name in UNBOUNDED else 0.0
    most = MAX_METRIC_VALUE if name in SMALLER_IS_BETTER else MAX_SHARE
    return Annotated[float, Field(ge=least, le=most)]


def _read_forecast(found: Mapping[str, Any], federation: FederationSpec) -> dict[str, Any]:
    task = federation.task
    if not found:
        return {}
    is_temporal = [
        share.examples.time is not None
        for share in federation.data.public_sets.values()
        if len(share.rows)
    ]
    if (
        task.kind != "regression"
        or federation.privacy is not None
        or (is_temporal and not any(is_temporal))
    ):
        raise RequestRefusedError("forecast: expected only for time series without privacy")
    times = found.get("time")
    rows = len(times) if isinstance(times, list) else 0
    if not 0 < rows <= FORECAST_ROWS:
        raise RequestRefusedError(f"forecast: time: expected 1 to {FORECAST_ROWS} rows, got {rows}")
    columns = _table(Number, task.outputs, rows)
    types = {
        "time": _table(Time, rows),
        "truth": columns,
        "predicted": columns,
        "baselines": _by_name(columns),
    }
    return read(_mapping("Forecast", types), found, "forecast").model_dump()


def _read_model(
    data: bytes, federation: FederationSpec, client_info: ClientInfo, method: Algorithm
) -> bytes:
    """Return a model file with the received tensors and the server's metadata.

    The received metadata are only compared with those of the models that this client may have. They
    are not used to build a model or to import code.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(data)
        try:
            check_header(data)
            about, tensors = read_model_file(path)
        except (CodecError, UserError):
            raise RequestRefusedError("model: expected a safetensors file with a header") from None
    saved = _expected_model(about, tensors, federation, client_info, method)
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.tensors.items()}
    local_shapes = {name: tuple(t.shape) for name, t in saved.local_tensors.items()}
    if (
        not shapes.items() <= saved.arch.shapes.items()
        or not local_shapes.items() <= shapes.items()
    ):
        raise RequestRefusedError(
            f"model: names or shapes of the tensors do not match the architecture {saved.arch.name}"
        )
    if missing := saved.arch.parameter_names - shapes.keys():
        raise RequestRefusedError(f"model: tensor '{min(missing)}' is missing")
    if dtypes := [t.dtype for t in tensors.values() if t.dtype not in MODEL_DTYPES]:
        raise RequestRefusedError(f"model: tensors of dtype {dtypes[0]} are not supported")
    if not all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point()):
        raise RequestRefusedError("model: values must be finite")
    return saved.encode()


def _expected_model(
    about: Mapping[str, Any],
    tensors: Tensors,
    federation: FederationSpec,
    client_info: ClientInfo,
    method: Algorithm,
) -> SavedModel:
    """Return the received tensors with the server's metadata for the model of the client.

    Args:
        about: The received metadata.
        tensors: The received tensors.
        federation: Federation of the run.
        client_info: Client that sent the model.
        method: Method of the run.

    Raises:
        RequestRefusedError: If the client cannot have a model with the received metadata.
    """
    client_infos = [client_info]
    if isinstance(method, Dense) and method.student is not None:
        # After the student is trained, every client uses it.
        client_infos.append(federation.client_infos[method.student])
    views = [(each.arch, each.preprocess) for each in client_infos]
    views += [(arch, client_info.preprocess) for arch in client_info.models.values()]
    prior = _table(Number, federation.task.outputs) | None
    priors = create_model(
        "Priors", __base__=Fields, log_prior=(prior, ...), correction=(prior, None)
    )
    known = {name: freeze_lists(v) for name, v in read(priors, about, "model").model_dump().items()}
    own, local_tensors = split_local_tensors(tensors)
    layout = federation.data.layout
    for arch, view in views:
        saved = SavedModel(
            own,
            arch,
            asdict(view),
            federation.task,
            columns=layout.columns,
            categories=layout.categories,
            local_tensors=local_tensors,
            **known,
        )
        if saved.metadata() == about:
            return saved
    raise RequestRefusedError("model: the metadata differ from those in the configuration")
