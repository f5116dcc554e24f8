"""The `hetero-fl` command; the scripts are its subcommands."""

from __future__ import annotations

import errno
import itertools
import os
import re
import select
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn, TextIO

from hetero_fl.utils.errors import Interrupted, RunFailedError, UserError

# Before torch is loaded: threads that wait for one another spin for a moment only. As long as OpenMP has it by default, two
# runs on one machine crawl; not at all, and a second thread is worth nothing (benchmarks/speed/threads.py).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

VERBOSE = re.compile(r"-q*v[qv]*|--verbose")
ANYWHERE = re.compile(r"-[qv]+|--verbose|--quiet")  # options that may also stand before the command
PIPE_CLOSED = 141  # 128 + SIGPIPE, which Windows does not have
FULL = (errno.ENOSPC, errno.EDQUOT)
LAUNCHED = "TORCHELASTIC_RUN_ID"  # torchrun sets it


def main(argv: Sequence[str] | None = None, command: str | None = None) -> int:
    """Run a command and return its exit status.

    0: done. 1: the run failed. 2: a mistake of the user. 130: interrupted, with a checkpoint written. 141: the output
    was no longer read.

    Launched by torchrun, the first of its processes runs it, and the others compute for that one.
    """
    if LAUNCHED in os.environ:
        from hetero_fl.federation.executors.torchrun import run_as_ranks

        return run_as_ranks(lambda: _run_with_sigterm(argv, command))
    return _run_with_sigterm(argv, command)


def _run_with_sigterm(argv: Sequence[str] | None, command: str | None) -> int:
    """`_main`, with SIGTERM, a cluster's polite way to stop a job, as Ctrl-C; the caller's own handler is put back."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _main(argv, command)
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _main(argv: Sequence[str] | None, command: str | None) -> int:
    """Run `_dispatch`; exit with status 141 if the reader of stdout or stderr has closed the pipe."""
    try:
        return _dispatch(argv, command)
    except (BrokenPipeError, SystemExit) as error:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]
        by_rich = isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
        # or a pipe to another process
        if not by_rich and (isinstance(error, SystemExit) or not closed):
            raise
        for stream in closed:  # what is still buffered goes nowhere, also when the interpreter ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return PIPE_CLOSED


def _is_closed(stream: TextIO | None) -> bool:
    """Return whether a stream is a pipe whose reader has closed it; False where that cannot be told (Windows)."""
    if not hasattr(select, "poll"):
        return False
    try:
        descriptor = -1 if stream is None else stream.fileno()
    except (OSError, ValueError):  # no file
        return False
    if descriptor < 0:
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _dispatch(argv: Sequence[str] | None, command: str | None) -> int:
    from click.exceptions import Exit

    from hetero_fl.cli.commands import parse_command

    arguments = list(sys.argv[1:] if argv is None else argv)
    if command is None:  # hetero-fl --quiet train
        before = list(itertools.takewhile(ANYWHERE.fullmatch, arguments))
        arguments = [*arguments[len(before) :][:1], *before, *arguments[len(before) + 1 :]]
    verbose = any(map(VERBOSE.fullmatch, arguments))
    typed = [*(_script_name() if command or LAUNCHED in os.environ else ["hetero-fl"]), *arguments]
    prog = f"{command}.py" if command else "hetero-fl"
    if command is None and arguments and not arguments[0].startswith("-"):
        command = arguments.pop(0)
        prog = f"hetero-fl {command}"
    options: dict[str, Any] = {}
    try:
        try:
            with parse_command(prog, command, arguments) as context:
                options = context.params
                context.command.invoke(context)
            return 0
        except Exit as ended:
            return ended.exit_code
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except UserError as error:
        _print_error("error", error, verbose)
        return 2
    except RunFailedError as error:
        _print_error("failed", error, verbose)
        return 1
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(
            "failed: no space left on the disk; what was committed is kept, and --resume goes on from it",
            file=sys.stderr,
        )
        return 1
    except Interrupted as stop:
        program = typed[: len(typed) - len(arguments)]
        again = typed if command == "compare" else [*program, "--resume", "--out", str(stop.path)]
        again += ["--server", str(options["server_file"])] if command == "server" else []
        again += ["--allow-code"] if options["allow_code"] and "--allow-code" not in again else []
        print(f"interrupted; to go on: {shlex.join(again)}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted; there is nothing yet to go on from", file=sys.stderr)
        return 130


def _print_error(kind: str, error: BaseException, verbose: bool) -> None:
    """Print an error in one line; before it, if wished, the tracebacks of all that led to it."""
    led_to: list[BaseException] = []
    cause: BaseException | None = error if verbose else None
    while cause is not None and cause not in led_to:
        led_to.append(cause)
        cause = cause.__cause__ or cause.__context__
    for cause in reversed(led_to):
        traceback.print_exception(cause, chain=False)
    print(f"{kind}: {error}", file=sys.stderr)


def _script_name() -> list[str]:
    """How the script was started, its arguments left out: `python scripts/train.py`."""
    typed = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    if LAUNCHED in os.environ:  # which has added: python -u
        return ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], *typed[2:]]
    return typed


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
