"""Pages of the documentation site for notebooks, in Markdown (see site_hooks.py)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
TIMEOUT = 1800
"""Largest number of seconds that a cell may take."""
# Colors of terminals, and text that a progress bar has overwritten.
NOT_SHOWN = re.compile(r"\x1b\[[0-9;]*m|[^\n]*\r(?!\n)")


@cache
def notebook_page(path: Path, *, execute: bool = False) -> str:
    """Return the cells of a notebook as Markdown.

    Args:
        path: Path of the notebook.
        execute: Whether to run the notebook and to add the outputs of its cells.
    """
    notebook = nbformat.read(path, as_version=4)
    if execute:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        place = {"metadata": {"path": str(path.parent)}}
        NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources=place).execute()
    return "\n\n".join(block for cell in notebook.cells for block in _blocks(cell)) + "\n"


def _blocks(cell: nbformat.NotebookNode) -> Iterator[str]:
    """Yield the source and the outputs of a cell as blocks of Markdown."""
    if cell.cell_type == "markdown":
        yield cell.source
    elif cell.cell_type == "code":
        yield _fenced("python", cell.source)
        for output in cell.get("outputs", []):
            yield _output(output)


def _output(output: nbformat.NotebookNode) -> str:
    """Return the richest form of an output that a page can show."""
    if output.output_type == "stream":
        text = output.text
    elif output.output_type == "error":
        text = "\n".join(output.traceback)
    elif "text/html" in output.data:
        # Without their own style, tables of pandas look like other tables.
        html = output.data["text/html"].replace(' border="1" class="dataframe"', "")
        return f'<div class="output">{html}</div>'
    elif "image/png" in output.data:
        picture = output.data["image/png"].strip()
        return f'<div class="output"><img alt="" src="data:image/png;base64,{picture}"></div>'
    else:
        text = output.data["text/plain"]
    fenced = _fenced("text", NOT_SHOWN.sub("", text))
    return f'<div class="output" markdown="1">\n\n{fenced}\n\n</div>'


def _fenced(language: str, text: str) -> str:
    return f"~~~~{language}\n{text.rstrip()}\n~~~~"
