"""Display in notebooks: a progress bar, tables of scores and pictures."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

PICTURE_WIDTH = 800
"""Maximum width of a picture in CSS pixels."""


def in_notebook() -> bool:
    """Return whether this code runs in a notebook.

    Example:
        >>> from hetero_fl.reporting.notebook import in_notebook
        >>> in_notebook()
        False
    """
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"


def enable_figures() -> None:
    """Let a notebook display figures that are not made by pyplot."""
    if in_notebook():
        from IPython import get_ipython
        from IPython.core.pylabtools import select_figure_formats

        select_figure_formats(get_ipython(), {"png"})


class ProgressBar:
    """A progress bar and a line of text in the output of a notebook cell."""

    def __init__(self) -> None:
        self._handle: Any = None

    def update(self, text: str, done: int, total: int) -> None:
        """Show the bar, or update the bar if it is already shown.

        Args:
            text: The line below the bar.
            done: Number of completed rounds or runs.
            total: Number of all rounds or runs.
        """
        bar = f'<progress value="{done}" max="{max(total, 1)}"></progress>'
        self.show(f"<div>{bar} {done}/{total}</div><div><small>{escape(text)}</small></div>")

    def finish(self, text: str) -> None:
        """Replace the bar by a line of text."""
        self.show(f"<div><small>{escape(text)}</small></div>")

    def show(self, html: str) -> None:
        """Show HTML in the output of the cell, in place of the HTML that was shown before."""
        from IPython.display import HTML, display

        if self._handle is None:
            self._handle = display(HTML(html), display_id=True)
        else:
            self._handle.update(HTML(html))


class Picture:
    """A picture in a file, which a notebook displays.

    Args:
        path: Path of the PNG file.

    Attributes:
        path: Path of the PNG file.

    Example:
        >>> from hetero_fl.reporting.notebook import Picture
        >>> Picture("plots/curves.png")
        Picture('plots/curves.png')
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Picture({str(self.path)!r})"

    def __fspath__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.path.read_bytes()).decode()
        style = f"max-width: min({PICTURE_WIDTH}px, 100%)"
        source = f"data:image/png;base64,{data}"
        return f'<img alt="{escape(self.path.stem)}" style="{style}" src="{source}">'


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in HTML.

    Args:
        header: Titles of the columns.
        rows: Cells of each row.
    """
    titles = "".join(f"<th>{escape(title)}</th>" for title in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def html_items(title: str, items: Mapping[str, str]) -> str:
    """Return a title and a list of named values in HTML.

    Args:
        title: Text above the list.
        items: Values, keyed by name.
    """
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in items.items()
    )
    return f"<b>{escape(title)}</b><table><tbody>{rows}</tbody></table>"
