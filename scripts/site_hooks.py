"""Hooks of MkDocs that complete the documentation site (see mkdocs.yml).

The pages of `docs` are written for a reader of the repository. The site adds the notebooks, and
other links to files outside of `docs` lead to the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
NOTEBOOKS = "notebooks"
LINK = re.compile(r"\[(?P<text>[^\[\]]*)\]\((?P<path>[^()\s:#]+)(?P<anchor>#[^()\s]*)?\)")
NOTEBOOK_LINK = re.compile(r'(?<=href=")(?P<path>[^":#]+\.(?:md|ipynb))')
SEARCH_BOOSTS = {
    "how_to/migrate.md": 1.0,
    "how_to/": 4.0,
    "getting_started.md": 4.0,
    "notebooks/": 2.0,
    "results/": 0.5,
    "benchmark/": 0.25,
}
"""Factors of the rank of pages in search results, keyed by the start of their path."""


# Before the plug-in that converts notebooks.
@event_priority(100)
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks to the site."""
    for notebook in sorted((ROOT / NOTEBOOKS).glob("*.ipynb")):
        path = f"{NOTEBOOKS}/{notebook.name}"
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change the links of a page that leave `docs`, and set its rank in search results."""
    path = page.file.src_uri
    boosts = [boost for start, boost in SEARCH_BOOSTS.items() if path.startswith(start)]
    page.meta.setdefault("search", {"boost": boosts[0] if boosts else 1.0})
    return change_links(markdown, path, config.repo_url)


def change_links(markdown: str, path: str, repository: str | None) -> str:
    """Change links that leave `docs` to links to notebooks of the site or to the repository.

    Args:
        markdown: Content of a page.
        path: Path of the page, relative to `docs`.
        repository: Address of the repository. If None, links to it become plain text.
    """
    folder = posixpath.dirname(path)

    def changed(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, match["path"]))
        if target.startswith("docs/"):
            return match[0]
        if target.endswith(".ipynb"):
            return f"[{match['text']}]({posixpath.relpath(target, folder or '.')})"
        if not repository:
            return match["text"]
        return f"[{match['text']}]({repository}/blob/HEAD/{target}{match['anchor'] or ''})"

    return LINK.sub(changed, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change the links of a notebook, and give an empty table of contents' room to the page."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    elif not any(heading.children for heading in page.toc):
        page.meta["hide"] = ["toc"]

    def changed(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(NOTEBOOKS, match["path"]))
        file = files.get_file_from_path(target.removeprefix("docs/"))
        return match[0] if file is None else file.url_relative_to(page.file)

    return NOTEBOOK_LINK.sub(changed, html) if page.file.src_uri.endswith(".ipynb") else html
