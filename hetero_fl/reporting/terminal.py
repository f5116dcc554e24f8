"""Console that shows control characters in names from files and other sites escaped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from typing_extensions import override

from hetero_fl.utils.errors import printable_lines


class Terminal(Console):
    """Console that prints control characters escaped and square brackets as they are.

    The terminal receives only the colors and cursor movements of rich itself. Plain lines are
    printed with `hetero_fl.utils.errors.echo`.

    Args:
        **options: Options of `rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    @override
    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable_lines(text), style, control)

    @override
    def on_broken_pipe(self) -> None:
        # Rich would exit; the command line handles the exception.
        raise  # noqa: PLE0704 (called by rich while it handles a BrokenPipeError)
