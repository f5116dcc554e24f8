"""The `hetero-fl` command; the scripts are its subcommands."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from hetero_fl.errors import RunFailed, UserError

# Before torch is loaded: threads that wait for one another must not spin, or two runs on one machine crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line are one line, as all of a user's mistakes are."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None, command: str | None = None) -> int:
    """Run a command. Returns 0 done, 1 the run failed, 2 a user's mistake, 130 interrupted with a checkpoint written."""
    from hetero_fl.cli import commands

    signal.signal(signal.SIGTERM, _interrupt)  # a cluster's polite way to stop a job
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        prog = f"{command}.py" if command else f"hetero-fl {arguments[0]}" if arguments else ""
        if command is None and arguments and arguments[0] in commands.COMMANDS:
            command = arguments.pop(0)
        if command is None:
            commands.all_parser().parse_args(arguments or ["--help"])
            return 0
        options = commands.parser(command, prog).parse_intermixed_args(arguments)
        carry_out: Callable[[argparse.Namespace], int] = options.carry_out
        return carry_out(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
