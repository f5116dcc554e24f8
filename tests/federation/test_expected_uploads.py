"""Expected uploads: the server knows their form without allocating their rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hetero_fl.core.payload import Payload
from hetero_fl.experiment.preparation import prepare
from hetero_fl.federation.dry_run import ExpectedUploads
from hetero_fl.utils.errors import UserError
from tests.support.deployments import small


@pytest.fixture(scope="module")
def fedgkt() -> Any:
    """Return FedGKT, whose clients upload features of their training rows."""
    return prepare(small("fedgkt", "cnn_gn_small", rounds=1))


def test_expected_rows_allocate_no_memory(fedgkt: Any) -> None:
    expectations = ExpectedUploads(fedgkt.method, fedgkt.federation)
    client_info = replace(fedgkt.federation.client_infos["site_1"], num_rows=2**40)

    items = expectations.expected_items(client_info, Payload({}), 0)

    assert {name: len(item.values) for name, item in items.items()} == dict.fromkeys(items, 2**40)
    assert all(item.values.untyped_storage().nbytes() <= 8 for item in items.values())


def test_rows_without_memory_are_refused(fedgkt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*given: Any) -> None:
        torch.empty(2**50)

    expectations = ExpectedUploads(fedgkt.method, fedgkt.federation)
    client_info = replace(fedgkt.federation.client_infos["site_1"], num_rows=2**31)
    monkeypatch.setattr(expectations, "dry_run_upload", allocate)

    with pytest.raises(
        UserError, match="site_1: not enough memory for an upload of 2,147,483,648 rows"
    ):
        expectations.expected_items(client_info, Payload({}), 0)
