"""The documentation site: public names, links to files outside `docs`, and the strict build."""

from __future__ import annotations

import os
import posixpath
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
def test_links_to_the_repository_become_links_in_the_site() -> None:
    from site_hooks import change_links, source_page

    page = "docs/how_to/install.md"
    markdown = (
        "[a](../../configs/digits_quickstart.yaml) [b](privacy.md#keys) [c](https://x.org) "
        "[d](../../notebooks/2_model_zoo.ipynb) [e](../../configs) [f](../missing.md)"
    )
    assert change_links(markdown, page) == (
        "[a](../source/configs/digits_quickstart.yaml.md) [b](privacy.md#keys) [c](https://x.org) "
        "[d](../notebooks/2_model_zoo.md) [e](../source/configs/index.md) [f](../missing.md)"
    )
    assert "](digits_quickstart.yaml.md)" in source_page("configs")
    # The links of a page outside of `docs` start at its place in the repository.
    assert "](../how_to/" in source_page("README.md")


@pytest.mark.usefixtures("site_scripts")
def test_each_link_of_the_sources_leads_to_a_file_of_the_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mkdocs.config import load_config
    from mkdocs.structure.files import get_files
    from site_hooks import DOCS, LINK, change_links

    monkeypatch.setenv("EXECUTE_NOTEBOOKS", "false")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    files = config.plugins.on_files(get_files(config), config=config)
    broken = []
    for file in files.documentation_pages():
        text = file.content_string
        if file.generated_by is None:
            text = change_links(text, f"{DOCS}/{file.src_uri}")
        for link in LINK.finditer(re.sub(r"^(```|~~~~).*?^\1$", "", text, flags=re.M | re.S)):
            target = posixpath.normpath(f"{posixpath.dirname(file.src_uri)}/{link['path']}")
            if ":" not in link["path"] and files.get_file_from_path(target.lstrip("/")) is None:
                broken.append(f"{file.src_uri}: {link['path']}")

    assert not broken


def test_titles_of_pages_are_unique() -> None:
    found = re.findall(r"^ +- (.+): [\w/]+\.\w+$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)

    assert len(found) > 50
    assert len(found) == len(set(found))


@pytest.mark.usefixtures("site_scripts")
def test_search_prefers_guides_and_leaves_out_source_files() -> None:
    from site_hooks import search_settings

    assert search_settings("source/CHANGELOG.md") == {"exclude": True}
    guide, results = (search_settings(f"{name}/privacy.md") for name in ("how_to", "results"))
    assert guide["boost"] > search_settings("reference/methods.md")["boost"] > results["boost"]


@pytest.mark.usefixtures("site_scripts")
def test_markers_distinguish_methods_and_their_settings() -> None:
    pytest.importorskip("plotly")
    from site_plots import COMPONENTS, PLAIN, _marker, _methods, benchmark

    colors = {method: _marker(method)["color"] for method in benchmark().highlighted}
    markers = {(_marker(method)["color"], _marker(method)["symbol"]) for method in _methods()}
    kinds = (PLAIN, COMPONENTS, "components + sharpening")

    assert {"Hybrid", "FedAvg", "FML"} <= colors.keys()
    assert len(set(colors.values())) == len(colors)
    assert len(markers) == len(_methods()) > len(colors)
    assert len({_marker("Hybrid", kind)["symbol"] for kind in kinds}) == len(kinds)


@pytest.mark.usefixtures("site_scripts")
def test_notebook_becomes_markdown(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    from site_notebooks import notebook_page

    v4 = nbformat.v4
    outputs = [
        v4.new_output("stream", text="10 %\r\x1b[1mdone\x1b[0m\n"),
        v4.new_output(
            "execute_result",
            {"text/html": '<table border="1" class="dataframe"></table>', "text/plain": "table"},
        ),
        v4.new_output("display_data", {"image/png": "iVBO\n", "text/plain": "Figure"}),
        v4.new_output("execute_result", {"text/plain": "3"}),
    ]
    cells = [v4.new_markdown_cell("# Title"), v4.new_code_cell("1 + 2", outputs=outputs)]
    path = tmp_path / "short.ipynb"
    nbformat.write(v4.new_notebook(cells=cells), path)

    page = notebook_page(path)

    assert page.startswith("# Title\n\n~~~~python\n1 + 2\n~~~~\n")
    assert "~~~~text\ndone\n~~~~" in page
    assert '\n<div class="output"><table></table></div>\n' in page
    assert 'src="data:image/png;base64,iVBO"' in page
    assert page.endswith("~~~~text\n3\n~~~~\n\n</div>\n")


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
    pytest.importorskip("mkdocs")
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
    assert (site / "source" / "configs" / "medical_hetero.yaml" / "index.html").is_file()
    # Nothing is loaded from other servers.
    assert not re.findall(r'(?:src|href)="https?://[^"]+\.(?:js|css)', start)
