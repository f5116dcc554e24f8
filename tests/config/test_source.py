"""Settings of data sources that contradict one another."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from hetero_fl.config.source import SplitConfig


def test_split_leaves_rows_to_train_on() -> None:
    assert SplitConfig(validation=0.25, test=0.5).test == 0.5
    for test in (0.75, 0.8):
        with pytest.raises(ValidationError, match="must leave rows to train on"):
            SplitConfig(validation=0.25, test=test)
