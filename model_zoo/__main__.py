"""The command `python -m model_zoo [PATTERN]`, which prints a table of models."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from model_zoo.description import describe, format_count
from model_zoo.errors import ModelError
from model_zoo.registry import MODELS, list_models

TITLE = "10 classes; gray images of 28x28 pixels, rows of 28 columns, texts of 28 of 1,000 words"


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
    pattern = parser.parse_args(arguments).pattern
    try:
        names = list_models(pattern)
        if not names:
            raise ModelError(f"PATTERN: no model matches '{pattern}'")
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Building all models of another library, about a thousand, would take hours.
    if ":" in pattern:
        Console().print("\n".join(names), markup=False, highlight=False)
        return 0
    table = Table("model", title=TITLE)
    for heading in ("parameters", "features", "FLOP"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("description")
    for name in names:
        table.add_row(name, *_describe(name))
    Console().print(table)
    return 0


def _describe(name: str) -> tuple[str, str, str, str]:
    # The models of plug-ins are measured with images, which they may not accept.
    kinds = MODELS[name].kinds if name in MODELS else ("image",)
    try:
        if "tokens" in kinds:
            about = describe(name, input_size=(28,), vocabulary=1000)
        elif "image" in kinds:
            about = describe(name)
        else:
            about = describe(name, in_channels=28, input_size=())
    except ModelError as error:
        return "–", "–", "–", str(error)
    flops = format_count(about.forward_flops)
    return f"{about.parameters:,}", str(about.feature_dim), flops, about.summary


if __name__ == "__main__":
    sys.exit(main())
