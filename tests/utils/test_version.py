"""A user's module that imports a name which has moved gets one line that names the new one."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from hetero_fl.utils.errors import UserError
from hetero_fl.utils.registry import imported
from hetero_fl.utils.version import MOVED_NAMES


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (
            "from hetero_fl.plan import Predict",
            "hetero_fl.plan is now hetero_fl.core.plan",
        ),
        (
            "from hetero_fl.channel.attacks import Attack",
            "hetero_fl.channel.attacks is now hetero_fl.robustness.attacks",
        ),
        (
            "from hetero_fl.config import load_config",
            "hetero_fl.config.load_config is now hetero_fl.load_config",
        ),
    ],
)
def test_import_of_a_moved_name_names_the_new_one(
    line: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "older_method.py").write_text(line + "\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(UserError) as error:
        imported("python:older_method:Method", "algorithm.name", object)

    assert hint in str(error.value)
    assert "\n" not in str(error.value)


def test_moved_names_are_gone_and_their_new_places_exist() -> None:
    for old, new in MOVED_NAMES.items():
        with pytest.raises((ImportError, AttributeError)):
            _resolve(old)
        _resolve(new)


def _resolve(name: str) -> object:
    """Return the module or attribute of that dotted name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)
