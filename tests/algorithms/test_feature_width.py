"""Requirements of methods that send features: a common width, and a backbone."""

from __future__ import annotations

import pytest

from hetero_fl.utils.errors import UserError
from tests.support.federations import config, rounds_of

SENDING = ["fedgkt", "fedproto", "fedtgp", "fedgh"]


@pytest.mark.parametrize("method", SENDING)
def test_model_without_backbone_sends_no_features(method: str) -> None:
    with pytest.raises(UserError, match=r"site_1': model: the features of 'linear' are its inputs"):
        rounds_of(config(method, "linear"), num_rounds=0)
    wide = [{"name": "mlp", "feature_dim": 64}] * 2
    # As many features as a digit has pixels.
    with pytest.raises(UserError, match="site_3': model: the features of"):
        rounds_of(config(method, [*wide, "linear"]), num_rounds=0)


@pytest.mark.parametrize("method", SENDING)
def test_projected_features_may_be_sent(method: str) -> None:
    rounds = rounds_of(
        config(method, "linear", algorithm={"name": method, "feature_dim": 8}, rounds=1)
    )
    assert rounds.completed == 1


def test_fedgen_sends_no_features() -> None:
    assert rounds_of(config("fedgen", "linear", rounds=1)).completed == 1
