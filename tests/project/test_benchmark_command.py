"""`python -m benchmarks` lists the benchmarks and runs one by name."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import (
    FOLDER,
    GROUPS,
    find_benchmarks,
    main,
    module_name,
    summary,
)


def test_command_lists_benchmarks_with_summaries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks"])

    main()

    lines = capsys.readouterr().out.splitlines()
    for name, path in find_benchmarks().items():
        assert [line.split(maxsplit=1)[1] for line in lines if line.startswith(f"  {name} ")] == [
            summary(path)
        ]


# Warnings of Flower's dependencies.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_each_benchmark_can_be_imported() -> None:
    for path in find_benchmarks().values():
        importlib.import_module(module_name(path))


def test_command_refuses_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "nothing"])

    with pytest.raises(SystemExit, match="no benchmark 'nothing'; choose from "):
        main()


def test_benchmark_names_are_unique() -> None:
    files = [
        path
        for group in GROUPS
        for path in (FOLDER / group).glob("*.py")
        if path.stem != "__init__"
    ]

    assert len({path.stem for path in files}) == len(files)


def test_readme_names_all_benchmarks() -> None:
    text = (Path(FOLDER) / "README.md").read_text(encoding="utf-8")
    table = text.partition("| command |")[2].partition("\n\n")[0]

    named = re.findall(r"^\| `(\w+)", table, re.MULTILINE)

    assert sorted(named) == sorted(find_benchmarks())
