"""The examples in docstrings are run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import hetero_fl
import model_zoo
from hetero_fl import algorithms, data
from hetero_fl.algorithms import register_algorithm
from hetero_fl.data import registry

ROOT = Path(__file__).parents[2]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("hetero_fl", "model_zoo")
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL


def public_objects() -> Iterator[tuple[str, object]]:
    """Yield the public classes and functions with their names."""
    for package in (hetero_fl, algorithms, data, model_zoo):
        for name in package.__all__:
            found = getattr(package, name)
            is_code = inspect.isclass(found) or inspect.isfunction(found)
            if is_code and not issubclass(found if inspect.isclass(found) else object, Exception):
                yield f"{package.__name__}.{name}", found
    for name in register_algorithm:
        if register_algorithm[name].__module__.startswith("hetero_fl."):
            yield f"algorithm {name}", register_algorithm[name]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_module_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # An example registers a data source, which later tests in this process must not see.
    monkeypatch.setattr(registry, "_sources", dict(registry._sources))
    module: ModuleType = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=OPTIONS)

    assert result.attempted > 0
    assert result.failed == 0


PUBLIC = dict(public_objects())


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_example(name: str) -> None:
    assert ">>>" in (inspect.getdoc(PUBLIC[name]) or "")
