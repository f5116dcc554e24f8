"""``python -m model_zoo [PATTERN]``: a table of the models."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from model_zoo.description import describe, format_count
from model_zoo.errors import ModelError
from model_zoo.registry import MODELS, list_models

WORDS = 1000  # of the vocabulary of the texts


def main(arguments: list[str] | None = None) -> int:
    """Prints the table and returns the exit status: 0, or 2 after one line about a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m model_zoo", description="A table of the models."
    )
    parser.add_argument(
        "pattern", nargs="?", default="*", help="such as 'cnn_*' or 'timm:resnet*' (default: all)"
    )
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument(
        "--size", type=int, default=28, help="height and width of the images in pixels"
    )
    given = parser.parse_args(arguments)
    console = Console()
    try:
        names = list_models(given.pattern)
        if not names:
            raise ModelError(f"no model matches {given.pattern}")
        # a thousand names: building each of them to describe it would take hours
        if ":" in given.pattern:
            console.print("\n".join(names), markup=False, highlight=False)
            return 0
        console.print(_table(names, given.classes, given.channels, given.size))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _table(names: list[str], classes: int, channels: int, size: int) -> Table:
    title = f"{classes} classes; images of {channels}x{size}x{size}, table rows of {size} columns"
    table = Table(title=f"{title}, texts of {size} words of {WORDS:,}")
    table.add_column("model", no_wrap=True)
    for heading in ("parameters", "features", "FLOP"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("what it is")
    for name in names:
        kinds = MODELS[name].kinds
        if "tokens" in kinds:
            about = describe(name, classes, 1, (size,), vocabulary=WORDS)
        else:
            about = describe(name, classes, *((channels, size) if "image" in kinds else (size, ())))
        table.add_row(
            name,
            f"{about.parameters:,}",
            str(about.feature_dim),
            format_count(about.forward_flops),
            about.summary,
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
