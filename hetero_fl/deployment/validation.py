"""Validation of the reports of nodes: settings, data reports and evaluations.

The structure, types and bounds are checked. The server cannot verify that scores are correct,
because it does not have the test rows.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.data_free import Dense
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.errors import describe_error
from hetero_fl.core.metrics import MAX_METRIC_VALUE, SMALLER_IS_BETTER, Scores, metric_names
from hetero_fl.core.model_spec import Tensors, freeze_lists
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.saved_model import SavedModel, read_model_file, split_local_tensors
from hetero_fl.core.task import Task
from hetero_fl.data.client_rows import RemoteDataInfo
from hetero_fl.data.preprocessing import Preprocess
from hetero_fl.deployment.messages import MALFORMED_ERRORS, RequestRefusedError
from hetero_fl.federation.client_runtime import EVALUATION_SETS, FORECAST_ROWS, ClientEvaluation
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.utils.code_permission import CodePermission, find_references
from hetero_fl.utils.errors import UserError, is_printable, one_line
from hetero_fl.utils.serialization import DTYPES, CodecError, as_bytes, check_header

# Client settings that a site may define.
SITE_SETTINGS = ("model", "preprocess", "augment", "shares")
MAX_ROWS = 2**31
# Maximum side length in pixels to which a site may resize images, unless the server's configuration
# contains a larger value.
MAX_PIXELS = 1024
# Maximum number of characters of a name.
MAX_NAME_CHARS = 128
MAX_NAMES = 32
# Number of bins of a calibration curve.
CALIBRATION_BINS = 15
MODEL_DTYPES = {torch.from_numpy(np.empty(0, dtype)).dtype for dtype in DTYPES.values()}
# Metrics without a lower bound.
UNBOUNDED = ("r2",)
# Times are 64-bit integers in any unit.
MAX_TIME = 2**63
EVALUATION_FIELDS = {
    "scores",
    "confusion",
    "calibration",
    "baselines",
    "forecast",
    "triggered",
    "model",
}


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
    found = tree.get("settings") if isinstance(tree, dict) else None
    with _prefix_errors("settings"):
        _check_plain(found)
    if not isinstance(found, dict):
        raise RequestRefusedError(f"settings: expected a mapping, got {type(found).__name__}")
    if unknown := sorted(set(found) - set(SITE_SETTINGS)):
        line = f"settings: a site can set {', '.join(SITE_SETTINGS)}, got {', '.join(unknown)}"
        raise RequestRefusedError(line[:200])
    for name, key in CodePermission(granted=names).find_refused(find_references(found), ""):
        raise RequestRefusedError(
            f"settings: {key}: expected code that the server's configuration names, "
            f"got {name[:MAX_NAME_CHARS]}"
        )
    try:
        resize = ClientSettings.model_validate(found).preprocess.resize
        if resize is not None and resize > largest:
            raise RequestRefusedError(
                f"settings: preprocess.resize: must be <= {largest}, "
                f"got {one_line(resize, MAX_NAME_CHARS)}"
            )
    except ValidationError as error:
        raise RequestRefusedError(
            f"settings: {describe_error(error, found, ClientSettings)}"
        ) from None
    except MALFORMED_ERRORS as error:
        raise RequestRefusedError(
            f"settings: cannot be read ({type(error).__name__}: {error})"
        ) from None
    return found


def read_state_name(name: str) -> str:
    """Validate the name of a private state, which is a SHA-256 digest or empty.

    Returns:
        The unchanged name.

    Raises:
        RequestRefusedError: If the name is invalid.
    """
    if name and not (len(name) == 64 and set(name) <= set("0123456789abcdef")):
        raise RequestRefusedError(
            f"state: expected a SHA-256 digest, got {name[:MAX_NAME_CHARS]!r}"
        )
    return name


def read_data_info(tree: Any, outputs: int, own: Preprocess | None = None) -> RemoteDataInfo:
    """Validate the data report of a client.

    Args:
        tree: Decoded report of the node.
        outputs: Number of outputs of the task.
        own: Preprocessing of the client without the mean and the standard deviation, which only
            the node can compute. If None, the report must not contain any preprocessing.

    Returns:
        The validated data report.

    Raises:
        RequestRefusedError: If the report is invalid.
    """
    try:
        _check_plain(tree)
        rows: dict[str, int] = {}
        for name in ("train", "validation", "test"):
            with _prefix_errors(f"rows.{name}"):
                rows[name] = _read_integer(tree["rows"][name], MAX_ROWS)
        if not rows["train"]:
            raise RequestRefusedError("rows.train: must be > 0, got 0")
        with _prefix_errors("labels"):
            labels = (
                None
                if tree["labels"] is None
                else tuple(float(_read_number(n, 0.0, MAX_ROWS)) for n in tree["labels"])
            )
        if labels is not None and len(labels) != outputs:
            raise RequestRefusedError(f"labels: expected {outputs} counts, got {len(labels)}")
        view = (
            None
            if tree["view"] is None
            else Preprocess(**{k: freeze_lists(v) for k, v in tree["view"].items()})
        )
        if (view is None) != (own is None):
            problem = "missing" if view is None else "expected only with preprocess.normalize=own"
            raise RequestRefusedError(f"view: {problem}")
        with _prefix_errors("view"):
            for number in (view.mean, view.std) if view is not None else ():
                for each in number if isinstance(number, tuple) else (number,):
                    _read_number(0.0 if each is None else each, -MAX_METRIC_VALUE)
        if view is not None and replace(view, mean=None, std=None) != own:
            raise RequestRefusedError("view: differs from preprocess in the configuration")
        with _prefix_errors("hash"):
            return RemoteDataInfo(rows, _read_name(tree["hash"]), view, labels)
    except RequestRefusedError as error:
        raise RequestRefusedError(f"data report: {error}") from None
    except MALFORMED_ERRORS as error:
        raise RequestRefusedError(
            f"data report: cannot be read ({type(error).__name__}: {error})"
        ) from None


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
    client_info = federation.client_infos[client]
    try:
        if not isinstance(tree, dict) or set(tree) != EVALUATION_FIELDS:
            what = ", ".join(sorted(tree)) if isinstance(tree, dict) else type(tree).__name__
            expected = ", ".join(sorted(EVALUATION_FIELDS))
            raise RequestRefusedError(f"expected {expected}, got {what[:120]}")
        _check_plain({**tree, "model": None})
        return _read_evaluation(tree, federation, client_info, method)
    except (RequestRefusedError, UserError) as error:
        raise RequestRefusedError(f"evaluation: {error}") from None
    except MALFORMED_ERRORS as error:
        raise RequestRefusedError(
            f"evaluation: cannot be read ({type(error).__name__}: {error})"
        ) from None


def _read_evaluation(
    tree: Mapping[str, Any], federation: FederationSpec, client_info: ClientInfo, method: Algorithm
) -> ClientEvaluation:
    task = federation.task
    if tree["triggered"] is not None:
        raise RequestRefusedError("triggered: expected None; attacks are only simulated")
    model = tree["model"]
    with _prefix_errors("scores"):
        scores = _read_by_name(tree["scores"], EVALUATION_SETS, lambda s: _read_scores(s, task))
    with _prefix_errors("confusion"):
        confusion = _read_by_name(
            tree["confusion"], EVALUATION_SETS, lambda c: _read_confusion(c, task)
        )
    with _prefix_errors("calibration"):
        calibration = _read_by_name(tree["calibration"], EVALUATION_SETS, _read_calibration)
    with _prefix_errors("baselines"):
        baselines = _read_by_name(
            tree["baselines"],
            EVALUATION_SETS,
            lambda each: _read_by_name(each, None, lambda s: _read_scores(s, task)),
        )
    with _prefix_errors("forecast"):
        forecast = _read_forecast(tree["forecast"], federation)
    with _prefix_errors("model"):
        saved = b"" if model is None else _read_model(model, federation, client_info, method)
    return ClientEvaluation(
        scores=scores,
        confusion=confusion,
        calibration=calibration,
        baselines=baselines,
        forecast=forecast,
        model=saved,
    )


def _read_scores(found: Any, task: Task) -> Scores:
    known = metric_names(task)

    def read_score(name: str, value: Any) -> float | None:
        least = -MAX_METRIC_VALUE if name in UNBOUNDED else 0.0
        most = MAX_METRIC_VALUE if name in SMALLER_IS_BETTER else 1.0 + 1e-9
        with _prefix_errors(name):
            return None if value is None else _read_number(value, least, most)

    return {name: read_score(name, value) for name, value in _check_names(found, known).items()}


def _read_confusion(found: Any, task: Task) -> list[Any]:
    outputs = task.outputs
    shape = (outputs, outputs) if task.kind == "multiclass" else (outputs, 2, 2)
    return _read_table(found, shape, lambda v: _read_integer(v, MAX_ROWS))


def _read_calibration(found: Any) -> dict[str, Any]:
    named = _check_names(found, ("ece", "confidence", "accuracy", "count"))

    def share(value: Any) -> float | None:
        return None if value is None else _read_number(value, 0.0, 1.0 + 1e-9)

    bins = {
        name: _read_table(named[name], (CALIBRATION_BINS,), share)
        for name in ("confidence", "accuracy")
    }
    return {
        "ece": share(named["ece"]),
        **bins,
        "count": _read_table(
            named["count"], (CALIBRATION_BINS,), lambda v: _read_integer(v, MAX_ROWS)
        ),
    }


def _read_forecast(found: Any, federation: FederationSpec) -> dict[str, Any]:
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
        raise RequestRefusedError("expected only for time series without privacy")
    named = _check_names(found, ("time", "truth", "predicted", "baselines"))
    rows = len(named["time"])
    if not 0 < rows <= FORECAST_ROWS:
        raise RequestRefusedError(f"time: expected 1 to {FORECAST_ROWS} rows, got {rows}")

    def columns(values: Any) -> list[Any]:
        return _read_table(
            values, (task.outputs, rows), lambda v: _read_number(v, -MAX_METRIC_VALUE)
        )

    return {
        "time": _read_table(named["time"], (rows,), lambda v: _read_number(v, -MAX_TIME, MAX_TIME)),
        "truth": columns(named["truth"]),
        "predicted": columns(named["predicted"]),
        "baselines": _read_by_name(named["baselines"], None, columns),
    }


def _read_model(
    found: Any, federation: FederationSpec, client_info: ClientInfo, method: Algorithm
) -> bytes:
    """Return a model file with the received tensors and the server's metadata.

    The received metadata are only compared with the models that this client may have. They are not
    used to build a model or to import code.
    """
    if not isinstance(found, Tensor):
        raise RequestRefusedError(f"expected a tensor of bytes, got {type(found).__name__}")
    data = as_bytes(found)
    try:
        check_header(data)
    except CodecError:
        raise RequestRefusedError("expected a safetensors file with a header") from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(data)
        try:
            about, tensors = read_model_file(path)
        except UserError:
            raise RequestRefusedError("expected a safetensors file with a header") from None
    saved = _expected_model(about, tensors, federation, client_info, method)
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.tensors.items()}
    local_shapes = {name: tuple(t.shape) for name, t in saved.local_tensors.items()}
    if any(saved.arch.shapes.get(name) != shape for name, shape in shapes.items()):
        raise RequestRefusedError(
            f"names or shapes of the tensors do not match the architecture {saved.arch.name}"
        )
    if any(shapes.get(name) != shape for name, shape in local_shapes.items()):
        raise RequestRefusedError(f"local tensors do not match the architecture {saved.arch.name}")
    if missing := saved.arch.parameter_names - shapes.keys():
        raise RequestRefusedError(f"tensor '{min(missing)}' is missing")
    if dtypes := [t.dtype for t in tensors.values() if t.dtype not in MODEL_DTYPES]:
        raise RequestRefusedError(f"tensors of dtype {dtypes[0]} are not supported")
    if not all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point()):
        raise RequestRefusedError("values must be finite")
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
    task = federation.task
    layout = federation.data.layout
    client_infos = [client_info]
    if isinstance(method, Dense) and method.student is not None:
        # After the student is trained, every client uses it.
        client_infos.append(federation.client_infos[method.student])
    views = {(each.arch, each.preprocess): None for each in client_infos}
    views |= {
        (arch, client_info.preprocess): None
        for slot, arch in client_info.models.items()
        if slot != "model"
    }
    prior, correction = (
        None
        if found is None
        else tuple(
            _read_table(found, (task.outputs,), lambda v: float(_read_number(v, -MAX_METRIC_VALUE)))
        )
        for found in (about["log_prior"], about.get("correction"))
    )
    own, local_tensors = split_local_tensors(tensors)
    candidates = [
        SavedModel(
            own,
            arch,
            asdict(view),
            task,
            prior,
            layout.columns,
            layout.categories,
            correction,
            local_tensors,
        )
        for arch, view in views
    ]
    named = about["architecture"]
    matching = [saved for saved in candidates if saved.metadata()["architecture"] == named]
    if not matching or candidates[0].metadata()["task"] != about["task"]:
        raise RequestRefusedError(
            f"architecture {one_line(named['name'], MAX_NAME_CHARS)} or its task differs from "
            "the client's in the configuration"
        )
    for saved in matching:
        if saved.metadata()["preprocess"] == about["preprocess"]:
            return saved
    raise RequestRefusedError("preprocessing differs from the client's in the configuration")


@contextmanager
def _prefix_errors(place: str) -> Iterator[None]:
    """Prefix the messages of errors with the place of a value."""
    try:
        yield
    except RequestRefusedError as error:
        raise RequestRefusedError(f"{place}: {error}") from None


def _check_plain(tree: Any) -> None:
    """Check that nested lists and dictionaries contain no tensors.

    Iterating over a large tensor would be slow.

    Raises:
        RequestRefusedError: If there is a tensor.
    """
    if isinstance(tree, Tensor):
        raise RequestRefusedError("expected plain values, got a tensor")
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            _check_plain(value)


def _check_names(found: Any, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(found, dict) or set(found) != set(known):
        what = ", ".join(map(str, found))[:120] if isinstance(found, dict) else type(found).__name__
        raise RequestRefusedError(f"expected {', '.join(known)}, got {what}")
    return found


def _read_by_name(
    found: Any, known: Mapping[str, Any] | None, each: Callable[[Any], Any]
) -> dict[str, Any]:
    if not isinstance(found, dict) or len(found) > MAX_NAMES:
        size = f"{len(found)} names" if isinstance(found, dict) else type(found).__name__
        raise RequestRefusedError(f"expected a mapping of at most {MAX_NAMES} names, got {size}")
    if known is not None and (unknown := [name for name in found if name not in known]):
        raise RequestRefusedError(
            f"expected {', '.join(known)}, got {unknown[0][:MAX_NAME_CHARS]!r}"
        )
    read: dict[str, Any] = {}
    for name, value in found.items():
        known_name = _read_name(name)
        with _prefix_errors(known_name):
            read[known_name] = each(value)
    return read


def _read_name(found: Any) -> str:
    if (
        not isinstance(found, str)
        or not is_printable(found)
        or not 0 < len(found) <= MAX_NAME_CHARS
    ):
        raise RequestRefusedError(
            f"expected a printable name of 1 to {MAX_NAME_CHARS} characters, "
            f"got {str(found)[:MAX_NAME_CHARS]!r}"
        )
    return found


def _read_number(found: Any, least: float, most: float = MAX_METRIC_VALUE) -> float:
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise RequestRefusedError(f"expected a finite number, got {str(found)[:MAX_NAME_CHARS]!r}")
    if not least <= found <= most:
        raise RequestRefusedError(f"must be >= {least:g} and <= {most:g}, got {float(found):g}")
    return found


def _read_integer(found: Any, most: int) -> int:
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found <= most:
        raise RequestRefusedError(
            f"expected an integer >= 0 and <= {most}, got {str(found)[:MAX_NAME_CHARS]!r}"
        )
    return found


def _read_table(found: Any, shape: tuple[int, ...], each: Callable[[Any], Any]) -> list[Any]:
    if not isinstance(found, list) or len(found) != shape[0]:
        size = f"{len(found)} entries" if isinstance(found, list) else type(found).__name__
        raise RequestRefusedError(f"expected lists of shape {list(shape)}, got {size}")
    return [
        each(value) if len(shape) == 1 else _read_table(value, shape[1:], each) for value in found
    ]
