"""The examples in docstrings are run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

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
PACKAGES = {
    package: list(names)
    for package, names in groupby(MODULES, lambda name: ".".join(name.split(".")[:2]))
}
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


@pytest.mark.parametrize("package", PACKAGES)
def test_examples_of_package_run(
    package: str, subtests: pytest.Subtests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Examples register sources and partitions, which later tests in this process must not see.
    for known in (registry.sources, data.register_partition):
        monkeypatch.setattr(known, "_known", dict(known._known))
    for name in PACKAGES[package]:
        with subtests.test(module=name):
            folder = tmp_path / name
            folder.mkdir()
            monkeypatch.chdir(folder)
            # It names the file and the line of each failed example.
            report: list[str] = []
            runner = doctest.DocTestRunner(optionflags=OPTIONS)

            for example in doctest.DocTestFinder().find(importlib.import_module(name)):
                runner.run(example, out=report.append)

            assert runner.tries > 0
            assert runner.failures == 0, "".join(report)


def test_public_names_have_examples(subtests: pytest.Subtests) -> None:
    for name, found in public_objects():
        with subtests.test(name=name):
            assert ">>>" in (inspect.getdoc(found) or "")
