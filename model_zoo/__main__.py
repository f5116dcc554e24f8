"""``python -m model_zoo [PATTERN]``: a table of the models."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from . import ModelError, describe, list_models
from .catalogue import MODELS
from .describe import readable


def main(arguments: list[str] | None = None) -> int:
    """Prints the table and returns the exit status: 0, or 2 after one line about a mistake."""
    parser = argparse.ArgumentParser(prog="python -m model_zoo", description="A table of the models.")
    parser.add_argument("pattern", nargs="?", default="*", help="such as 'cnn_*' or 'timm:resnet*' (default: all)")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--size", type=int, default=28, help="height and width of the images in pixels")
    given = parser.parse_args(arguments)
    console = Console()
    try:
        names = list_models(given.pattern)
        if not names:
            raise ModelError(f"no model matches {given.pattern}")
        if ":" in given.pattern:  # a thousand names: building each of them to describe it would take hours
            console.print("\n".join(names), markup=False, highlight=False)
            return 0
        console.print(_table(names, given.classes, given.channels, given.size))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _table(names: list[str], classes: int, channels: int, size: int) -> Table:
    table = Table(title=f"{classes} classes; images of {channels}x{size}x{size}, table rows of {size} columns")
    table.add_column("model", no_wrap=True)
    for heading in ("parameters", "features", "FLOP"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("what it is")
    for name in names:
        takes_images = "image" in MODELS[name].kinds
        example = (channels, size) if takes_images else (size, ())
        about = describe(name, classes, *example)
        table.add_row(
            name, f"{about.parameters:,}", str(about.feature_dim), readable(about.forward_flops), about.summary
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
