"""Exported graphs of every model family predict as the saved model for any batch size."""

from __future__ import annotations

import json
import math

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
    to_predict_inputs,
)
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.seeding import keyed_generator
from tests.support.saved_models import CASES, case


def require_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install 'hetero_fl[export]'")


def predicted(model: SavedModel, inputs: tuple[Tensor, ...], personal: bool) -> Tensor:
    """Return the predictions of `Run.predict`."""
    return model.predict(preprocess_inputs(model, to_predict_inputs(model, inputs)), personal)


def file_of(model: SavedModel, personal: bool = False) -> bytes:
    return export.export_graph("model", model, personal)


def invalid_values(model: SavedModel) -> list[tuple[int, float]]:
    """Return the index of an input and a value that is invalid in it, for every check."""
    return [
        (i, value)
        for i, spec in enumerate(inputs_of(model))
        for value in (float("inf"), float("nan"))
        if spec["kind"] != "tokens" and not (spec.get("gaps") and math.isnan(value))
    ]


def test_exported_module_predicts_as_the_model(subtests: pytest.Subtests) -> None:
    for name in CASES:
        model = case(name)
        personal = model.log_prior is not None
        inputs = draw_inputs(model, 5, keyed_generator("rows", 5))
        with subtests.test(model=name):
            found = ExportedModel(model, personal).eval()(*inputs)

            torch.testing.assert_close(found, predicted(model, inputs, personal))


@pytest.mark.slow
@pytest.mark.parametrize("names", [list(CASES)[i::4] for i in range(4)], ids=lambda names: names[0])
def test_exported_file_predicts_as_the_model_for_any_batch_size(
    names: list[str], subtests: pytest.Subtests
) -> None:
    require_onnx()
    for name in names:
        with subtests.test(model=name):
            check_exported_file(case(name))


def check_exported_file(model: SavedModel) -> None:
    """Check the predictions and the description of the file of a model."""
    from onnxruntime import InferenceSession

    personal = model.log_prior is not None
    content = file_of(model, personal)
    score = export.load_scorer(content)
    for size in (1, 2, 5, 33):
        inputs = draw_inputs(model, size, keyed_generator("rows", size))
        expected = predicted(model, inputs, personal)
        torch.testing.assert_close(score(inputs), expected, atol=1e-5, rtol=0)
        assert expected.isfinite().all()
    both = [predicted(model, inputs, is_personal) for is_personal in (True, False)]
    assert personal is not torch.allclose(*both, atol=1e-3)
    for input_idx, value in invalid_values(model):
        inputs = draw_inputs(model, 5, keyed_generator("bad"))
        inputs[input_idx][1].view(-1)[-1] = value
        assert score(inputs).isnan().all(1).tolist() == [False, True, False, False, False]
    session = InferenceSession(content, providers=["CPUExecutionProvider"])
    about = interface(model)
    assert json.loads(session.get_modelmeta().custom_metadata_map["hetero_fl"]) == about
    for graph, described in (
        (session.get_inputs(), about["inputs"]),
        (session.get_outputs(), [about["output"]]),
    ):
        assert [each.name for each in graph] == [each["name"] for each in described]
    # no path of this machine
    assert __file__.split("/tests/")[0].encode() not in content
    assert b"site-packages" not in content


def test_invalid_rows_give_nan_only_for_themselves(subtests: pytest.Subtests) -> None:
    others = [0, 1, 3, 4]
    for name in CASES:
        model = case(name)
        graph = ExportedModel(model, False).eval()
        for input_idx, value in invalid_values(model):
            inputs = draw_inputs(model, 5, keyed_generator("bad"))
            expected = graph(*inputs)
            inputs[input_idx][2].view(-1)[-1] = value
            with subtests.test(model=name, input=input_idx, value=value):
                with pytest.raises(UserError):
                    preprocess_inputs(model, to_predict_inputs(model, inputs))
                found = graph(*inputs)
                assert found[2].isnan().all()
                assert torch.equal(found[others], expected[others])


def test_inputs_and_outputs_are_described() -> None:
    (image,) = inputs_of(case("lenet_of_colours"))
    assert image["shape"] == ["batch", "channels", "height", "width"]
    assert [spec["name"] for spec in inputs_of(case("multimodal"))] == ["image", "genes"]
    assert inputs_of(case("lstm"))[0]["shape"] == ["batch", 20, 3]
    about = interface(case("tabular_with_gaps"))
    (row,) = about["inputs"]
    assert (row["name"], row["columns"]) == ("row", ["weight", "pulse", "glucose"])
    assert row["gaps"] and row["shape"] == ["batch", 3]
    assert about["output"] == {"name": "probabilities", "shape": ["batch", 4], "dtype": "float32"}


def test_two_channels_are_not_accepted_as_colors() -> None:
    model = case("resnet_of_grey")
    two = torch.rand(3, 2, 12, 12)

    assert ExportedModel(model, False)(two).isnan().all()
    with pytest.raises(UserError):
        preprocess_inputs(model, two)
