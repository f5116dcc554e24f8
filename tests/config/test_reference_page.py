"""The generated reference docs/configuration.md."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hetero_fl.config import Config
from hetero_fl.config.base import OptimizerConfig

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "describe_config.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("describe_config", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(script: ModuleType) -> None:
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run `make docs`"
    assert script.INDEX.read_text(encoding="utf-8") == script.methods_index(), "run `make docs`"


def test_check_reports_an_outdated_page(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "PAGE", tmp_path / "configuration.md")
    monkeypatch.setattr(sys, "argv", ["describe_config.py", "--check"])
    assert script.main() == 1
    script.PAGE.write_text(script.page() + "stale", encoding="utf-8")
    assert script.main() == 1
    monkeypatch.setattr(sys, "argv", ["describe_config.py"])
    assert script.main() == 0
    monkeypatch.setattr(sys, "argv", ["describe_config.py", "--check"])
    assert script.main() == 0


def test_page_contains_every_section_and_key(script: ModuleType) -> None:
    page = script.page()
    for name in Config.model_fields:
        assert f"| `{name}` |" in page
    for name in OptimizerConfig.model_fields:
        assert f"| `{name}` |" in page.split("## `clients.defaults.optimizer`")[1].split("\n## ")[0]
    assert "| `lr` | number > 0 | `0.001` |" in page
    assert "| `name` | `sgd`, `adam`, `adamw` | `adam` |" in page
    assert "### `hybrid`" in page and "| `heads` | `take`, `keep` | `take` |" in page


def test_registered_user_method_does_not_change_the_page(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hetero_fl.algorithms import Algorithm, register_algorithm

    before = script.page()
    monkeypatch.setattr(register_algorithm, "_known", dict(register_algorithm._known))

    @register_algorithm("user_method")
    class UserMethod(Algorithm):
        setting: int = 1

    assert script.page() == before


@pytest.mark.slow
def test_script_runs_from_another_folder() -> None:
    subprocess.run([sys.executable, str(SCRIPT), "--check"], check=True, cwd="/", timeout=300)


def test_every_key_has_a_description(script: ModuleType) -> None:
    rows = [line for line in script.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert not [row for row in rows if row.endswith("|  |")]
