"""Hooks of MkDocs that complete the documentation site (see mkdocs.yml).

The pages of `docs` are written for a reader of the repository, so that they link to notebooks,
configurations and source files outside of `docs`. The site contains these files as further pages,
and links are changed accordingly. Some pictures are replaced by interactive plots (site_plots.py).
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

from site_notebooks import notebook_page
from site_plots import PLOTS, SCRIPT, plot_html, script

ROOT = Path(__file__).parents[1]
DOCS = "docs"
NOTEBOOKS = "notebooks"
SOURCE = "source"
"""Folder of other files of the repository in the site."""
LINK = re.compile(r"(?<=\]\()(?P<path>[^()\s#]+)(?P<anchor>#[^()\s]*)?(?=\))")
PICTURE = re.compile(r"^!\[[^\]]*\]\((?P<path>[^()\s]+)\)$", re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".csv": "text", ".toml": "toml"}
SEARCH_BOOSTS = {
    "how_to/migrate.md": 1.0,
    "how_to/": 4.0,
    "getting_started.md": 4.0,
    "notebooks/": 2.0,
    "results/": 0.5,
    "benchmark/": 0.25,
    "reference/messages.md": 0.25,
}
"""Factors of the rank of pages in search results, keyed by the start of their path."""


def site_path(path: str) -> str:
    """Return the path in the site of a file or folder of the repository.

    Args:
        path: Path relative to the root of the repository, with slashes.
    """
    pure = PurePosixPath(path)
    place = path.removeprefix(f"{DOCS}/") if pure.parts[:1] == (DOCS,) else f"{SOURCE}/{path}"
    if pure.suffix == ".ipynb":
        return str(pure.with_suffix(".md"))
    if (ROOT / path).is_dir():
        return f"{place}/index.md"
    return place if pure.parts[:1] == (DOCS,) or pure.suffix == ".md" else f"{place}.md"


def linked_files(markdown: str, path: str) -> Iterator[str]:
    """Yield the files and folders of the repository to which a page links.

    Args:
        markdown: Content of the page.
        path: Path of the page, relative to the root of the repository.
    """
    for match in LINK.finditer(markdown):
        if (target := _resolve(match["path"], path)) is not None:
            yield target


def change_links(markdown: str, path: str) -> str:
    """Change links to files of the repository to links in the site.

    Args:
        markdown: Content of a page.
        path: Path of the page, relative to the root of the repository.
    """
    folder = posixpath.dirname(site_path(path))

    def changed(match: re.Match[str]) -> str:
        target = _resolve(match["path"], path)
        if target is None:
            return match[0]
        return posixpath.relpath(site_path(target), folder or ".") + (match["anchor"] or "")

    return LINK.sub(changed, markdown)


def replace_pictures(markdown: str, path: str) -> str:
    """Replace pictures by interactive plots, where these exist.

    Args:
        markdown: Content of a page.
        path: Path of the page, relative to `docs`.
    """
    folder = posixpath.dirname(path)

    def replaced(match: re.Match[str]) -> str:
        picture = posixpath.normpath(posixpath.join(folder, match["path"]))
        return (plot_html(picture) if picture in PLOTS else None) or match[0]

    changed = PICTURE.sub(replaced, markdown)
    if changed == markdown:
        return markdown
    # The address of a page ends in a slash, except for index pages.
    depth = posixpath.dirname(path) if path.endswith(("README.md", "index.md")) else path
    library = posixpath.relpath(SCRIPT, depth or ".")
    return f'{changed}\n\n<script src="{library}" defer></script>\n'


def _resolve(link: str, path: str) -> str | None:
    """Return the path that a link leads to, or None if the link leaves the repository."""
    if re.match(r"[a-z]+:", link):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    if target.startswith("..") or not (ROOT / target).exists():
        return None
    return f"{target}/README.md" if (ROOT / target / "README.md").is_file() else target


def source_markdown(path: str) -> str:
    """Return the content of the page for a file or folder, with links of the repository.

    Args:
        path: Path relative to the root of the repository, with slashes.
    """
    file = ROOT / path
    if file.is_dir():
        shown = sorted(each for each in file.iterdir() if not each.name.startswith(("__", ".")))
        items = [
            f"- [{each.name}]({each.name})" if _is_text(each) else f"- {each.name}"
            for each in shown
        ]
        return "\n".join([f"# `{path}`", "", *items])
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    return f"# `{path}`\n\n~~~~{LANGUAGES.get(file.suffix, 'text')}\n{text}\n~~~~\n"


def source_page(path: str) -> str:
    """Return the content of the page for a file or folder, with links of the site.

    Args:
        path: Path relative to the root of the repository, with slashes.
    """
    text = source_markdown(path)
    if (ROOT / path).is_dir():
        return change_links(text, f"{path}/index.md")
    return change_links(text, path) if path.endswith(".md") else text


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks and all linked files of the repository to the site."""
    files.append(File.generated(config, SCRIPT, content=script()))
    waiting = [(file.content_string, f"{DOCS}/{file.src_uri}") for file in files if _is_page(file)]
    for notebook in sorted((ROOT / NOTEBOOKS).glob("*.ipynb")):
        path = f"{NOTEBOOKS}/{notebook.name}"
        text = notebook_page(notebook, execute=config.extra["execute_notebooks"])
        files.append(File.generated(config, site_path(path), content=change_links(text, path)))
        waiting.append((text, path))
    while waiting:
        for target in linked_files(*waiting.pop()):
            place = site_path(target)
            if files.get_file_from_path(place) is not None:
                continue
            page = File.generated(
                config, place, content=source_page(target), inclusion=InclusionLevel.NOT_IN_NAV
            )
            files.append(page)
            if (ROOT / target).is_dir():
                waiting.append((source_markdown(target), f"{target}/index.md"))
            elif target.endswith(".md"):
                waiting.append((source_markdown(target), target))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change the links of a page, and set its rank in search results.

    The links of generated pages are changed already.
    """
    page.meta.setdefault("search", search_settings(page.file.src_uri))
    if page.file.generated_by is not None:
        return markdown
    changed = change_links(markdown, f"{DOCS}/{page.file.src_uri}")
    return replace_pictures(changed, page.file.src_uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Give the room of an empty table of contents, or navigation, to the page."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    elif not any(heading.children for heading in page.toc):
        page.meta["hide"] = ["toc"]


def search_settings(path: str) -> dict[str, Any]:
    """Return the settings of the search for a page.

    Files of the repository are left out, because they would hide pages of the documentation.

    Args:
        path: Path of the page in the site.
    """
    if path.startswith(f"{SOURCE}/"):
        return {"exclude": True}
    boosts = [boost for start, boost in SEARCH_BOOSTS.items() if path.startswith(start)]
    return {"boost": boosts[0] if boosts else 1.0}


def _is_text(file: Path) -> bool:
    """Return whether the site can show a file or folder of the repository."""
    return file.is_dir() or file.suffix in (".md", ".ipynb", *LANGUAGES)


def _is_page(file: File) -> bool:
    return file.src_uri.endswith(".md")
