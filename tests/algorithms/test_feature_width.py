"""What methods that send features ask of models: a width in common, and features that are not the example itself."""

from __future__ import annotations

import pytest

from hetero_fl.utils.errors import UserError
from tests.helpers.small_federations import config, rounds_of

SENDING = ["fedgkt", "fedproto", "fedtgp", "fedgh"]


@pytest.mark.parametrize("method", SENDING)
def test_a_model_whose_features_are_the_example_sends_none(method: str) -> None:
    with pytest.raises(UserError, match=r"site_1: model: the features of 'linear' are its inputs"):
        rounds_of(config(method, "linear"), held=0)
    wide = [{"name": "mlp", "feature_dim": 64}] * 2
    # as wide as a digit has pixels
    with pytest.raises(UserError, match="site_3: model: the features of"):
        rounds_of(config(method, [*wide, "linear"]), held=0)


@pytest.mark.parametrize("method", SENDING)
def test_its_projection_to_another_width_may_leave(method: str) -> None:
    rounds = rounds_of(
        config(method, "linear", algorithm={"name": method, "feature_dim": 8}, rounds=1)
    )
    assert rounds.completed == 1


def test_fedgen_sends_no_features() -> None:
    assert rounds_of(config("fedgen", "linear", rounds=1)).completed == 1
