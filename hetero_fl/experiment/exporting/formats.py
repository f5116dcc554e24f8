"""Graphs as files, and files run again: ONNX by onnxruntime, TorchScript by torch."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hetero_fl.errors import UserError
from hetero_fl.experiment.exporting.graph import OUTPUTS, Exported

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "safetensors": ".safetensors"}
ABOUT = "hetero_fl"  # the name under which a file says what it takes and gives
Scorer = Callable[[tuple[Tensor, ...]], Tensor]


def check_installed(format: str) -> None:
    """Raises UserError if what writes this format is not here."""
    if format != "onnx":
        return
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--format: onnx needs {error.name}, which is not installed; pip install 'hetero_fl[export]', or take torchscript"
        ) from None


def written(graph: Exported, examples: tuple[Tensor, ...], format: str, about: Mapping[str, Any]) -> bytes:
    """The content of a file. `examples`: two or more of each input, on which the graph is followed.

    Raises whatever torch raises where the model is not one that can be written down.
    """
    with torch.no_grad():
        return (_onnx if format == "onnx" else _torchscript)(graph.eval(), examples, json.dumps(about, sort_keys=True))


def read(content: bytes, format: str) -> Scorer:
    """The file as a function of raw inputs, on the CPU."""
    if format == "torchscript":
        with _told():
            module = torch.jit.load(io.BytesIO(content))
        return lambda given: module(*given)
    from onnxruntime import InferenceSession

    session = InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def score(given: tuple[Tensor, ...]) -> Tensor:
        arrays = {name: part.numpy() for name, part in zip(names, given, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return score


def _onnx(graph: Exported, examples: tuple[Tensor, ...], about: str) -> bytes:
    sizes = {name: torch.export.Dim(name, min=1) for name in ("batch", "channels", "height", "width")}
    free = [
        {axis: sizes[size] for axis, size in enumerate(("batch", *one.shape)) if isinstance(size, str)}
        for one in graph.inputs
    ]
    with _told():
        program = torch.onnx.export(
            graph,
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
    program.model.metadata_props[ABOUT] = about
    return program.model_proto.SerializeToString()


def _torchscript(graph: Exported, examples: tuple[Tensor, ...], about: str) -> bytes:
    file = io.BytesIO()
    with _told():
        traced = torch.jit.trace(graph, examples, check_trace=False)  # it is compared with the run's own predictions
        torch.jit.save(traced, file, _extra_files={f"{ABOUT}.json": about})
    return file.getvalue()


@contextmanager
def _told() -> Iterator[None]:
    """Without the warnings that are known and say nothing of the result: torch's on its own parts, and a tracer's that what it
    follows might be fixed to the examples, which is found out afterwards by batches of other sizes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "_check_is_size will be removed", FutureWarning)
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is (deprecated|not supported)", FutureWarning)
        warnings.filterwarnings("ignore", r"The tensor attributes? .* assigned during export", UserWarning)  # by a GRU
        warnings.filterwarnings(
            "ignore", "# The axis name: batch will not be used", UserWarning
        )  # another input's, too
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        yield
