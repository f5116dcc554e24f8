"""Options shared by `train`, `federate` and `server`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hetero_fl.utils.code_permission import OWN, CodePermission
from hetero_fl.utils.errors import UserError, closest, printable
from hetero_fl.utils.version import __version__

if TYPE_CHECKING:
    from hetero_fl.reporting.run import Run


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes."""
    parser.add_argument("--version", action="version", version=f"hetero-fl {__version__}")
    parser.add_argument("-q", "--quiet", action="store_true", help="print results and errors only")
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="print the tracebacks of an error and its causes before it",
    )


def make_printer(options: argparse.Namespace) -> Callable[[str], None]:
    """Return what prints a notice to stderr, or does nothing with `--quiet`."""

    def say(line: str) -> None:
        if not options.quiet:
            print(line, file=sys.stderr)

    return say


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """A configuration, changes to it, a run directory."""
    told = "YAML or JSON; with --resume, by default that of the run in --out"
    parser.add_argument("--config", "-c", "--conf", type=Path, metavar="FILE", help=told)
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="changes to the configuration"
    )
    parser.add_argument("--out", type=Path, help="run directory (default: runs/<name>-<timestamp>)")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest whole checkpoint in --out"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="print the resolved configuration and what the run will cost",
    )
    add_code_option(parser)


def add_code_option(parser: argparse.ArgumentParser) -> None:
    """Add `--allow-code`."""
    told = "run the code that a file or an option names as python:module:Name (default: ask in a terminal, else refuse)"
    parser.add_argument("--allow-code", action="store_true", help=told)


def code_permission_from(options: argparse.Namespace) -> CodePermission:
    """Return the permission that `--allow-code` gives; without the flag, a question in a terminal gives it."""
    in_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    return CodePermission(
        everything=options.allow_code, ask=_ask_permission if in_terminal else None
    )


def _ask_permission(where: str, key: str, reference: str) -> bool:
    module, _, name = reference.removeprefix(OWN).partition(":")
    place = printable(": ".join(filter(None, [where, key])))
    print(
        f"{place} names code: {name} of module {module}. Run it? [y/N] ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def load_checked_run(options: argparse.Namespace, permission: CodePermission) -> Path | None:
    """Return the configuration of the run that is asked for; None if it was only to be checked, and is. Raises UserError."""
    from hetero_fl.reporting.run_directory import has_run

    if options.resume and options.out is None:
        raise UserError("--resume: which run? name its directory with --out")
    begun = options.resume and has_run(options.out)
    if options.config is None and not begun:
        if options.resume:
            raise UserError(
                f"--out: {options.out} is no run to go on with{_similar_run(options.out)} (a new one needs --config)"
            )
        raise UserError("--config is missing: name a file (see --help)")
    source: Path = options.config or options.out / "config.yaml"
    if options.check:
        from hetero_fl.cli.printing import print_check, print_draft
        from hetero_fl.experiment import prepare
        from hetero_fl.experiment.preparation import draft_config

        draft = draft_config(source, options.overrides)
        if refused := dict(permission.find_refused(draft.code_references, draft.key_source)):
            print_draft(draft.config, refused)
        else:
            print_check(prepare(source, options.overrides, allow_code=permission))
        return None
    # the first turn of a job that is always started with --resume
    if options.resume and _is_vacant(options.out):
        make_printer(options)(
            f"nothing to resume in {options.out}: starting a new run{_similar_run(options.out)}"
        )
    return source


def print_results_location(finished: Run, say: Callable[[str], None]) -> None:
    """Print where the results of a run are."""
    if (finished.path / "report.html").exists():
        say(f"report: {finished.path / 'report.html'}")
    print(finished.path)


def _similar_run(out: Path) -> str:
    """A run directory beside it whose name is nearly that of one that is not there."""
    runs = [mark.parent.name for mark in out.parent.glob("*/environment.json")]
    meant = closest(out.name, runs)
    return "" if meant is None else f"; did you mean {out.parent / meant}?"


def _is_vacant(out: Path) -> bool:
    """Return whether nothing exists at a place, or an empty folder."""
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))
