"""Optional packages that are not installed give one line."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from unittest.mock import Mock

import pytest

from hetero_fl import Federation, compare
from hetero_fl.cli import main
from hetero_fl.config.data import SourceConfig
from hetero_fl.data import load_source
from hetero_fl.reporting.run import history_frame
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.extras import EXTRAS, check_extra, describe_missing_package

ROOT = Path(__file__).parents[2]
NO_SCENARIOS = {"README", "cifar10"}
"""Pages that describe no scenario, or one whose data are downloaded."""


SCENARIOS = sorted({page.stem for page in (ROOT / "docs/scenarios").glob("*.md")} - NO_SCENARIOS)
"""Scenarios whose data come with the package."""


def hide_packages(monkeypatch: pytest.MonkeyPatch, hidden: Collection[str]) -> None:
    """Make packages look as if they are not installed."""
    for name in list(sys.modules):
        loads_hidden = name.startswith("hetero_fl.data.sources.tables.")
        if name.partition(".")[0] in hidden or loads_hidden:
            monkeypatch.delitem(sys.modules, name)
    for name in hidden:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(
        "hetero_fl.utils.extras.find_spec", lambda name: None if name in hidden else name
    )


@pytest.fixture
def without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pandas and scipy look like packages that are not installed."""
    hide_packages(monkeypatch, ("pandas", "scipy"))


@pytest.mark.usefixtures("without_extras")
def test_missing_package_names_the_extra(tmp_path: Path, subtests: pytest.Subtests) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("age,label\n1,0\n", encoding="utf-8")
    table = SourceConfig(name="table", path=str(file), label="label")
    digits = {"data": {"name": "digits"}}

    for message, use in (
        (
            r"^data\.name: table: pandas .*'hetero_fl\[tables\]'$",
            lambda: load_source(table, tmp_path),
        ),
        (
            r"^compare needs pandas.*'hetero_fl\[tables\]'$",
            lambda: compare(digits, ["local"], out=tmp_path / "out"),
        ),
        (r"^Run\.history needs pandas", lambda: history_frame([])),
    ):
        with subtests.test(message=message), pytest.raises(UserError, match=message):
            use()
    assert not (tmp_path / "out").exists(), "compare stops before its runs"


@pytest.mark.slow
def test_scenarios_need_no_extra(
    monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    hide_packages(monkeypatch, EXTRAS)

    assert len(SCENARIOS) >= 8
    for name in SCENARIOS:
        with subtests.test(name=name):
            Federation.from_config(ROOT / "configs" / f"{name}.yaml").prepare()


def test_command_reports_a_missing_package_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "hetero_fl.cli.printing.print_methods",
        Mock(side_effect=ModuleNotFoundError("No module named 'scipy'", name="scipy.stats")),
    )

    assert main(["methods"]) == 2
    line = "error: scipy is not installed; run pip install 'hetero_fl[tables]'\n"
    assert capsys.readouterr().err == line


def test_installed_packages_and_other_modules_are_not_described() -> None:
    check_extra("tables", ["numpy"], "anything")
    assert describe_missing_package(ModuleNotFoundError(name="own_module")) is None


def test_every_extra_of_the_table_exists() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    for package, extra in EXTRAS.items():
        required = project["optional-dependencies"][extra]
        assert any(line.replace("-", "_").startswith(package) for line in required), package
