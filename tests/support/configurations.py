"""Configurations in the format of the tutorial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "configs" / "cifar10_conf.json"


def tutorial(**changes: Any) -> dict[str, Any]:
    """Return the keys of the tutorial's file with changes; None removes a key."""
    keys = json.loads(FILE.read_text(encoding="utf-8"))
    return {key: value for key, value in {**keys, **changes}.items() if value is not None}
