"""`hetero-fl export`: models of a finished run as files that predict without this package."""

from __future__ import annotations

import argparse
from pathlib import Path

from hetero_fl.cli.asked import option_of_code, permission_of, say_of


def setup(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("--client", metavar="ID", help="whose model, or server (default: all)")
    parser.add_argument("--format", default="onnx", metavar="NAME", help="onnx (default), torchscript or safetensors")
    parser.add_argument("--home", action="store_true", help="with the client's own label frequencies")
    parser.add_argument("--out", type=Path, help="folder for models, cards and score.py (default: RUN/export)")
    option_of_code(parser)
    parser.set_defaults(carry_out=carry_out)


def carry_out(options: argparse.Namespace) -> int:
    """Parse, call, print."""
    from hetero_fl.experiment import export

    made = export(
        options.run,
        options.client,
        options.format,
        options.out,
        options.home,
        say=say_of(options),
        allow_code=permission_of(options),
    )
    print(next(iter(made.values())).model.parent)
    return 0
