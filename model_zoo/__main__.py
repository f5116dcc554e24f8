"""The command `python -m model_zoo [PATTERN]`, which prints a table of models."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from model_zoo.description import describe, format_count
from model_zoo.errors import ModelError
from model_zoo.registry import MODELS, list_models

# Size of the vocabulary with which text models are measured.
VOCABULARY_SIZE = 1000


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return the exit status, which is 2 after an error and otherwise 0.

    The command prints a table of models or, if the pattern has a prefix such as `timm:`, the names.

    Args:
        arguments: Command-line arguments. If None, the arguments of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m model_zoo", description="Print a table of models and their cost."
    )
    parser.add_argument(
        "pattern",
        nargs="?",
        default="*",
        help="pattern of model names, such as 'cnn_*' or 'timm:resnet*' (default: all models)",
    )
    parser.add_argument(
        "--classes", type=int, default=10, help="number of classes (default: %(default)s)"
    )
    parser.add_argument(
        "--channels", type=int, default=1, help="channels of the images (default: %(default)s)"
    )
    parser.add_argument(
        "--size",
        type=int,
        default=28,
        help="height and width of the images in pixels (default: %(default)s)",
    )
    args = parser.parse_args(arguments)
    console = Console()
    try:
        names = list_models(args.pattern)
        if not names:
            raise ModelError(f"PATTERN: no model matches '{args.pattern}'")
        # Building all models of another library, about a thousand, would take hours.
        if ":" in args.pattern:
            console.print("\n".join(names), markup=False, highlight=False)
            return 0
        console.print(_make_table(names, args.classes, args.channels, args.size))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _make_table(names: list[str], classes: int, channels: int, size: int) -> Table:
    table = Table(
        title=f"{classes} classes; images of {channels}x{size}x{size}, table rows of {size} "
        f"columns, texts of {size} words from a vocabulary of {VOCABULARY_SIZE:,}"
    )
    table.add_column("model", no_wrap=True)
    for heading in ("parameters", "features", "FLOP"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("description")
    for name in names:
        # The models of plug-ins are measured with images, which they may not accept.
        kinds = MODELS[name].kinds if name in MODELS else ("image",)
        try:
            if "tokens" in kinds:
                description = describe(name, classes, 1, (size,), vocabulary=VOCABULARY_SIZE)
            elif "image" in kinds:
                description = describe(name, classes, channels, size)
            else:
                description = describe(name, classes, size, ())
        except ModelError as error:
            if name in MODELS:
                raise
            table.add_row(name, *["–"] * 3, str(error))
            continue
        table.add_row(
            name,
            f"{description.parameters:,}",
            str(description.feature_dim),
            format_count(description.forward_flops),
            description.summary,
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
