"""Entry point of the command line `hetero-fl`, which converts errors to exit statuses."""

from __future__ import annotations

import atexit
import errno
import gc
import io
import itertools
import os
import re
import select
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, TextIO

from hetero_fl.utils.code_permission import CODE_PREFIX, REFERENCE, CodeRefusedError
from hetero_fl.utils.errors import (
    ArgumentError,
    Interrupted,
    RunFailedError,
    UserError,
    echo,
    is_own_file,
    printable_lines,
    translate_exits,
)
from hetero_fl.utils.extras import describe_missing_package

# This variable must be set before torch is imported. By default, waiting threads spin for so long
# that two runs on one machine slow each other down.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Commands that are repeated to continue.
REPEATABLE = ("compare",)
# Commands whose runs have checkpoints.
RESUMABLE = ("train", "federate")
# Options that may also precede the command.
LEADING_OPTIONS = re.compile(r"-[qv]+|--verbose|--quiet")
VERBOSE = re.compile(r"-q*v[qv]*|--verbose")

# Statuses of a command that was interrupted (128 + SIGINT), or whose reader closed the pipe
# (128 + SIGPIPE, a signal that Windows does not define).
INTERRUPTED = 130
PIPE_CLOSED = 141

# Descriptions of failed writes, with a remedy, keyed by error number.
WRITE_ERRORS = {
    errno.ENOSPC: "no space left on the disk; free some space",
    errno.EDQUOT: "no space left in your disk quota; free some space",
    errno.EFBIG: "a file would exceed the limit of file sizes; raise it (ulimit -f)",
}

# After an interrupt, the command ends, and ignores further interrupts for this time.
EXIT_SECONDS = 10

# Environment variable that torchrun sets.
TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"


def main(argv: Sequence[str] | None = None, command: str | None = None) -> int:
    """Run a command and return its exit status.

    The status is 0 for success, 1 if the run failed, 2 for invalid input, 130 if the run was
    interrupted, and 141 if the reader of the output closed the pipe. Under torchrun, the first
    process runs the command, and the other processes are its workers.

    Args:
        argv: Arguments. If None, the arguments of the process are used.
        command: Name of the command. If None, the first argument is the name.
    """
    # At its end, Python searches all objects of torch for cycles, which takes about a second.
    atexit.register(gc.freeze)
    if TORCHRUN_VARIABLE in os.environ:
        from hetero_fl.federation.executors.torchrun import run_as_ranks

        return run_as_ranks(lambda: _run_with_sigterm(argv, command))
    return _run_with_sigterm(argv, command)


def _run_with_sigterm(argv: Sequence[str] | None, command: str | None) -> int:
    """Call `_run`, and treat SIGTERM, which clusters send to stop jobs, like Ctrl-C.

    A second signal does not interrupt the first one's work, or the end of the process.
    """
    _replace_unprintable_characters()
    interrupt = partial(_interrupt, [])
    handlers = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGINT, signal.SIGTERM)
        # A command that a script starts in the background ignores Ctrl-C.
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    status = 1
    try:
        with warnings_in_one_line():
            status = _run(argv, command)
    finally:
        for number, handler in handlers.items():
            if status == INTERRUPTED:
                # Python resets all handlers when it ends, except that of an ignored signal.
                atexit.register(signal.signal, number, signal.SIG_IGN)
            else:
                signal.signal(number, handler or signal.SIG_DFL)
    return status


def _replace_unprintable_characters() -> None:
    """Print `?` for characters that the terminal or file cannot represent.

    On Windows, the encoding of a redirected output lacks characters such as `≤`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _run(argv: Sequence[str] | None, command: str | None) -> int:
    """Run a command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    launcher = _script_name() if command or TORCHRUN_VARIABLE in os.environ else ["hetero-fl"]
    program = f"{command}.py" if command else "hetero-fl"
    if command is None:
        # Move options that precede the command after it: `hetero-fl --quiet train`.
        leading = list(itertools.takewhile(LEADING_OPTIONS.fullmatch, arguments))
        arguments = [*arguments[len(leading) :][:1], *leading, *arguments[len(leading) + 1 :]]
        if arguments and not arguments[0].startswith("-"):
            command = arguments.pop(0)
            program = f"hetero-fl {command}"
            launcher.append(command)
    try:
        return _call(program, command, arguments)
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]
        # The broken pipe may belong to another process instead of the output.
        if not closed:
            raise
        # Discard buffered output, so that flushing it on exit does not fail.
        for stream in closed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt as interrupt:
        echo(_describe_interrupt(interrupt, command, launcher, arguments), err=True)
        return INTERRUPTED


def _call(program: str, command: str | None, arguments: list[str]) -> int:
    """Run a command and return its exit status. Expected errors are printed in one line."""
    is_verbose = any(map(VERBOSE.fullmatch, arguments))
    try:
        with translate_exits():
            return _invoke_with_permission(program, command, arguments)
    except UserError as error:
        return _print_error("error", error, is_verbose, status=2)
    except RunFailedError as error:
        return _print_error("failed", error, is_verbose, status=1)
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        then = "continue with --resume" if command in RESUMABLE else "repeat the command"
        echo(f"failed: {WRITE_ERRORS[error.errno]} and {then}", err=True)
        return 1


def _invoke_with_permission(program: str, command: str | None, arguments: list[str]) -> int:
    """Run a command, and again each time that the user permits code that it names."""
    permitted: frozenset[str] = frozenset()
    while True:
        try:
            return _invoke(program, command, arguments, permitted)
        except UserError as error:
            found = _ask_permission(error)
            if not found:
                raise
            permitted |= found


def _ask_permission(error: BaseException | None) -> frozenset[str]:
    """Ask in a terminal whether the code may run whose refusal is the cause of an error.

    Returns:
        The references to the code, or nothing if there are none or the user refuses one.
    """
    while error is not None and not isinstance(error, CodeRefusedError):
        error = error.__cause__ or error.__context__
    in_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    if error is None or not in_terminal or not all(map(REFERENCE.fullmatch, error.refused)):
        return frozenset()
    for reference, place in error.refused.items():
        module, _, name = reference.removeprefix(CODE_PREFIX).partition(":")
        names = f"{place} names code: " if place else ""
        echo(f"{names}{name} of module {module}. Run it? [y/N] ", err=True, end="")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            return frozenset()
    return frozenset(error.refused)


def _invoke(
    program: str, command: str | None, arguments: list[str], permitted: frozenset[str]
) -> int:
    """Parse and run a command, and return its exit status.

    Args:
        program: Name under which the command was called, for messages.
        command: Name of the command.
        arguments: Arguments of the command.
        permitted: References to code that the user has permitted.
    """
    from click.exceptions import Exit

    from hetero_fl.cli.commands import COMPLETION_VARIABLE, complete, parse_command

    if COMPLETION_VARIABLE in os.environ:
        return complete(os.environ[COMPLETION_VARIABLE])
    try:
        with parse_command(program, command, arguments) as context:
            # Without the flag, code that the command line names needs permission, too.
            if context.params.get("allow_code") is False:
                context.params["allow_code"] = permitted
            context.command.invoke(context)
        return 0
    except Exit as exit_request:
        return exit_request.exit_code
    except ModuleNotFoundError as error:
        missing = describe_missing_package(error)
        if missing is None:
            raise
        raise UserError(missing) from error
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()


def _describe_interrupt(
    interrupt: KeyboardInterrupt, command: str | None, launcher: list[str], arguments: list[str]
) -> str:
    """Return the message for an interrupted command, with the command that continues its work."""
    if command in REPEATABLE:
        return f"interrupted; to resume: {shlex.join([*launcher, *arguments])}"
    if isinstance(interrupt, Interrupted):
        permission = ["--allow-code"] if "--allow-code" in arguments else []
        resume = [*launcher, "--resume", "--out", str(interrupt.path), *permission]
        return f"interrupted; to resume: {shlex.join(resume)}"
    if command in RESUMABLE:
        return "interrupted before the first checkpoint; there is no run to resume"
    return "interrupted"


def _print_error(kind: str, error: Exception, is_verbose: bool, status: int) -> int:
    """Print an error in one line, after the tracebacks of its causes if `is_verbose` is set."""
    chain: list[BaseException] = []
    cause: BaseException | None = error if is_verbose else None
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for cause in reversed(chain):
        echo("".join(traceback.format_exception(cause, chain=False)), err=True, end="")
    message = str(error).replace("pass allow_code=True", "pass --allow-code")
    if isinstance(error, ArgumentError):
        from hetero_fl.cli.commands import option_name

        # An option replaces the name of an argument.
        argument = re.split(r"\W", message, maxsplit=1)[0]
        message = f"{option_name(argument)}{message.removeprefix(argument)}"
    echo(f"{kind}: {message}", err=True)
    return status


def _is_closed(stream: TextIO) -> bool:
    """Return whether a stream is a pipe that its reader has closed.

    The result is always False on Windows.
    """
    try:
        poll = select.poll()
        poll.register(stream, 0)
    except (AttributeError, OSError, TypeError, ValueError):
        # The stream is not a file, or the system has no `poll`.
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _script_name() -> list[str]:
    """Return the command that started this script, such as `python scripts/train.py`."""
    command_line = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    if TORCHRUN_VARIABLE in os.environ:
        # torchrun has added `python -u`.
        return ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], *command_line[2:]]
    return command_line


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Print each warning of this project once, as `warning: …`, until the end of the block.

    Warnings of other libraries are printed as usual.
    """
    before = warnings.showwarning
    printed = set()

    # The function is called with the message, the category, the file name and further arguments.
    def show(*arguments: Any, **options: Any) -> None:
        line = f"warning: {arguments[0]}"
        if sys.stderr is None or not is_own_file(arguments[2]):
            before(printable_lines(str(arguments[0])), *arguments[1:], **options)
        elif line not in printed:
            printed.add(line)
            echo(line, err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _interrupt(times: list[float], _number: int, _frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, unless the first of the interrupts at these times was just now."""
    times.append(time.monotonic())
    if len(times) == 1 or times[-1] - times[0] > EXIT_SECONDS:
        raise KeyboardInterrupt
