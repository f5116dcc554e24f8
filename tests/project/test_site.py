"""The documentation site: public names, links to files outside `docs`, and the strict build."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hetero_fl
import hetero_fl.algorithms
import hetero_fl.data
import model_zoo
from tests.support.cases import each_case

ROOT = Path(__file__).parents[2]


@pytest.fixture
def site_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test import the modules in `scripts`."""
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@each_case("package", [hetero_fl, hetero_fl.algorithms, hetero_fl.data, model_zoo])
def test_reference_contains_each_public_name(package: object) -> None:
    pages = (ROOT / "docs" / "reference" / "api").glob("*.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}
    assert set(package.__all__) <= shown  # type: ignore[attr-defined]


@each_case(
    "mistake",
    [
        # GitHub shows a paragraph, Python-Markdown a heading.
        r"^#+[^#\s].*$",
        # GitHub continues a list from 2 or 3 spaces, Python-Markdown from 4.
        r"(?<=^\n) {1,3}\S.*$",
        r"^ {1,3}(?:[-*]|\d+\.) .*$",
    ],
)
def test_pages_look_alike_on_github_and_on_the_site(mistake: str) -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        assert re.findall(mistake, text, re.MULTILINE) == [], page


@pytest.mark.usefixtures("site_scripts")
@each_case(
    ("repository", "file"),
    [("https://x.org/a", "[a](https://x.org/a/blob/HEAD/configs/own.yaml#seed)"), (None, "a")],
)
def test_links_that_leave_the_pages_lead_to_notebooks_and_the_repository(
    repository: str | None, file: str
) -> None:
    from site_hooks import change_links

    markdown = (
        "[a](../../configs/own.yaml#seed) [b](privacy.md#keys) [c](https://x.org) "
        "[d](../../notebooks/2_model_zoo.ipynb)"
    )

    changed = change_links(markdown, "how_to/install.md", repository)

    links = "[b](privacy.md#keys) [c](https://x.org) [d](../notebooks/2_model_zoo.ipynb)"
    assert changed == f"{file} {links}"


def test_titles_of_pages_are_unique() -> None:
    found = re.findall(r"^ +- (.+): [\w/]+\.\w+$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)

    assert len(found) > 50
    assert len(found) == len(set(found))


@pytest.mark.usefixtures("site_scripts")
def test_example_of_docstring_is_a_section_of_examples() -> None:
    griffe = pytest.importorskip("griffe")
    from site_docstrings import Examples

    text = "Return one.\n\nExample:\n    >>> one()\n    1\n"
    function = griffe.Function("one", docstring=griffe.Docstring(text))
    Examples().on_object(obj=function, loader=griffe.GriffeLoader())
    _, examples = function.docstring.parse("google")

    assert examples.kind is griffe.DocstringSectionKind.examples
    assert examples.value == [(griffe.DocstringSectionKind.examples, ">>> one()\n1")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the site, built without warnings."""
    pytest.importorskip("mkdocs_jupyter")
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "EXECUTE_NOTEBOOKS": "false", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_site_builds_without_warnings(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="getting_started/"' in start
    # Nothing is loaded from other servers.
    assert not re.findall(r'(?:src|href)="https?://[^"]+\.(?:js|css)', start)


@pytest.mark.slow
def test_each_link_of_the_site_leads_to_a_file(site: Path) -> None:
    broken = []
    for page in site.rglob("*.html"):
        for link in re.findall(r'href="([^"?#]+)', page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:|/", link) and not (page.parent / link).exists():
                broken.append(f"{page.relative_to(site)}: {link}")

    assert broken == []
