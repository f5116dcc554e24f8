"""Run the code blocks of README.md and docs/ in the order of each page, and parse its commands.

A block whose first line is a comment with a file name is written to that file. YAML blocks have to
load as configurations, `site.yaml` as the file of a site.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from hetero_fl.config.load import read_config_file
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.data import register_partition
from hetero_fl.deployment.config import load_site_config
from hetero_fl.experiment.configuration import load_config
from model_zoo import list_models

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = sorted({str(page.parent.relative_to(ROOT)) for page in PAGES})
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
    "site.yaml": load_site_config,
    "nodes.yaml": lambda name: read_config_file(Path(name)),
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> Iterator[tuple[str, str, str | None]]:
    """(language, text, file name if it is a file) of each block."""
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        named = re.match(r"# ([\w/]+\.(?:py|yaml))\n", text)
        yield language, text, named and named[1]


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Change to a folder with the configurations; plots and reports are not written."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    kinds = set(registered_partition_kinds)
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setattr("hetero_fl.experiment.session.write_presentation", lambda *_: None)
        # Undo registrations of the page.
        patch.setattr(register_algorithm, "_known", dict(register_algorithm._known))
        patch.setattr(register_partition, "_known", dict(register_partition._known))
        yield
    registered_partition_kinds.intersection_update(kinds)
    # Another page may use the same module names.
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_block_runs(folder: str, subtests: pytest.Subtests, tmp_path: Path) -> None:
    for page in PAGES:
        if page.parent == ROOT / folder:
            with subtests.test(page=page.name), new_folder(tmp_path / page.stem):
                run_blocks(page)


def run_blocks(page: Path) -> None:
    """Run, load or parse the blocks of a page in its order."""
    names: dict[str, object] = {}
    for language, text, file in blocks(page):
        if file is not None:
            Path(file).write_text(text, encoding="utf-8")
        if language == "python" and file is None:
            exec(compile(text, f"{page.name}", "exec"), names)
        elif language == "yaml":
            load = OF_A_FEDERATION.get(file or "", partial(load_config, allow_code=True))
            load(file or yaml.safe_load(text))
        elif language == "console":
            for line in commands_in(text):
                run_or_parse(line)


@pytest.mark.slow
def test_each_block_of_own_data_runs_alone(tmp_path: Path) -> None:
    with new_folder(tmp_path / "own_data"):
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


def test_pages_have_titles_and_links_that_exist(subtests: pytest.Subtests) -> None:
    others = [ROOT / name for name in ("CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md")]
    for page in [*PAGES, *others, ROOT / "benchmarks" / "README.md"]:
        with subtests.test(page=str(page.relative_to(ROOT))):
            text = page.read_text(encoding="utf-8")

            assert text.startswith("# ")
            for target in re.findall(r"\]\(([^)\s]+)\)", text):
                if not target.startswith(("http://", "https://")):
                    file, _, anchor = target.partition("#")
                    linked = page.parent / file if file else page
                    assert linked.exists(), target
                    assert not anchor or anchor in anchors(linked), target


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
    gallery = (ROOT / "docs" / "scenarios" / "README.md").read_text().partition("## Gallery")[2]
    scenarios = {page.name for page in (ROOT / "docs" / "scenarios").glob("[a-z]*.md")}
    assert scenarios <= set(re.findall(r"\]\((\w+\.md)\)\n", gallery))


def test_own_model_lists_each_model_of_the_zoo() -> None:
    text = (ROOT / "docs" / "how_to" / "own_model.md").read_text(encoding="utf-8")
    table = text.partition("| family | models |")[2].partition("\n\n")[0]

    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(list_models())


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


METHOD_PAGES = sorted((INDEX.parent / "methods").glob("*.md"))


def sections_of(page: Path) -> dict[str, str]:
    """Return the section of each method of a page."""
    section = re.compile(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    return dict(section.findall(page.read_text(encoding="utf-8")))


def test_each_method_has_a_section_with_its_settings_and_a_row_of_the_index(
    subtests: pytest.Subtests,
) -> None:
    places = [(name, page) for page in METHOD_PAGES for name in sections_of(page)]
    index = INDEX.read_text(encoding="utf-8")

    assert sorted(name for name, _ in places) == sorted(BUILT_IN)
    for name, page in places:
        with subtests.test(method=name):
            section = sections_of(page)[name]
            for word in ("- **Needs:**", "- **Evaluated:**", "- **Module:**"):
                assert word in section, word
            for key in register_algorithm[name].model_fields:
                assert f"| `{key}` |" in section, key
            link = rf"^\| \[`{name}`\]\(methods/{page.name}#{name}\) \|.*\| (.*?) \|$"
            needs = format_needs(describe_needs(register_algorithm[name]())) or "–"
            assert re.findall(link, index, re.MULTILINE) == [needs]


@pytest.mark.slow
@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda page: page.stem)
def test_each_broadcast_item_is_in_the_table_of_its_method(
    page: Path, subtests: pytest.Subtests
) -> None:
    for name, section in sections_of(page).items():
        if name not in ("centralized", "ensemble"):
            with subtests.test(method=name):
                expected = set(re.findall(r"^\| `(\w+)` \| down", section, re.MULTILINE))
                sent = broadcast_items(name)
                # Some settings add items, such as `proxy_indices` with `proxy_rows`.
                assert sent <= expected
                assert sent or name in ("dense", "local")


def broadcast_items(name: str) -> set[str]:
    """Return the names of the items that a method broadcasts in two rounds and an evaluation."""
    sent: set[str] = set()
    method = register_algorithm[name]
    broadcast = method.broadcast

    def record(self: Algorithm, server: Participant, recipient: ClientInfo) -> Items:
        items = broadcast(self, server, recipient)
        sent.update(items)
        return items

    groups = "[{name: a, count: 2, model: mlp}, {name: b, model: {name: mlp, hidden: [32]}}]"
    overrides = [f"algorithm.name={name}", f"clients.groups={groups}", "data.proxy.size=100"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "broadcast", record)
        trainer = prepare(str(ROOT / "configs/digits_quickstart.yaml"), overrides).make_trainer()
        for _ in range(2):
            trainer.run_round()
        trainer.evaluate()
    return sent
