"""Graphs of every family of models: they predict as the saved model does, for any batch, and refuse what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from hetero_fl.core.saved_model import SavedModel
from hetero_fl.data.inference import preprocess_inputs
from hetero_fl.experiment.exporting import export
from hetero_fl.experiment.exporting.export import interface
from hetero_fl.experiment.exporting.graph import (
    ExportedModel,
    draw_inputs,
    inputs_of,
    to_predict_form,
)
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.seeding import keyed_generator
from tests.helpers.saved_models import CASES, COLUMNS


def require_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install 'hetero_fl[export]'")


def predicted(model: SavedModel, given: tuple[Tensor, ...], home: bool) -> Tensor:
    """What `Run.predict` gives."""
    z = model.logits(preprocess_inputs(model, to_predict_form(model, given)), home)
    return (
        z
        if model.task.kind == "regression"
        else z.sigmoid()
        if model.task.kind == "multilabel"
        else z.softmax(-1)
    )


def file_of(model: SavedModel, home: bool = False) -> bytes:
    return export.export_graph(
        ExportedModel(model, home), draw_inputs(model, 3, keyed_generator("f")), interface(model)
    )


def spoilt(model: SavedModel) -> list[tuple[int, float]]:
    """(input, value) of what may not stand in an example."""
    found = [(0, 30.0), (0, -1.0)] if inputs_of(model)[0].kind == "tokens" else []
    for i, one in enumerate(inputs_of(model)):
        found += [(i, float("inf"))] if one.kind != "tokens" else []
        found += [(i, 1.5), (i, -0.5)] if one.kind == "image" else []
        found += [(i, float("nan"))] if one.kind != "tokens" and not one.allows_missing else []
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_module_that_is_exported_predicts_as_the_model_does(name: str) -> None:
    model = CASES[name]
    personal = model.log_prior is not None
    given = draw_inputs(model, 5, keyed_generator("rows", 5))

    found = ExportedModel(model, personal).eval()(*given)

    torch.testing.assert_close(found, predicted(model, given, personal))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_file_predicts_as_the_model_does_for_batches_of_any_size_and_refuses_the_same_rows(
    name: str,
) -> None:
    require_onnx()
    model, home = CASES[name], CASES[name].log_prior is not None
    content = file_of(model, home)
    score = export.load_scorer(content)
    for size in (1, 2, 5, 33):
        given = draw_inputs(model, size, keyed_generator("rows", size))
        wanted = predicted(model, given, home)
        torch.testing.assert_close(score(given), wanted, atol=1e-5, rtol=0)
        assert wanted.isfinite().all()
    assert home is (
        not torch.allclose(predicted(model, given, True), predicted(model, given, False), atol=1e-3)
    )
    for place, value in spoilt(model):
        given = draw_inputs(model, 5, keyed_generator("bad"))
        given[place][1].view(-1)[-1] = value
        assert score(given).isnan().all(1).tolist() == [False, True, False, False, False]
    assert __file__.split("/tests/")[0].encode() not in content, "where the sources lay"
    assert b"site-packages" not in content


@pytest.mark.parametrize("name", CASES)
def test_what_predict_refuses_gives_nan_and_spoils_no_other_row(name: str) -> None:
    model = CASES[name]
    graph = ExportedModel(model, False).eval()
    for place, value in spoilt(model):
        given = draw_inputs(model, 5, keyed_generator("bad"))
        wanted = graph(*given)
        given[place][2].view(-1)[-1] = value
        with pytest.raises(UserError):
            preprocess_inputs(model, to_predict_form(model, given))
        found = graph(*given)
        assert found[2].isnan().all(), (place, value)
        others = [0, 1, 3, 4]
        assert torch.equal(found[others], wanted[others])


def test_two_channels_are_no_colours() -> None:
    model = CASES["resnet_of_grey"]
    two = torch.rand(3, 2, 12, 12)
    assert ExportedModel(model, False)(two).isnan().all()
    with pytest.raises(UserError):
        preprocess_inputs(model, two)


@pytest.mark.slow
def test_a_file_says_what_it_takes_and_gives() -> None:
    require_onnx()
    model = CASES["tabular_with_gaps"]
    about = json.loads(_embedded(file_of(model)))
    assert about == interface(model)
    (row,) = about["inputs"]
    assert (
        row["columns"] == ["weight", "pulse", "glucose"]
        and row["gaps"]
        and row["shape"] == ["batch", 3]
    )
    assert set(row["columns"]) < set(COLUMNS)
    assert about["output"] == {"name": "probabilities", "shape": ["batch", 4], "dtype": "float32"}


def _embedded(content: bytes) -> Any:
    from onnxruntime import InferenceSession

    session = InferenceSession(content, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["row"]
    assert (
        session.get_inputs()[0].shape == ["batch", 3]
        and session.get_outputs()[0].name == "probabilities"
    )
    return session.get_modelmeta().custom_metadata_map["hetero_fl"]


def test_images_of_any_size_are_named_so() -> None:
    (image,) = inputs_of(CASES["lenet_of_colours"])
    assert image.shape == ("channels", "height", "width")
    assert [one.name for one in inputs_of(CASES["multimodal"])] == ["image", "genes"]
    assert inputs_of(CASES["lstm"])[0].shape == (20, 3)
