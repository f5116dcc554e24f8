"""What tests of federations are handed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from hetero_fl.runtime.site import Site


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often each client has trained in each round, at whatever node."""
    counts: Counter[tuple[str, int]] = Counter()
    train = Site._train

    def counted(self: Site, broadcasts: Any, requests: Any) -> Any:
        counts.update((client, requests[client].round) for client in broadcasts)
        return train(self, broadcasts, requests)

    monkeypatch.setattr(Site, "_train", counted)
    return counts
