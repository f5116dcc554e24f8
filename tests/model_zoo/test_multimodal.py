"""The multimodal model: tensor names, absent blocks and block dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model_zoo import SplitModel, create_model
from tests.support.cases import each_case

BLOCKS = [["image", [1, 8, 8]], ["genes", [5]]]


def make_model(blocks: Any = BLOCKS, marks: int = 2, **options: Any) -> SplitModel:
    torch.manual_seed(0)
    numbers = sum(torch.Size(shape).numel() for _, shape in blocks)
    model = create_model("multimodal", 3, numbers + marks, (), blocks=blocks, **options)
    with torch.no_grad():  # a nonzero embedding, as after training
        model.backbone.get_parameter("fusion.absent").normal_()
    return model


def rows(n: int = 6, genes: bool = True, image: bool = True) -> Tensor:
    x = torch.randn(n, 71, generator=torch.Generator().manual_seed(1))
    x[:, 69], x[:, 70] = float(not image), float(not genes)
    return x


def test_tensor_names_contain_the_block() -> None:
    model = make_model()
    parts = {n.split(".")[1] for n, _ in model.named_parameters() if n.startswith("backbone.")}
    assert parts == {"image", "genes", "fusion"}
    image = {n: p.shape for n, p in model.named_parameters() if n.startswith("backbone.image.")}
    single = create_model("multimodal", 3, 1, 8)  # an image-only model of the same widths
    assert image == {
        n: p.shape for n, p in single.named_parameters() if n.startswith("backbone.image.")
    }
    assert image.keys() != set() and single(torch.rand(2, 1, 8, 8)).logits.shape == (2, 3)


@each_case("fusion", ("concat", "gated"))
def test_values_of_an_absent_block_are_ignored(fusion: str) -> None:
    model = make_model(fusion=fusion).eval()
    x = rows(genes=False)
    other = x.clone()
    other[:, 64:69] = 7.0
    assert torch.equal(model(x).logits, model(other).logits)
    filled = x.clone()
    filled[:, 70] = 0
    assert not torch.allclose(model(x).logits, model(filled).logits)
    zeros = filled.clone()
    zeros[:, 64:69] = 0  # an absent block differs from zeros
    assert not torch.allclose(model(x).logits, model(zeros).logits)
    nothing = rows(genes=False, image=False)
    assert torch.allclose(model(nothing).logits, model(nothing).logits[:1].expand(6, 3))


@each_case("image", ("cnn", "pilotnet", "resnet", "vit"))
def test_image_branch_has_the_selected_network(image: str) -> None:
    blocks = [["frame", [3, 12, 20]], ["state", [3]]]
    model = make_model(blocks, image=image, image_width=4, drop=0.0).eval()
    x = torch.rand(5, 725)
    x[:, 723:] = 0

    assert model(x).logits.shape == (5, 3)
    x[:, :720] = x[:, :720].flip(1)
    assert model(x).logits.std(0).min() > 0
    # Clients that share the branch do not share running statistics.
    assert not list(model.buffers())
    single = create_model(
        "multimodal", 3, 3, (12, 20), blocks=blocks[:1], image=image, image_width=4
    )
    frame = {n for n, _ in model.named_parameters() if n.startswith("backbone.frame.")}
    assert frame == {n for n, _ in single.named_parameters() if n.startswith("backbone.frame.")}


def test_absent_block_embedding_is_learned() -> None:
    model = make_model(drop=0.0)
    model(rows(genes=False)).logits.sum().backward()
    grad = model.backbone.get_parameter("fusion.absent").grad
    assert grad is not None and not grad[0].any() and grad[1].any()
    genes = model.backbone.get_parameter("genes.0.weight").grad
    assert genes is None or not genes.any()


def test_blocks_are_dropped_in_training_but_never_all() -> None:
    model = make_model(drop=0.5, dropout=0.0)
    x = rows(400)
    x[:] = x[:1]
    seen: list[Tensor] = []
    model.backbone.get_submodule("fusion").register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[1])
    )
    torch.manual_seed(3)
    model(x)
    model.eval()(x)
    training, reading = seen
    share = training.double().mean(0)
    assert reading.all() and training.any(1).all()
    assert (share > 0.45).all() and (share < 0.8).all() and not training[:, 0].equal(training[:, 1])
    # one block is never hidden
    make_model(drop=0.9, blocks=[["image", [1, 8, 8]]], marks=0)(torch.rand(4, 64))


def test_blocks_without_indicators_are_present() -> None:
    model = make_model(marks=0).eval()
    x = rows()
    both = make_model().eval()
    assert torch.equal(model(x[:, :69]).logits, both(x).logits)
