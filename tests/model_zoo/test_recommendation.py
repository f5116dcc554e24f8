"""Models of recommendation: equations, users, padding and tensors of equal shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model_zoo import SplitModel, create_model
from tests.support.cases import each_case

MODELS = ("matrix_factorization", "neural_filtering", "gru4rec")
ROWS = torch.tensor([[1, 0, 0, 5, 7], [0, 3, 4, 5, 7], [0, 0, 0, 0, 0]])


def make(name: str) -> SplitModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(name, 9, 1, (5,), vocabulary=11, width=4).double().eval()


def vectors(model: SplitModel) -> tuple[Tensor, Tensor]:
    tensors = dict(model.named_parameters())
    return tensors["backbone.users.weight"], tensors["backbone.items.weight"]


def test_matrix_factorization_is_the_equation_of_svd_plus_plus() -> None:
    model = make("matrix_factorization")
    users, items = (table.detach() for table in vectors(model))
    head = model.state_dict()

    scores = model(ROWS).logits.detach()

    histories = ([5, 7], [3, 4, 5, 7], [])
    for row, (user, history) in enumerate(zip((users[1], 0, 0), histories, strict=True)):
        factors = user + sum(items[j] for j in history) * max(len(history), 1) ** -0.5
        for i in range(9):
            expected = head["head.bias"][i] + (head["head.weight"][i] * factors).sum()
            assert float(scores[row, i]) == pytest.approx(float(expected), abs=1e-12)


def test_neural_filtering_reads_the_user_and_the_mean_of_the_items() -> None:
    model = make("neural_filtering")
    users, items = vectors(model)
    network = model.backbone.network

    inputs = torch.stack(
        [
            torch.cat([users[1], items[[5, 7]].mean(0)]),
            torch.cat([torch.zeros(4), items[[3, 4, 5, 7]].mean(0)]),
            torch.zeros(8),
        ]
    )
    torch.testing.assert_close(model(ROWS).features, network(inputs))


def test_gru4rec_adds_the_user_to_the_last_hidden_state() -> None:
    model = make("gru4rec")
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
        torch.testing.assert_close(model(ROWS).features[row], expected)


def test_tables_of_items_have_equal_shapes_in_all_models() -> None:
    shapes = {
        tuple(
            (name, tuple(tensor.shape))
            for name, tensor in make(model).named_parameters()
            if name.startswith(("backbone.items.", "head."))
        )
        for model in MODELS
    }
    assert shapes == {
        (
            ("backbone.items.weight", (11, 4)),
            ("head.weight", (9, 4)),
            ("head.bias", (9,)),
        )
    }


@each_case("name", MODELS)
def test_only_the_vector_of_the_user_is_trained(name: Any) -> None:
    model = make(name)

    model(ROWS).logits.square().sum().backward()

    users, _ = vectors(model)
    assert users.grad is not None
    assert torch.nonzero(users.grad.abs().sum(1)).flatten().tolist() == [1]
