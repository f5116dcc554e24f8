"""`hetero-fl join`: what a finished run is worth to a newcomer."""

from __future__ import annotations

import argparse
from pathlib import Path

from hetero_fl.cli.asked import option_of_code, permission_of, say_of
from hetero_fl.errors import UserError


def setup(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument(
        "--data", required=True, metavar="FILE|NAME", help="the newcomer's: a local file or folder, or a source by name"
    )
    parser.add_argument("--model", metavar="NAME", help="of the zoo (default: the run's most frequent)")
    parser.add_argument(
        "--take", choices=("backbone", "teacher", "both"), help="begin with (default: each that there is)"
    )
    parser.add_argument("--label", metavar="COLUMN", help="of a table: the column of labels (default: the run's own)")
    parser.add_argument("--patients", default="10,30,100,300", metavar="N,…", help="labelled (default: 10,30,100,300)")
    parser.add_argument("--seeds", default="0,1,2,3,4", metavar="0,1,…")
    parser.add_argument(
        "--epochs", type=int, default=10, help="of fine-tuning, but at least 60 steps (default: 10); from scratch × 4"
    )
    parser.add_argument("--out", type=Path, help="folder for table, picture and JSON (default: RUN/join-MODEL)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="the newcomer's settings: optimizer.lr=…"
    )
    option_of_code(parser)
    parser.set_defaults(carry_out=carry_out)


def carry_out(options: argparse.Namespace) -> int:
    """Parse, call, print."""
    from hetero_fl.experiment import join
    from hetero_fl.experiment.legacy import Legacy
    from hetero_fl.reporting.run import Run

    patients, seeds = (numbers(f"--{name}", getattr(options, name)) for name in ("patients", "seeds"))
    if options.epochs < 1:
        raise UserError(f"--epochs: found {options.epochs}; take 1 or more")
    permission = permission_of(options)
    run = Run(options.run, permission)
    model = options.model or Legacy(run).usual
    named = "".join(c if c.isalnum() or c in "._-" else "_" for c in model)
    out = options.out or options.run / f"join-{named}"
    join(
        run,
        options.data,
        model,
        out=out,
        label=options.label,
        take=options.take,
        patients=patients,
        seeds=seeds,
        epochs=options.epochs,
        overrides=options.overrides,
        say=say_of(options),
        allow_code=permission,
    )
    print((out / "join.md").read_text(encoding="utf-8"))
    print(out)
    return 0


def numbers(flag: str, text: str) -> list[int]:
    """Whole numbers with commas between them. Raises UserError for anything else, and for none."""
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise UserError(f"{flag}: found '{text}'; write whole numbers with commas, such as 0,1,2")
    return found
