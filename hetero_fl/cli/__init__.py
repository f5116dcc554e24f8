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
from dataclasses import dataclass
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

VERBOSE = re.compile(r"-q*v[qv]*|--verbose")

# Commands that are repeated to continue.
REPEATABLE = ("compare",)
# Commands whose runs have checkpoints.
RESUMABLE = ("train", "federate")
# Options that may also precede the command.
LEADING_OPTIONS = re.compile(r"-[qv]+|--verbose|--quiet")

# Names of options that differ from the names of the corresponding function arguments.
OPTION_NAMES = {
    "file_format": "format",
    "hosts": "host",
    "transfer": "take",
}

# 128 + SIGPIPE, a signal that Windows does not define.
PIPE_CLOSED = 141

# Descriptions of failed writes, with a remedy, keyed by error number.
WRITE_ERRORS = {
    errno.ENOSPC: "no space left on the disk; free some space",
    errno.EDQUOT: "no space left in your disk quota; free some space",
    errno.EFBIG: "a file would exceed the limit of file sizes; raise it (ulimit -f)",
}

# Status of a command that was interrupted, 128 + SIGINT.
INTERRUPTED = 130
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
    """Call `_main`, and treat SIGTERM, which clusters send to stop jobs, like Ctrl-C.

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
            status = _main(argv, command)
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


def _main(argv: Sequence[str] | None, command: str | None) -> int:
    """Call `_dispatch` and return 141 if the reader of stdout or stderr closed the pipe."""
    try:
        return _dispatch(argv, command)
    except (BrokenPipeError, SystemExit) as error:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]
        # Rich exits after a broken pipe.
        is_from_rich = isinstance(error, SystemExit) and isinstance(
            error.__context__, BrokenPipeError
        )
        # The broken pipe may belong to another process instead of the output.
        if not is_from_rich and (isinstance(error, SystemExit) or not closed):
            raise
        # Discard buffered output, so that flushing it on exit does not fail.
        for stream in closed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return PIPE_CLOSED


def _is_closed(stream: TextIO | None) -> bool:
    """Return whether a stream is a pipe that its reader has closed.

    The result is always False on Windows.
    """
    if not hasattr(select, "poll"):
        return False
    try:
        descriptor = -1 if stream is None else stream.fileno()
    except (OSError, ValueError):
        # The stream is not a file.
        return False
    if descriptor < 0:
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@dataclass(frozen=True)
class Invocation:
    """A command with its arguments.

    Args:
        prog: Name under which the command was called, for messages.
        command: Name of the command, or None for `hetero-fl` without a command.
        arguments: Arguments of the command.
        command_line: The whole command line, from which the command that resumes a run is derived.
        is_verbose: Whether to print tracebacks.
    """

    prog: str
    command: str | None
    arguments: list[str]
    command_line: list[str]
    is_verbose: bool


def _parse_invocation(argv: Sequence[str] | None, command: str | None) -> Invocation:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if command is None:
        # Move options that precede the command after it: `hetero-fl --quiet train`.
        leading = list(itertools.takewhile(LEADING_OPTIONS.fullmatch, arguments))
        arguments = [*arguments[len(leading) :][:1], *leading, *arguments[len(leading) + 1 :]]
    is_verbose = any(map(VERBOSE.fullmatch, arguments))
    launcher = _script_name() if command or TORCHRUN_VARIABLE in os.environ else ["hetero-fl"]
    command_line = [*launcher, *arguments]
    prog = f"{command}.py" if command else "hetero-fl"
    if command is None and arguments and not arguments[0].startswith("-"):
        command = arguments.pop(0)
        prog = f"hetero-fl {command}"
    return Invocation(prog, command, arguments, command_line, is_verbose)


def _dispatch(argv: Sequence[str] | None, command: str | None) -> int:
    """Run a command and return its exit status.

    Expected errors are printed in one line. Other exceptions are raised.
    """
    invocation = _parse_invocation(argv, command)
    options: dict[str, Any] = {}
    try:
        with translate_exits():
            return _invoke_with_permission(invocation, options)
    except UserError as error:
        _print_error("error", error, invocation.is_verbose)
        return 2
    except RunFailedError as error:
        _print_error("failed", error, invocation.is_verbose)
        return 1
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        then = "continue with --resume" if invocation.command in RESUMABLE else "repeat the command"
        echo(f"failed: {WRITE_ERRORS[error.errno]} and {then}", err=True)
        return 1
    except Interrupted as interruption:
        resume_command = _resume_command(invocation, options, interruption)
        echo(f"interrupted; to resume: {shlex.join(resume_command)}", err=True)
    except KeyboardInterrupt:
        echo(_describe_early_interrupt(invocation), err=True)
    return INTERRUPTED


def _describe_early_interrupt(invocation: Invocation) -> str:
    """Return the message for a command that was interrupted before its run began."""
    if invocation.command in REPEATABLE:
        return f"interrupted; to resume: {shlex.join(invocation.command_line)}"
    if invocation.command in RESUMABLE:
        return "interrupted before the first checkpoint; there is no run to resume"
    return "interrupted"


def _invoke_with_permission(invocation: Invocation, options: dict[str, Any]) -> int:
    """Run a command, and again each time that the user permits code that it names."""
    permitted: frozenset[str] = frozenset()
    while True:
        try:
            return _invoke(invocation, options, permitted)
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


def _invoke(invocation: Invocation, options: dict[str, Any], permitted: frozenset[str]) -> int:
    """Parse and run a command.

    Args:
        invocation: The command and its arguments.
        options: Dictionary to which the parsed options are added, even if the command fails.
        permitted: References to code that the user has permitted.

    Returns:
        The exit status.
    """
    from click.exceptions import Exit

    from hetero_fl.cli.commands import COMPLETION_VARIABLE, complete, parse_command

    if COMPLETION_VARIABLE in os.environ:
        return complete(os.environ[COMPLETION_VARIABLE])
    try:
        with parse_command(invocation.prog, invocation.command, invocation.arguments) as context:
            if permitted:
                context.params["allow_code"] = permitted
            options.update(context.params)
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


def _resume_command(
    invocation: Invocation, options: dict[str, Any], interruption: Interrupted
) -> list[str]:
    """Return the command line that resumes an interrupted run."""
    command_line = invocation.command_line
    if invocation.command in REPEATABLE:
        resume_command = list(command_line)
    else:
        program = command_line[: len(command_line) - len(invocation.arguments)]
        resume_command = [*program, "--resume", "--out", str(interruption.path)]
    if invocation.command == "server":
        resume_command += ["--server", str(options["server_file"])]
    if options["allow_code"] and "--allow-code" not in resume_command:
        resume_command.append("--allow-code")
    return resume_command


def _print_error(kind: str, error: BaseException, verbose: bool) -> None:
    """Print an error in one line.

    If `verbose` is set, the tracebacks of the error and its causes are printed first.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error if verbose else None
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for cause in reversed(chain):
        echo("".join(traceback.format_exception(cause, chain=False)), err=True, end="")
    echo(f"{kind}: {_message(error)}", err=True)


def _message(error: BaseException) -> str:
    """Return the message of an error, in which an option replaces the name of an argument."""
    message = str(error).replace("pass allow_code=True", "pass --allow-code")
    if not isinstance(error, ArgumentError):
        return message
    argument = re.split(r"\W", message, maxsplit=1)[0]
    option = OPTION_NAMES.get(argument, argument)
    return f"--{option}{message.removeprefix(argument)}"


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
