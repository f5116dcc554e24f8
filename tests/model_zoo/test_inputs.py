"""Models of columns, texts, histories of users and blocks, compared with their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model_zoo import SplitModel, create_model, describe
from model_zoo.registry import MODELS
from tests.support.cases import each_case
from tests.support.models import batch, check_vmap, make


def test_wide_and_deep_matches_its_formula() -> None:
    model = make("wide_deep", 2, 4, (), hidden=(8, 3)).eval()
    x = batch(4, n=6)
    t = x.tanh()
    pairs = torch.stack([t[:, i] * t[:, j] for i in range(4) for j in range(i + 1, 4)], 1)
    deep = F.relu(
        F.linear(x, *(model.state_dict()[f"backbone.deep.0.{n}"] for n in ("weight", "bias")))
    )
    deep = F.relu(
        F.linear(deep, *(model.state_dict()[f"backbone.deep.2.{n}"] for n in ("weight", "bias")))
    )
    features = torch.cat([x, pairs, deep], 1)
    assert model.num_features == 4 + 6 + 3
    torch.testing.assert_close(model.forward_features(x), features)
    wide = features[:, :10] @ model.head.weight[:, :10].T  # eq. 3: one sum of both parts
    torch.testing.assert_close(
        model(x), wide + deep @ model.head.weight[:, 10:].T + model.head.bias
    )
    assert make("wide_deep", 2, 4, (), crosses="none").num_features == 4 + 32


def test_tokenizer_gives_one_token_per_column() -> None:
    model = make("ft_transformer", 3, 5, (), width=8, depth=1, heads=2).eval()
    backbone, x = model.backbone, batch(5)
    tokens = torch.stack(
        [x[:, j : j + 1] * backbone.scale[j] + backbone.shift[j] for j in range(5)], 1
    )
    steps = torch.cat([tokens, backbone.read.expand(4, 1, 8)], 1)
    block = backbone.blocks[0]
    steps = steps + block.attention(steps)  # the first block has no norm before its attention
    value, gate = block.up(block.norm2(steps)).chunk(2, -1)
    steps = steps + block.down(value * gate.relu())
    torch.testing.assert_close(model.forward_features(x), backbone.norm(steps[:, -1]).relu())


def test_column_order_does_not_matter() -> None:
    model, x, order = (
        make("ft_transformer", 2, 5, ()).eval(),
        batch(5),
        torch.tensor([3, 1, 4, 0, 2]),
    )
    before = model(x)
    with torch.no_grad():
        for name in ("scale", "shift"):
            getattr(model.backbone, name).data = getattr(model.backbone, name)[order]
    torch.testing.assert_close(model(x[:, order]), before)


def test_clients_with_different_columns_share_all_but_the_tokenizer() -> None:
    few, more = (make("ft_transformer", 2, n, ()).state_dict() for n in (4, 9))
    differ = {n for n in few if few[n].shape != more[n].shape}
    assert differ == {"backbone.scale", "backbone.shift"}


RECOMMENDERS = ("matrix_factorization", "neural_filtering", "gru4rec")
ROWS = torch.tensor([[1, 0, 0, 5, 7], [0, 3, 4, 5, 7], [0, 0, 0, 0, 0]])


def make_recommender(name: str) -> SplitModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(name, 9, 1, (5,), vocabulary=11, width=4).double().eval()


def vectors(model: SplitModel) -> tuple[Tensor, Tensor]:
    tensors = dict(model.named_parameters())
    return tensors["backbone.users.weight"], tensors["backbone.items.weight"]


def test_matrix_factorization_is_the_equation_of_svd_plus_plus() -> None:
    model = make_recommender("matrix_factorization")
    users, items = (table.detach() for table in vectors(model))
    head = model.state_dict()

    scores = model(ROWS).detach()

    histories = ([5, 7], [3, 4, 5, 7], [])
    for row, (user, history) in enumerate(zip((users[1], 0, 0), histories, strict=True)):
        factors = user + sum(items[j] for j in history) * max(len(history), 1) ** -0.5
        for i in range(9):
            expected = head["head.bias"][i] + (head["head.weight"][i] * factors).sum()
            assert float(scores[row, i]) == pytest.approx(float(expected), abs=1e-12)


def test_neural_filtering_reads_the_user_and_the_mean_of_the_items() -> None:
    model = make_recommender("neural_filtering")
    users, items = vectors(model)
    network = model.backbone.network

    inputs = torch.stack(
        [
            torch.cat([users[1], items[[5, 7]].mean(0)]),
            torch.cat([torch.zeros(4), items[[3, 4, 5, 7]].mean(0)]),
            torch.zeros(8),
        ]
    )
    torch.testing.assert_close(model.forward_features(ROWS), network(inputs))


def test_gru4rec_adds_the_user_to_the_last_hidden_state() -> None:
    model = make_recommender("gru4rec")
    users, items = vectors(model)
    network = model.backbone.network
    weights = {name: tensor.chunk(3) for name, tensor in network.named_parameters()}

    def step(y: Tensor, h: Tensor) -> Tensor:
        """One step of a gated recurrent unit with the gates reset, update and new."""
        inputs = [
            w @ y + b for w, b in zip(weights["weight_ih_l0"], weights["bias_ih_l0"], strict=True)
        ]
        states = [
            w @ h + b for w, b in zip(weights["weight_hh_l0"], weights["bias_hh_l0"], strict=True)
        ]
        reset = torch.sigmoid(inputs[0] + states[0])
        update = torch.sigmoid(inputs[1] + states[1])
        new = torch.tanh(inputs[2] + reset * states[2])
        return (1 - update) * new + update * h

    for row, tokens in enumerate(ROWS.tolist()):
        state = torch.zeros(4, dtype=torch.float64)
        for token in tokens[1:]:
            state = step(items[token] * (token > 0), state)
        expected = state + users[tokens[0]] * (tokens[0] > 0)
        torch.testing.assert_close(model.forward_features(ROWS)[row], expected)


def test_tables_of_items_have_equal_shapes_in_all_models() -> None:
    shapes = {
        tuple(
            (name, tuple(tensor.shape))
            for name, tensor in make_recommender(model).named_parameters()
            if name.startswith(("backbone.items.", "head."))
        )
        for model in RECOMMENDERS
    }
    assert shapes == {
        (
            ("backbone.items.weight", (11, 4)),
            ("head.weight", (9, 4)),
            ("head.bias", (9,)),
        )
    }


@each_case("name", RECOMMENDERS)
def test_only_the_vector_of_the_user_is_trained(name: Any) -> None:
    model = make_recommender(name)

    model(ROWS).square().sum().backward()

    users, _ = vectors(model)
    assert users.grad is not None
    assert torch.nonzero(users.grad.abs().sum(1)).flatten().tolist() == [1]


TEXT = [name for name in sorted(MODELS) if "tokens" in MODELS[name].kinds]
WORDS = 40


def make_text_model(name: str, length: int = 7, **options: object) -> SplitModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(name, 5, 1, (length,), vocabulary=WORDS, **options).eval()


def texts(n: int = 4, length: int = 7) -> Tensor:
    return torch.randint(2, WORDS, (n, length), generator=torch.Generator().manual_seed(1))


@each_case("name", TEXT)
def test_training_step_changes_every_parameter(name: Any) -> None:
    model = make_text_model(name).train()
    x = texts()
    out = model(x)
    assert out.shape == (4, 5)
    assert model.forward_features(x).shape == (4, model.num_features)
    assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"backbone", "head"}
    F.cross_entropy(out, torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert make_text_model(name, feature_dim=12).forward_features(x).shape == (4, 12)


def test_outputs_do_not_depend_on_padding(subtests: pytest.Subtests) -> None:
    x = texts()
    x[:, :3] = 0
    for name in TEXT:
        with subtests.test(name=name):
            model = make_text_model(name)
            for place in (3, 6):
                other = x.clone()
                other[:, place] = (other[:, place] - 2 + 1) % (WORDS - 2) + 2
                assert not torch.allclose(model(x), model(other), atol=1e-5), place
            # empty text
            assert torch.isfinite(model(torch.zeros(2, 7, dtype=torch.int64))).all()


def test_padding_of_the_text_transformer_is_masked() -> None:
    x = texts()
    x[:, :3] = 0
    model = make_text_model("text_transformer")
    with torch.no_grad():
        before = model(x)
        model.backbone.embedding.weight[0] += 1.0
        model.backbone.positions[:, :3] += 1.0
        assert torch.equal(model(x), before)


def test_text_cnn_is_causal() -> None:
    backbone = make_text_model("text_cnn").backbone
    steps = backbone.embedding(texts()).transpose(1, 2)
    later = steps.clone()
    later[..., 4:] += 1.0
    assert torch.equal(backbone.layers(steps)[..., :4], backbone.layers(later)[..., :4])
    assert not torch.allclose(backbone.layers(steps)[..., 4:], backbone.layers(later)[..., 4:])


@each_case("name", set(TEXT) - {"text_gru", "gru4rec"})
def test_vmap_in_training_equals_one_model_after_another(name: Any) -> None:
    x = texts(12, 6).reshape(3, 4, 6)
    x[..., :2] = 0
    check_vmap([create_model(name, 3, 1, (6,), vocabulary=WORDS) for _ in range(3)], x)


def test_costs_of_text_models() -> None:
    about = describe("text_gru", 5, 1, (7,), vocabulary=WORDS, embedding=8, hidden=16)
    assert about.parameters == WORDS * 8 + 3 * 16 * (8 + 16 + 2) + 16 * 5 + 5
    assert about.forward_flops == 2 * (7 * 3 * 16 * (8 + 16) + 16 * 5)


IMAGE_AND_GENES = [["image", [1, 8, 8]], ["genes", [5]]]


def make_multimodal(blocks: Any = IMAGE_AND_GENES, marks: int = 2, **options: Any) -> SplitModel:
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
    model = make_multimodal()
    parts = {n.split(".")[1] for n, _ in model.named_parameters() if n.startswith("backbone.")}
    assert parts == {"image", "genes", "fusion"}
    image = {n: p.shape for n, p in model.named_parameters() if n.startswith("backbone.image.")}
    single = create_model("multimodal", 3, 1, 8)  # an image-only model of the same widths
    assert image == {
        n: p.shape for n, p in single.named_parameters() if n.startswith("backbone.image.")
    }
    assert image.keys() != set() and single(torch.rand(2, 1, 8, 8)).shape == (2, 3)


@each_case("fusion", ("concat", "gated"))
def test_values_of_an_absent_block_are_ignored(fusion: str) -> None:
    model = make_multimodal(fusion=fusion).eval()
    x = rows(genes=False)
    other = x.clone()
    other[:, 64:69] = 7.0
    assert torch.equal(model(x), model(other))
    filled = x.clone()
    filled[:, 70] = 0
    assert not torch.allclose(model(x), model(filled))
    zeros = filled.clone()
    zeros[:, 64:69] = 0  # an absent block differs from zeros
    assert not torch.allclose(model(x), model(zeros))
    nothing = rows(genes=False, image=False)
    assert torch.allclose(model(nothing), model(nothing)[:1].expand(6, 3))


@each_case("image", ("cnn", "resnet", "vit"))
def test_image_branch_has_the_selected_network(image: str) -> None:
    blocks = [["frame", [3, 12, 20]], ["state", [3]]]
    model = make_multimodal(blocks, image=image, image_width=4, drop=0.0).eval()
    x = torch.rand(5, 725)
    x[:, 723:] = 0

    assert model(x).shape == (5, 3)
    x[:, :720] = x[:, :720].flip(1)
    assert model(x).std(0).min() > 0
    # Clients that share the branch do not share running statistics.
    assert not list(model.buffers())
    single = create_model(
        "multimodal", 3, 3, (12, 20), blocks=blocks[:1], image=image, image_width=4
    )
    frame = {n for n, _ in model.named_parameters() if n.startswith("backbone.frame.")}
    assert frame == {n for n, _ in single.named_parameters() if n.startswith("backbone.frame.")}


def test_absent_block_embedding_is_learned() -> None:
    model = make_multimodal(drop=0.0)
    model(rows(genes=False)).sum().backward()
    grad = model.backbone.get_parameter("fusion.absent").grad
    assert grad is not None and not grad[0].any() and grad[1].any()
    genes = model.backbone.get_parameter("genes.0.weight").grad
    assert genes is None or not genes.any()


def test_blocks_are_dropped_in_training_but_never_all() -> None:
    model = make_multimodal(drop=0.5, dropout=0.0)
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
    make_multimodal(drop=0.9, blocks=[["image", [1, 8, 8]]], marks=0)(torch.rand(4, 64))


def test_blocks_without_indicators_are_present() -> None:
    model = make_multimodal(marks=0).eval()
    x = rows()
    both = make_multimodal().eval()
    assert torch.equal(model(x[:, :69]), both(x))
