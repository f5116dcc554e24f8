"""`hetero-fl check`: whether a run directory is whole."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hetero_fl.errors import UserError


def setup(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run, finished or not")
    parser.set_defaults(carry_out=carry_out)


def carry_out(options: argparse.Namespace) -> int:
    """Parse, inspect, print. Returns 2 if something is missing or damaged."""
    from hetero_fl.reporting.integrity import inspect
    from hetero_fl.reporting.rundir import is_locked

    if is_locked(options.run):
        raise UserError(f"{options.run}: another process is at work there; check it when that has ended")
    found = inspect(options.run)
    for line in found.lines:
        print(f"error: {line}", file=sys.stderr)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if found.damage:
        return 2
    print(f"{options.run}: whole; {found.state}")
    return 0
