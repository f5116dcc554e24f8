"""Export models to ONNX or safetensors files and compare them with the run."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetero_fl.core.saved_model import SavedModel
from hetero_fl.experiment.exporting import score
from hetero_fl.experiment.exporting.graph import (
    OUTPUTS,
    ExportedModel,
    draw_inputs,
    inputs_of,
    to_predict_form,
)
from hetero_fl.experiment.exporting.model_card import FORM, card_facts, card_markdown
from hetero_fl.reporting.run import Run
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.seeding import keyed_generator
from hetero_fl.utils.serialization import sha256_of, write_atomically

# Graphs as files, and files run again by onnxruntime.

SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors"}
ABOUT = "hetero_fl"  # the name under which a file says what it takes and gives
Scorer = Callable[[tuple[Tensor, ...]], Tensor]


def check_installed() -> None:
    """Raise UserError if a package that writes or runs ONNX files is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--format: onnx needs {error.name}, which is not installed; pip install 'hetero_fl[export]'"
        ) from None


def load_scorer(content: bytes) -> Scorer:
    """Return an ONNX file as a function of raw inputs, on the CPU."""
    from onnxruntime import InferenceSession

    session = InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def score(given: tuple[Tensor, ...]) -> Tensor:
        arrays = {name: part.numpy() for name, part in zip(names, given, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return score


def export_graph(
    graph: ExportedModel, examples: tuple[Tensor, ...], about: Mapping[str, Any]
) -> bytes:
    """Return the content of an ONNX file that holds the graph.

    Args:
        graph: The model to export; it is switched to evaluation mode.
        examples: Two or more of each input, on which the graph is traced.
        about: Description of inputs and outputs, stored in the file's metadata.

    Raises:
        Exception: Whatever torch raises for a model that it cannot export.
    """
    sizes = {
        name: torch.export.Dim(name, min=1) for name in ("batch", "channels", "height", "width")
    }
    free = [
        {
            axis: sizes[size]
            for axis, size in enumerate(("batch", *one.shape))
            if isinstance(size, str)
        }
        for one in graph.inputs
    ]
    with torch.no_grad(), _ignore_export_warnings():
        program = torch.onnx.export(
            graph.eval(),
            examples,
            input_names=[one.name for one in graph.inputs],
            output_names=[OUTPUTS[graph.kind]],
            dynamic_shapes=(tuple(free),),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None  # it is asked for no file
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where the sources lay on this machine
    program.model.metadata_props[ABOUT] = json.dumps(about, sort_keys=True)
    return program.model_proto.SerializeToString()


@contextmanager
def _ignore_export_warnings() -> Iterator[None]:
    """Ignore warnings of torch's exporter that say nothing about the result."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "_check_is_size will be removed", FutureWarning)
        warnings.filterwarnings(
            "ignore", r"`torch\.jit\.\w+` is (deprecated|not supported)", FutureWarning
        )
        # by a GRU
        warnings.filterwarnings(
            "ignore", r"The tensor attributes? .* assigned during export", UserWarning
        )
        warnings.filterwarnings(
            "ignore", "# The axis name: batch will not be used", UserWarning
        )  # another input's, too
        yield


# From a finished run to files that predict without it: written, run again, compared with the run,
# described.

TRACED_EXAMPLES = 3  # examples on which a graph is followed
BATCHES = (1, 2, 7)  # sizes that it then has to take, too
TOLERANCE = 1e-5
ROWS = "rows"

Say = Callable[[str], None]


class ExportedFile(NamedTuple):
    """An exported model, its card, and how far it was from the run's predictions at most (None: it is no graph)."""

    model: Path
    card: Path
    largest_difference: float | None


def export(
    run: Run | str | Path,
    client: str | None = None,
    file_format: str = "onnx",
    out: str | Path | None = None,
    personal: bool = False,
    say: Say = lambda line: None,
    allow_code: bool | CodePermission = False,
) -> dict[str, ExportedFile]:
    """Write models of a finished run as files for use without this package; returns them by client id.

    ONNX files hold the preprocessing too: they take raw examples (`Input`), any number at once, and give
    probabilities, or values of a regression. Each is run again before it is kept, and has to agree with `Run.predict` within
    1e-5. Beside it lie `NAME.md` and `NAME.json`, which say what it is, and `score.py`, which needs no hetero_fl. A safetensors
    file is tensors alone, for `model_zoo`.

    Args:
        client: a client's id, or "server"; None: all models.
        file_format: onnx or safetensors.
        out: the folder, by default `export` in the run's.
        personal: with the client's own label frequencies, as on its own patients (`Run.predict`'s default); the file is then called
            `NAME-home`.
        allow_code: Whether code that the run's files name may run.

    Raises:
        UserError: no such model; a model that cannot be written in this format, or would predict otherwise there.
    """
    run = Run.open(run, allow_code)
    if file_format == "torchscript":
        raise UserError(
            "--format: torchscript is no longer written, because PyTorch has deprecated it; use onnx"
        )
    if file_format not in SUFFIXES:
        raise UserError(f"--format: found '{file_format}'{suggest_or_list(file_format, SUFFIXES)}")
    if client is not None and client not in run.models:
        raise UserError(f"--client: found '{client}'{suggest_or_list(client, run.models)}")
    if personal and file_format == "safetensors":
        raise UserError(
            "--home: a safetensors file holds the label frequencies beside the tensors; leave it out"
        )
    if file_format == "onnx":
        check_installed()
    folder = run.path / "export" if out is None else Path(out)
    made = {}
    for name, model in run.models.items():
        if client is None or name == client:
            made[name] = _export_one(run, name, model, file_format, folder, personal)
            say(f"{name}: {made[name].model.name}{_summary_line(made[name])}")
    if file_format != "safetensors":
        _write(folder / "score.py", Path(score.__file__).read_bytes())
    return made


def _export_one(
    run: Run, name: str, model: SavedModel, file_format: str, folder: Path, personal: bool
) -> ExportedFile:
    largest = None
    if file_format == "safetensors":
        content = (run.path / "models" / f"{name}.safetensors").read_bytes()
    else:
        content = _onnx_content(name, model, personal)
        largest = _largest_difference(run, name, load_scorer(content), personal)
    stem = f"{name}-home" if personal else name
    file = folder / f"{stem}{SUFFIXES[file_format]}"
    card = folder / f"{stem}.json"
    source = sha256_of(run.path / "models" / f"{name}.safetensors")
    checked = None if largest is None else {"batches": list(BATCHES), "largest_difference": largest}
    entry = {
        "name": file.name,
        "format": file_format,
        "sha256": hashlib.sha256(content).hexdigest(),
        "checked": checked,
    }
    files = [*(f for f in _other_formats(card, source) if f["format"] != file_format), entry]
    told = card_facts(
        run, name, {"files": files, "source_sha256": source, "home": personal, **interface(model)}
    )
    _write(file, content)
    _write(card, (json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    _write(card.with_suffix(".md"), card_markdown(told).encode())
    return ExportedFile(file, card.with_suffix(".md"), largest)


def _other_formats(client_info: Path, source: str) -> list[dict[str, Any]]:
    """Return the entries of an existing card for the same model in other formats."""
    try:
        card = json.loads(client_info.read_text(encoding="utf-8"))
        if (card["form"], card["source_sha256"]) != (FORM, source):
            return []
        return [file for file in card["files"] if file["format"] in SUFFIXES]
    except (OSError, ValueError, TypeError, KeyError):  # none, or no card
        return []


def interface(model: SavedModel) -> dict[str, Any]:
    """What a file takes and gives, in plain fields; it is written into the file, too."""
    return {
        "inputs": [one.record() for one in inputs_of(model)],
        "output": {
            "name": OUTPUTS[model.task.kind],
            "shape": ["batch", model.task.outputs],
            "dtype": "float32",
        },
        "task": model.task.kind,
        "names": list(model.task.output_names),
    }


def _onnx_content(name: str, model: SavedModel, personal: bool) -> bytes:
    examples = draw_inputs(model, TRACED_EXAMPLES, keyed_generator("export", ROWS, TRACED_EXAMPLES))
    try:
        return export_graph(ExportedModel(model, personal), examples, interface(model))
    except Exception as error:  # an operation of a model of whatever origin that the format has not
        raise UserError(
            f"{name}: {model.arch.name} cannot be written as onnx: {_root_cause(error)}"
        ) from error


def _largest_difference(run: Run, name: str, scorer: Scorer, personal: bool) -> float:
    """The largest difference to the run's own predictions, relative to them where they are larger than 1."""
    model = run.models[name]
    largest = 0.0
    for size in BATCHES:
        given = draw_inputs(model, size, keyed_generator("export", ROWS, size))
        wanted = run.predict(name, to_predict_form(model, given), personal)
        try:
            found = scorer(given)
        except Exception as error:  # what a runtime raises for a size that the graph is fixed to
            raise UserError(
                f"{name}: {model.arch.name} as onnx takes no batch of {size} (a model of one's own reads x.shape[0], "
                f"not len(x)): {_root_cause(error)}"
            ) from error
        largest = max(largest, _relative_difference(found, wanted))
    if not largest <= TOLERANCE:
        raise UserError(
            f"{name}: {model.arch.name} as onnx predicts otherwise than the run does, by {largest:.2g}; nothing is written"
        )
    return largest


def _relative_difference(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    apart = (found - wanted).abs() / wanted.abs().clamp(min=1)
    return float(apart.nan_to_num(nan=torch.inf).max())


def _root_cause(error: BaseException) -> str:
    """The first line of what went wrong at the bottom of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _summary_line(file: ExportedFile) -> str:
    apart = file.largest_difference
    return "" if apart is None else f", at most {apart:.1e} from the run's predictions"


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"--out: {path}: cannot be written ({error.strerror})") from None
