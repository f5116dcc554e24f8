"""The generated pages of docs/reference."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel

from hetero_fl.cli.commands import APP
from hetero_fl.config import Config
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.deployment.config import AllowsConfig, SiteConfig
from tests.support.cases import each_case

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "describe_reference.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("describe_reference", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(script: ModuleType) -> dict[str, str]:
    return dict(script.all_pages())


def test_pages_are_up_to_date(script: ModuleType, pages: dict[str, str]) -> None:
    for name, text in pages.items():
        page = script.REFERENCE / name
        assert page.read_text(encoding="utf-8") == text, f"{name} is outdated; run `make docs`"


def test_no_page_of_a_removed_family_remains(script: ModuleType) -> None:
    pages = {path.name for path in (script.REFERENCE / "methods").iterdir()}

    assert pages == {f"{family.page}.md" for family in script.FAMILIES}


def test_configuration_contains_every_section_and_key(pages: dict[str, str]) -> None:
    configuration = pages["configuration.md"]
    for name in Config.model_fields:
        assert f"| `{name}` |" in configuration
    section = configuration.partition("## `clients.defaults.optimizer`")[2].partition("\n## ")[0]
    for name in OptimizerConfig.model_fields:
        assert f"| `{name}` |" in section
    assert "| `lr` | number > 0 | `0.001` |" in configuration
    assert "| `name` | `sgd`, `adam`, `adamw`, `python:…` | `adam` |" in configuration


def test_every_setting_of_configuration_and_methods_has_a_description(
    pages: dict[str, str],
) -> None:
    text = "\n".join(page for name, page in pages.items() if "methods/" in name)
    text += pages["configuration.md"] + pages["site_file.md"]
    rows = [line for line in text.splitlines() if line[:3] == "| `"]

    assert len(rows) > 300
    assert not [row for row in rows if row.endswith("|  |")]


@each_case("model", [SiteConfig, AllowsConfig])
def test_site_file_page_contains_every_key(script: ModuleType, model: type[BaseModel]) -> None:
    title = {SiteConfig: "Keys"}.get(model, "`allows`")
    section = script.site_file_page().partition(f"## {title}\n")[2].partition("\n## ")[0]

    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(model.model_fields)


def test_command_line_page_contains_the_help_of_each_command(script: ModuleType) -> None:
    page = script.command_line_page()
    # The options of every command are described once.
    shared = {"-q", "--quiet", "-v", "--verbose", "--version"}
    assert all(f"`{option}`" in page for option in shared if option.startswith("--"))
    for name, command in APP.commands.items():
        section = page.split(f"## `hetero-fl {name}`\n")[1].split("\n## ")[0]
        for option in {name for parameter in command.params for name in parameter.opts} - shared:
            assert option[0] != "-" or option in section, option
        assert f"Usage: hetero-fl {name} " in section


def test_examples_of_the_command_line_page_are_valid(script: ModuleType) -> None:
    page = script.command_line_page().replace("\\\n", " ")
    lines = re.findall(r"^ +(hetero-fl .*)$", page, re.MULTILINE)
    commands = [line.partition(" && ")[0].split("   #")[0].split() for line in lines]

    assert {name for _program, name, *_ in commands} == APP.commands.keys()
    for _program, name, *arguments in commands:
        APP.commands[name].make_context(name, arguments)


@pytest.mark.slow
def test_script_runs_from_another_folder() -> None:
    subprocess.run([sys.executable, str(SCRIPT), "--check"], check=True, cwd="/", timeout=300)
