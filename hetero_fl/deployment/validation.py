"""What nodes tell is taken apart here: of the right form, in bounds, and about what was asked, or it is refused in one line.

Scores cannot be checked for truth: only a node sees its test rows. But they can be kept from being anything else than scores.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Mapping
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
from hetero_fl.core.metrics import LARGEST_FIGURE, SMALLER_IS_BETTER, Scores, metric_names
from hetero_fl.core.model_spec import Tensors, freeze_lists
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.saved_model import SavedModel, read_model_file
from hetero_fl.core.task import Task
from hetero_fl.data.client_rows import RemoteDataInfo
from hetero_fl.data.preprocessing import Preprocess
from hetero_fl.deployment.messages import JUNK, RequestRefusedError
from hetero_fl.federation.client_runtime import EVALUATION_SETS, FORECAST_ROWS, ClientEvaluation
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.utils.code_permission import CodePermission, find_references
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.serialization import DTYPES, CodecError, as_bytes, check_header

OWN_SETTINGS = ("model", "preprocess", "augment", "shares")  # of a client, which its site decides
MOST_ROWS = 2**31  # of one site
# of the side to which a site may resize, unless the server's own configuration has images as large
MOST_PIXELS = 1024
LONGEST = 128  # characters of a name
MOST_NAMES = 32
BINS = 15  # of a calibration
TRAVELLING = {torch.from_numpy(np.empty(0, dtype)).dtype for dtype in DTYPES.values()}
FREE = ("r2",)  # metrics that may be below nought
MOST_TIME = 2**63  # times are whole numbers of 64 bits, in whatever unit
EVALUATION_FIELDS = {
    "scores",
    "confusion",
    "calibration",
    "baselines",
    "forecast",
    "triggered",
    "model",
}


def read_settings(tree: Any, names: Collection[str], largest: int = MOST_PIXELS) -> dict[str, Any]:
    """Read what a node decides itself of its client's settings.

    Args:
        tree: What came.
        names: `python:module:Name` that the server's own configuration has; a node has it run no others.
        largest: Side in pixels to which a node may resize its images, at most.

    Raises:
        Refused: It is something else, or out of bounds.
    """
    found = tree.get("settings") if isinstance(tree, dict) else None
    _check_plain(found)
    if not isinstance(found, dict) or (odd := set(found) - set(OWN_SETTINGS)):
        what = (
            f"it wants to decide {', '.join(sorted(odd))}"
            if isinstance(found, dict)
            else "expected a table of settings"
        )
        raise RequestRefusedError(what[:200])
    for name, key in CodePermission(granted=names).find_refused(find_references(found), ""):
        raise RequestRefusedError(
            f"{key}: found {name[:LONGEST]}, code that this server's configuration does not name"
        )
    try:
        resize = ClientSettings.model_validate(found).preprocess.resize
        if resize is not None and resize > largest:
            raise RequestRefusedError(
                f"preprocess.resize: found {one_line(resize, LONGEST)}; expected at most {largest}"
            )
    except ValidationError as error:
        raise RequestRefusedError(describe_error(error, found, ClientSettings)) from None
    except JUNK as error:
        raise RequestRefusedError(
            f"its settings cannot be read ({type(error).__name__}: {error})"
        ) from None
    return found


def read_state_name(name: str) -> str:
    """The name of a private state: a SHA-256, or none. Raises RequestRefusedError."""
    if name and not (len(name) == 64 and set(name) <= set("0123456789abcdef")):
        raise RequestRefusedError(f"found the state {name[:LONGEST]!r}")
    return name


def read_data_info(tree: Any, outputs: int, own: Preprocess | None = None) -> RemoteDataInfo:
    """Read what a client tells of its rows.

    Args:
        tree: What came.
        outputs: Of the task.
        own: The client's view but for mean and deviation, which only it can know; None if it has none to tell.

    Raises:
        Refused: It is something else.
    """
    try:
        _check_plain(tree)
        rows = {
            name: _read_integer(tree["rows"][name], MOST_ROWS)
            for name in ("train", "validation", "test")
        }
        if not rows["train"]:
            raise RequestRefusedError("it tells of no rows to train on")
        labels = (
            None
            if tree["labels"] is None
            else tuple(float(_read_number(n, 0.0, MOST_ROWS)) for n in tree["labels"])
        )
        if labels is not None and len(labels) != outputs:
            raise RequestRefusedError(
                f"it tells counts of {len(labels)} labels; the task has {outputs}"
            )
        view = (
            None
            if tree["view"] is None
            else Preprocess(**{k: freeze_lists(v) for k, v in tree["view"].items()})
        )
        if (view is None) != (own is None):
            raise RequestRefusedError(f"it tells {'no' if view is None else 'a'} view of its own")
        for number in (view.mean, view.std) if view is not None else ():
            for each in number if isinstance(number, tuple) else (number,):
                _read_number(0.0 if each is None else each, -LARGEST_FIGURE)
        if view is not None and replace(view, mean=None, std=None) != own:
            raise RequestRefusedError("it tells another view than the configuration asks for")
        return RemoteDataInfo(rows, _read_name(tree["hash"]), view, labels)
    except RequestRefusedError as error:
        raise RequestRefusedError(f"what it tells of its rows is refused: {error}") from None
    except JUNK as error:
        raise RequestRefusedError(
            f"what it tells of its rows cannot be read ({type(error).__name__}: {error})"
        ) from None


def read_evaluation(
    tree: Any, client: str, federation: FederationSpec, method: Algorithm
) -> ClientEvaluation:
    """What a client tells of its model. Raises RequestRefusedError."""
    client_info = federation.client_infos[client]
    try:
        if not isinstance(tree, dict) or set(tree) != EVALUATION_FIELDS:
            what = ", ".join(sorted(tree)) if isinstance(tree, dict) else type(tree).__name__
            raise RequestRefusedError(f"found {what[:120]}")
        _check_plain({**tree, "model": None})
        return _read_evaluation(tree, federation, client_info, method)
    except (RequestRefusedError, UserError) as error:
        raise RequestRefusedError(f"its reading is refused: {error}") from None
    except JUNK as error:
        raise RequestRefusedError(
            f"its reading cannot be read ({type(error).__name__}: {error})"
        ) from None


def _read_evaluation(
    tree: Mapping[str, Any], federation: FederationSpec, client_info: ClientInfo, method: Algorithm
) -> ClientEvaluation:
    task = federation.task
    if tree["triggered"] is not None:
        raise RequestRefusedError("it tells of a trigger; nobody lies in a federation")
    model = tree["model"]
    return ClientEvaluation(
        scores=_read_by_name(tree["scores"], EVALUATION_SETS, lambda s: _read_scores(s, task)),
        confusion=_read_by_name(
            tree["confusion"], EVALUATION_SETS, lambda c: _read_confusion(c, task)
        ),
        calibration=_read_by_name(tree["calibration"], EVALUATION_SETS, _read_calibration),
        baselines=_read_by_name(
            tree["baselines"],
            EVALUATION_SETS,
            lambda each: _read_by_name(each, None, lambda s: _read_scores(s, task)),
        ),
        forecast=_read_forecast(tree["forecast"], federation),
        model=b"" if model is None else _read_model(model, federation, client_info, method),
    )


def _read_scores(found: Any, task: Task) -> Scores:
    known = metric_names(task)

    def one(name: str, value: Any) -> float | None:
        least = -LARGEST_FIGURE if name in FREE else 0.0
        most = LARGEST_FIGURE if name in SMALLER_IS_BETTER else 1.0 + 1e-9
        return None if value is None else _read_number(value, least, most)

    return {name: one(name, value) for name, value in _check_names(found, known).items()}


def _read_confusion(found: Any, task: Task) -> list[Any]:
    n = task.outputs
    shape = (n, n) if task.kind == "multiclass" else (n, 2, 2)
    return _read_table(found, shape, lambda v: _read_integer(v, MOST_ROWS))


def _read_calibration(found: Any) -> dict[str, Any]:
    named = _check_names(found, ("ece", "confidence", "accuracy", "count"))

    def share(value: Any) -> float | None:
        return None if value is None else _read_number(value, 0.0, 1.0 + 1e-9)

    bins = {name: _read_table(named[name], (BINS,), share) for name in ("confidence", "accuracy")}
    return {
        "ece": share(named["ece"]),
        **bins,
        "count": _read_table(named["count"], (BINS,), lambda v: _read_integer(v, MOST_ROWS)),
    }


def _read_forecast(found: Any, federation: FederationSpec) -> dict[str, Any]:
    task = federation.task
    if not found:
        return {}
    dated = [
        share.examples.time is not None
        for share in federation.data.public_sets.values()
        if len(share.rows)
    ]
    if task.kind != "regression" or federation.privacy is not None or (dated and not any(dated)):
        raise RequestRefusedError("a forecast, although the run has none")
    named = _check_names(found, ("time", "truth", "predicted", "baselines"))
    rows = len(named["time"])
    if not 0 < rows <= FORECAST_ROWS:
        raise RequestRefusedError(f"a forecast of {rows} rows")

    def columns(values: Any) -> list[Any]:
        return _read_table(values, (task.outputs, rows), lambda v: _read_number(v, -LARGEST_FIGURE))

    return {
        "time": _read_table(
            named["time"], (rows,), lambda v: _read_number(v, -MOST_TIME, MOST_TIME)
        ),
        "truth": columns(named["truth"]),
        "predicted": columns(named["predicted"]),
        "baselines": _read_by_name(named["baselines"], None, columns),
    }


def _read_model(
    found: Any, federation: FederationSpec, client_info: ClientInfo, method: Algorithm
) -> bytes:
    """Return a client's model as a file whose metadata the server writes itself; of what came, it keeps the tensors.

    The metadata that came only says which of the kinds of model that this client may have it is. Nothing is built from it,
    and no code that it names is imported.
    """
    if not isinstance(found, Tensor):
        raise RequestRefusedError("a model that is no bytes")
    data = as_bytes(found)
    try:
        check_header(data)
    except CodecError:
        raise RequestRefusedError("expected a model file") from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(data)
        try:
            about, tensors = read_model_file(path)
        except UserError:
            raise RequestRefusedError("expected a model file") from None
    saved = _expected_model(about, tensors, federation, client_info, method)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if any(saved.arch.shapes.get(name) != shape for name, shape in shapes.items()):
        raise RequestRefusedError("a model whose tensors are not those of its kind")
    if saved.arch.parameter_names - shapes.keys():
        raise RequestRefusedError("a model of which tensors are missing")
    if odd := [t.dtype for t in tensors.values() if t.dtype not in TRAVELLING]:
        raise RequestRefusedError(f"a model with tensors of {odd[0]}")
    if not all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point()):
        raise RequestRefusedError("a model that is not finite")
    return saved.encode()


def _expected_model(
    about: Mapping[str, Any],
    tensors: Tensors,
    federation: FederationSpec,
    client_info: ClientInfo,
    method: Algorithm,
) -> SavedModel:
    """Return the model that these metadata mean, described as the server knows it. Raises RequestRefusedError if there is none."""
    task = federation.task
    layout = federation.data.layout
    client_infos = [client_info]
    if isinstance(method, Dense) and method.student is not None:
        # once the student is trained, every client uses it
        client_infos.append(federation.client_infos[method.student])
    views = {(each.arch, each.preprocess): None for each in client_infos}
    views |= {
        (arch, client_info.preprocess): None
        for slot, arch in client_info.models.items()
        if slot != "model"
    }
    prior = about["log_prior"]
    if prior is not None:
        prior = tuple(
            _read_table(prior, (task.outputs,), lambda v: float(_read_number(v, -LARGEST_FIGURE)))
        )
    kinds = [
        SavedModel(tensors, arch, asdict(view), task, prior, layout.columns, layout.categories)
        for arch, view in views
    ]
    named = about["architecture"]
    same_kind = [kind for kind in kinds if kind.metadata()["architecture"] == named]
    if not same_kind or kinds[0].metadata()["task"] != about["task"]:
        raise RequestRefusedError(
            f"a model of another kind than it has ({one_line(named['name'], LONGEST)})"
        )
    for kind in same_kind:
        if kind.metadata()["preprocess"] == about["preprocess"]:
            return kind
    raise RequestRefusedError("a model with a preprocessing that is not its client's")


def _check_plain(tree: Any) -> None:
    """Raise Refused if there is a tensor where plain values are expected: to walk through one takes a step for each number."""
    if isinstance(tree, Tensor):
        raise RequestRefusedError("found a tensor; expected plain values")
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            _check_plain(value)


# Pieces --------------------------------------------------------------------------------------------------------------
def _check_names(found: Any, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(found, dict) or set(found) != set(known):
        what = ", ".join(map(str, found))[:120] if isinstance(found, dict) else type(found).__name__
        raise RequestRefusedError(f"found {what}; expected {', '.join(known)}")
    return found


def _read_by_name(
    found: Any, known: Mapping[str, Any] | None, each: Callable[[Any], Any]
) -> dict[str, Any]:
    if not isinstance(found, dict) or len(found) > MOST_NAMES:
        raise RequestRefusedError(f"found {type(found).__name__}, not a few named values")
    if known is not None and (odd := [name for name in found if name not in known]):
        raise RequestRefusedError(f"found {odd[0][:LONGEST]!r}; expected {', '.join(known)}")
    return {_read_name(name): each(value) for name, value in found.items()}


def _read_name(found: Any) -> str:
    if not isinstance(found, str) or not found.isprintable() or not 0 < len(found) <= LONGEST:
        raise RequestRefusedError(f"found the name {str(found)[:LONGEST]!r}")
    return found


def _read_number(found: Any, least: float, most: float = LARGEST_FIGURE) -> float:
    """As it was told, to the bit."""
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise RequestRefusedError(f"found {str(found)[:LONGEST]!r}, no finite number")
    if not least <= found <= most:
        raise RequestRefusedError(f"found {float(found):g}; expected {least:g} to {most:g}")
    return found


def _read_integer(found: Any, most: int) -> int:
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found <= most:
        raise RequestRefusedError(f"found {str(found)[:LONGEST]!r}, no number of rows")
    return found


def _read_table(found: Any, shape: tuple[int, ...], each: Callable[[Any], Any]) -> list[Any]:
    if not isinstance(found, list) or len(found) != shape[0]:
        raise RequestRefusedError(f"found another form than {' by '.join(map(str, shape))} numbers")
    return [
        each(value) if len(shape) == 1 else _read_table(value, shape[1:], each) for value in found
    ]
