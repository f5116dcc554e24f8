"""Run the code blocks of README.md and docs/ in the order of each page, and parse its commands.

A block whose first line is a comment with a file name is written to that file. YAML blocks have to
load as configurations, `server.yaml` and `site.yaml` as files of a server and a site.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.__main__ import find_benchmarks
from hetero_fl import prepare
from hetero_fl.algorithms import Algorithm, Items, register_algorithm
from hetero_fl.algorithms.requirements import describe_needs, format_needs
from hetero_fl.cli import main
from hetero_fl.cli.commands import APP
from hetero_fl.config.data import registered_partition_kinds
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.data.partition import registry as partitions
from hetero_fl.deployment.config import load_server_config, load_site_config
from hetero_fl.experiment.configuration import load_config
from model_zoo import list_models

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONG = {  # run elsewhere: here they are parsed
    "runs/xray_lenet",
    "configs/medical_hetero.yaml",
    "configs/medical_private.yaml",
    "configs/medical_multimodal.yaml",
    "configs/traffic_hetero.yaml",
    "configs/finance_hetero.yaml",
    "configs/text_hetero.yaml",
    "configs/sensors_hetero.yaml",
    "configs/speech_hetero.yaml",
    "configs/recommendation_hetero.yaml",
    "configs/driving_hetero.yaml",
}
OF_A_FEDERATION: dict[str, Callable[[Any], object]] = {
    "server.yaml": load_server_config,
    "site.yaml": load_site_config,
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> Iterator[tuple[str, str, str | None]]:
    """(language, text, file name if it is a file) of each block."""
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        named = re.match(r"# ([\w/]+\.(?:py|yaml))\n", text)
        yield language, text, named and named[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with the configurations; plots and reports are not written."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("hetero_fl.experiment.session.write_presentation", lambda *_: None)
    # Undo registrations of the page.
    monkeypatch.setattr(register_algorithm, "_known", dict(register_algorithm._known))
    monkeypatch.setattr(partitions, "_partitions", dict(partitions._partitions))
    kinds = set(registered_partition_kinds)
    before = set(sys.modules)
    yield tmp_path
    registered_partition_kinds.intersection_update(kinds)
    # Another page may use the same module names.
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_block_runs(page: Path, folder: Path) -> None:
    names: dict[str, object] = {}
    for language, text, file in blocks(page):
        if file is not None:
            (folder / file).write_text(text, encoding="utf-8")
        if language == "python" and file is None:
            exec(compile(text, f"{page.name}", "exec"), names)
        elif language == "yaml":
            load = OF_A_FEDERATION.get(file or "", partial(load_config, allow_code=True))
            load(file or yaml.safe_load(text))
        elif language == "console":
            for line in commands_in(text):
                run_or_parse(line)


@pytest.mark.slow
def test_each_block_of_own_data_runs_alone(folder: Path) -> None:
    for language, text, _ in blocks(ROOT / "docs" / "how_to" / "own_data.md"):
        if language == "python":
            exec(compile(text, "own_data.md", "exec"), {})


def commands_in(text: str) -> Iterator[str]:
    """Yield the commands of a console block, without comments and with continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        command = line.split("  #")[0].strip()
        if command and not command.startswith("#"):
            yield command


def run_or_parse(line: str) -> None:
    """Run short training commands and `--check`; parse all other commands."""
    first, *rest = shlex.split(line)
    if first == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{rest[0]}:", makefile, re.MULTILINE), line
        return
    if first in ("git", "cd", "pip", ".ci/run", "tensorboard", "ray", "wandb", "mlflow"):
        return
    if first == "torchrun":
        # Its own options precede the command.
        script = next(i for i, word in enumerate(rest) if word.endswith(".py"))
        first, rest = "python", rest[script:]
    if first == "python":
        if rest[0] == "-m":
            assert rest[1] in ("model_zoo", "pytest", "benchmarks", "hetero_fl"), line
            if rest[1] == "benchmarks" and len(rest) > 2:
                assert rest[2] in find_benchmarks(), line
            return
        assert (ROOT / rest[0]).is_file(), line
        if rest[0].startswith(("examples/", "benchmarks/")):
            return
        command = Path(rest.pop(0)).stem
    else:
        assert first == "hetero-fl", line
        command = rest.pop(0)
    needs_data = any(word.startswith("data.path=") for word in rest)
    if command == "train" and ("--check" in rest or not (needs_data or LONG & set(rest))):
        assert main(rest, command) == 0, line
    elif command in APP.commands:
        APP.commands[command].make_context(command, rest)
    else:
        assert (ROOT / "scripts" / f"{command}.py").is_file(), line


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda p: p.stem)
def test_page_starts_with_its_title(page: Path) -> None:
    assert page.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            file, _, anchor = target.partition("#")
            assert (page.parent / file).exists(), target
            if anchor:
                assert anchor in anchors(page.parent / file), target
        elif target.startswith("#"):
            assert target[1:] in anchors(page), target


def test_medical_scenario_states_the_rows_of_its_hospitals() -> None:
    page = (ROOT / "docs/scenarios/medical_hetero.md").read_text(encoding="utf-8")
    data = prepare(ROOT / "configs/medical_hetero.yaml").data

    rows = {client: data.n_rows(client, "train") for client in data.client_ids}

    stated = re.findall(r"(\d+) and (\d+)", " ".join(page.split()))
    for group in ("clinic", "university", "county"):
        assert (str(rows[f"{group}_1"]), str(rows[f"{group}_2"])) in stated


def test_index_links_to_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    targets = re.findall(r"\]\(([^)#\s]+\.md)[)#]", index.read_text(encoding="utf-8"))
    linked = {(index.parent / target).resolve() for target in targets}
    missing = set((ROOT / "docs").rglob("*.md")) - linked - {index}

    assert not missing, f"docs/README.md has no link to {sorted(missing)}"


def test_own_model_lists_each_model_of_the_zoo() -> None:
    text = (ROOT / "docs" / "how_to" / "own_model.md").read_text(encoding="utf-8")
    table = text.partition("| family | models |")[2].partition("\n\n")[0]

    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(list_models())


def test_architecture_lists_each_package_once() -> None:
    text = (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    packages = re.findall(r"^\| `(hetero_fl/\w*/?)`", text, re.MULTILINE)

    assert len(packages) > 6
    assert len(packages) == len(set(packages))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page on GitHub: its headings and its elements `<a id=...>`."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    targets = re.findall(r'<a id="([^"]+)">', text)
    return {*targets, *(re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings)}


INDEX = ROOT / "docs" / "reference" / "methods.md"
BUILT_IN = [
    name
    for name in register_algorithm
    if register_algorithm[name].__module__.startswith("hetero_fl.")
]


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_method_has_one_section_with_its_settings(name: str) -> None:
    pages = sorted((INDEX.parent / "methods").glob("*.md"))
    heading = re.compile(rf"^## `{name}`\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)

    (section,) = [text for page in pages for text in heading.findall(page.read_text("utf-8"))]

    for word in ("- **Needs:**", "- **Evaluated:**", "- **Module:**"):
        assert word in section, word
    for key in register_algorithm[name].model_fields:
        assert f"| `{key}` |" in section, key


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - {"centralized", "ensemble"}))
def test_each_broadcast_item_is_in_the_table_of_its_method(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: set[str] = set()
    method = register_algorithm[name]
    broadcast = method.broadcast

    def record(self: Algorithm, server: Participant, recipient: ClientInfo) -> Items:
        items = broadcast(self, server, recipient)
        sent.update(items)
        return items

    monkeypatch.setattr(method, "broadcast", record)
    groups = "[{name: a, count: 2, model: mlp}, {name: b, model: {name: mlp, hidden: [32]}}]"
    overrides = [f"algorithm.name={name}", f"clients.groups={groups}", "data.proxy.size=100"]
    trainer = prepare(str(ROOT / "configs/digits_quickstart.yaml"), overrides).make_trainer()
    for _ in range(2):
        trainer.run_round()
    trainer.evaluate()
    heading = re.compile(rf"^## `{name}`\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    pages = (INDEX.parent / "methods").glob("*.md")
    (section,) = [text for page in pages for text in heading.findall(page.read_text("utf-8"))]

    assert sent == set(re.findall(r"^\| `(\w+)` \| down \|", section, re.MULTILINE))


@pytest.mark.parametrize("name", BUILT_IN)
def test_index_links_to_each_method(name: str) -> None:
    ((page, needs),) = re.findall(
        rf"^\| \[`{name}`\]\((methods/\w+\.md)#{name}\) \|.*\| (.*?) \|$",
        INDEX.read_text("utf-8"),
        re.M,
    )
    assert f"## `{name}`" in (INDEX.parent / page).read_text("utf-8")
    assert needs == (format_needs(describe_needs(register_algorithm[name]())) or "–")


def test_every_scenario_is_in_the_gallery() -> None:
    gallery = (ROOT / "docs" / "scenarios" / "README.md").read_text().partition("## Gallery")[2]
    for page in (ROOT / "docs" / "scenarios").glob("[a-z]*.md"):
        assert f"]({page.name})\n" in gallery
