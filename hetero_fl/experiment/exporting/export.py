"""Export of models to ONNX and safetensors files, with a check of ONNX predictions."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetero_fl.core.saved_model import SavedModel
from hetero_fl.data.inference import preprocess_inputs
from hetero_fl.experiment.exporting import score
from hetero_fl.experiment.exporting.graph import (
    OUTPUTS,
    ExportedModel,
    draw_inputs,
    inputs_of,
    to_predict_inputs,
)
from hetero_fl.experiment.exporting.model_card import FORM, card_facts, card_markdown
from hetero_fl.reporting.run import Run
from hetero_fl.utils.code_permission import AllowCode
from hetero_fl.utils.errors import ArgumentError, UserError, describe_removed, suggest_or_list
from hetero_fl.utils.extras import check_extra
from hetero_fl.utils.seeding import keyed_generator
from hetero_fl.utils.serialization import make_folder, sha256_of, write_atomically

SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors"}
# Metadata key under which an ONNX file contains the description of its inputs and outputs.
ABOUT = "hetero_fl"
ROWS = "rows"
# Number of examples for tracing a model.
TRACED_EXAMPLES = 3
# Batch sizes for checking an exported file.
BATCHES = (1, 2, 7)
TOLERANCE = 1e-5
# Warnings of the torch exporter that do not affect the result.
IGNORED_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    ("_check_is_size will be removed", FutureWarning),
    (r"`torch\.jit\.\w+` is (deprecated|not supported)", FutureWarning),
    # Issued for models with a GRU.
    (r"The tensor attributes? .* assigned during export", UserWarning),
    # Issued if several inputs share the batch axis.
    ("# The axis name: batch will not be used", UserWarning),
)
Scorer = Callable[[tuple[Tensor, ...]], Tensor]
Log = Callable[[str], None]


class ExportedFile(NamedTuple):
    """Files of an exported model.

    Attributes:
        model: Path of the model file.
        card: Path of the model card in Markdown.
        largest_difference: Largest difference from the predictions of `Run.predict`, which is
            relative for predictions above 1. None for safetensors files, whose predictions are not
            checked.
    """

    model: Path
    card: Path
    largest_difference: float | None


def load_scorer(content: bytes) -> Scorer:
    """Create a function that runs an ONNX model on the CPU.

    Args:
        content: Content of the ONNX file.

    Returns:
        A function that maps a tuple of raw inputs to predictions.
    """
    from onnxruntime import InferenceSession

    session = InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def predict(inputs: tuple[Tensor, ...]) -> Tensor:
        arrays = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return predict


def export_graph(name: str, model: SavedModel, personal: bool) -> bytes:
    """Export a model to ONNX.

    The description of the inputs and outputs is stored in the metadata of the file.

    Args:
        name: Client id or "server".
        model: The model to export.
        personal: Whether to include the client's label frequencies.

    Returns:
        The content of the ONNX file.

    Raises:
        UserError: If torch cannot export the model.
    """
    about = interface(model)
    sizes = {
        name: torch.export.Dim(name, min=1) for name in ("batch", "channels", "height", "width")
    }
    dynamic_axes = [
        {axis: sizes[size] for axis, size in enumerate(spec["shape"]) if isinstance(size, str)}
        for spec in about["inputs"]
    ]
    examples = draw_inputs(model, TRACED_EXAMPLES, keyed_generator("export", ROWS, TRACED_EXAMPLES))
    with torch.no_grad(), warnings.catch_warnings():
        for message, category in IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        try:
            program = torch.onnx.export(
                ExportedModel(model, personal).eval(),
                examples,
                input_names=[spec["name"] for spec in about["inputs"]],
                output_names=[about["output"]["name"]],
                dynamic_shapes=(tuple(dynamic_axes),),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            # A user-defined model may use operations that ONNX does not support.
            raise UserError(
                f"{name}: {model.arch.name} cannot be exported to onnx: {_root_cause(error)}"
            ) from error
    # The result is only None if a file name is passed.
    assert program is not None
    # The metadata of nodes contains file paths of this machine, which must not be published.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.model.metadata_props[ABOUT] = json.dumps(about, sort_keys=True)
    return program.model_proto.SerializeToString()


def export(
    run: Run | str | Path,
    client: str | None = None,
    file_format: str = "onnx",
    out: str | Path | None = None,
    personal: bool = False,
    *,
    log: Log = lambda _line: None,
    allow_code: AllowCode = False,
) -> dict[str, ExportedFile]:
    """Export models of a finished run to files that can be used without this package.

    An ONNX file includes the preprocessing. The exported model maps raw examples, in batches of any
    size, to probabilities, or to values for regression. Before a file is written, the function
    checks that the exported predictions differ by at most 1e-5 from the predictions of
    `Run.predict`. The script `score.py` is written next to ONNX files. The script computes
    predictions from a `.csv` or `.npz` file without hetero_fl.

    A safetensors file contains only the tensors of a model from `model_zoo`. In both formats, a
    model card (`NAME.md`, `NAME.json`) describes each model.

    Args:
        run: A finished run or its directory.
        client: Client id or "server". If None, all models are exported.
        file_format: "onnx" or "safetensors".
        out: The folder to write to. Default: `export` in the run directory, or `export/best_global`
            and `export/best_personal` for the best models.
        personal: Whether to include the client's label frequencies, as `Run.predict` does by
            default. If True, the file is named `NAME-personal`. Not supported for safetensors
            files.
        log: Function that is called with a line for each exported model.
        allow_code: Whether code that the files of the run refer to may be executed.

    Returns:
        The exported files, keyed by client id or "server".

    Raises:
        UserError: If an argument is invalid, if a model does not exist or cannot be exported in
            this format, or if the predictions of the exported model differ.

    Example:
        >>> from tempfile import mkdtemp
        >>> import hetero_fl
        >>> config = {"data": {"name": "digits"}, "algorithm": {"name": "fedavg"}, "rounds": 1}
        >>> overrides = ["clients.count=2", "output.plots=false", "output.report=false"]
        >>> run = hetero_fl.run(config, out=mkdtemp(), overrides=overrides)
        >>> files = hetero_fl.export(run, "server", "safetensors")
        >>> files["server"].model.name, files["server"].card.name
        ('server.safetensors', 'server.md')
    """
    run = Run.open(run, allow_code)
    if file_format not in SUFFIXES:
        unknown = f"unknown format '{file_format}'{suggest_or_list(file_format, SUFFIXES)}"
        removed = describe_removed(file_format, {"torchscript": "onnx"})
        raise ArgumentError(f"file_format: {removed or unknown}")
    models = run.load_models(client)
    if personal and file_format == "safetensors":
        raise ArgumentError(
            "personal: cannot be combined with the format safetensors, which always includes the "
            "label frequencies"
        )
    if file_format == "onnx":
        check_extra("export", ("onnx", "onnxruntime", "onnxscript"), "format onnx")
    default = run.directory.models_folder(run.selection).relative_to(run.path / "models")
    folder = run.path / "export" / default if out is None else Path(out)
    make_folder(folder)
    exported = {}
    for name, model in models.items():
        file = _export_model(
            run, name, model, file_format=file_format, folder=folder, personal=personal
        )
        check = ""
        if file.largest_difference is not None:
            check = f", differs from the run's predictions by at most {file.largest_difference:.1e}"
        log(f"{name}: {file.model.name}{check}")
        exported[name] = file
    if file_format != "safetensors":
        _write(folder / "score.py", Path(score.__file__).read_bytes())
    return exported


def _export_model(
    run: Run, name: str, model: SavedModel, *, file_format: str, folder: Path, personal: bool
) -> ExportedFile:
    largest = None
    if file_format == "safetensors":
        # The tensors are written as they are, so they must be those of the model.
        model.module()
        content = run.model_file(name).read_bytes()
    else:
        content = export_graph(name, model, personal)
        largest = _largest_difference(run, name, load_scorer(content), personal)
    stem = f"{name}-personal" if personal else name
    file = folder / f"{stem}{SUFFIXES[file_format]}"
    card = folder / f"{stem}.json"
    source = sha256_of(run.model_file(name))
    checked = None if largest is None else {"batches": list(BATCHES), "largest_difference": largest}
    entry = {
        "name": file.name,
        "format": file_format,
        "sha256": hashlib.sha256(content).hexdigest(),
        "checked": checked,
    }
    files = [*(f for f in _other_formats(card, source) if f["format"] != file_format), entry]
    facts = card_facts(
        run, name, {"files": files, "source_sha256": source, "home": personal, **interface(model)}
    )
    _write(file, content)
    text = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    _write(card, text.encode())
    _write(card.with_suffix(".md"), card_markdown(facts).encode())
    return ExportedFile(file, card.with_suffix(".md"), largest)


def _other_formats(card_path: Path, source: str) -> list[dict[str, Any]]:
    """Return the file entries of an existing model card.

    The result is empty if there is no card, or if the card describes another model.

    Args:
        card_path: Path of the card in JSON format.
        source: SHA-256 hash of the model file in the run directory.
    """
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
        if (card["form"], card["source_sha256"]) != (FORM, source):
            return []
        return [file for file in card["files"] if file["format"] in SUFFIXES]
    except (OSError, ValueError, TypeError, KeyError):
        # The file does not exist or is not a model card.
        return []


def interface(model: SavedModel) -> dict[str, Any]:
    """Describe the inputs and outputs of a model, for the metadata of exported files."""
    return {
        "inputs": inputs_of(model),
        "output": {
            "name": OUTPUTS[model.task.kind],
            "shape": ["batch", model.task.outputs],
            "dtype": "float32",
        },
        "task": model.task.kind,
        "names": list(model.task.output_names),
    }


def _largest_difference(run: Run, name: str, scorer: Scorer, personal: bool) -> float:
    """Compare the predictions of an exported model with the predictions of the run.

    Returns:
        The largest difference, which is relative for predictions above 1.

    Raises:
        UserError: If the exported model fails, or if the difference exceeds the tolerance.
    """
    model = run.load_models(name)[name]
    largest = 0.0
    for size in BATCHES:
        inputs = draw_inputs(model, size, keyed_generator("export", ROWS, size))
        x = preprocess_inputs(model, to_predict_inputs(model, inputs))
        expected = model.predict(x, personal)
        try:
            found = scorer(inputs)
        except Exception as error:
            # The type depends on the operation that does not support the batch size.
            raise UserError(
                f"{name}: {model.arch.name} exported to onnx fails for a batch of {size} "
                f"(use x.shape[0] instead of len(x) in the model): {_root_cause(error)}"
            ) from error
        difference = (found - expected).abs() / expected.abs().clamp(min=1)
        largest = max(largest, float(difference.nan_to_num(nan=torch.inf).max()))
    if not largest <= TOLERANCE:
        raise UserError(
            f"{name}: {model.arch.name} exported to onnx predicts differently than in the run, "
            f"by {largest:.2g}; nothing is written"
        )
    return largest


def _root_cause(error: BaseException) -> str:
    """Return the type and the first message line of the innermost cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ArgumentError(f"out: {path}: cannot be written ({error.strerror})") from None
