"""Options that several commands share, and what `train`, `federate` and `server` do with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hetero_fl.utils.code_permission import OWN, CodePermission
from hetero_fl.utils.errors import UserError, closest, printable

if TYPE_CHECKING:
    from hetero_fl.reporting.run import Run

HINT = (
    "`hetero-fl methods` lists what algorithm.name may be: what each method does, sends and needs."
)
PATH = click.Path(path_type=Path)
QUIET_HELP = "print results and errors only"

command = partial(
    click.command,
    epilog=HINT,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)

allow_code_option = click.option(
    "--allow-code",
    is_flag=True,
    help="run the code that a file or an option names as python:module:Name "
    "(default: ask in a terminal, else refuse)",
)
config_option = click.option(
    "--config",
    "-c",
    "--conf",
    type=PATH,
    metavar="FILE",
    help="YAML or JSON; with --resume, by default that of the run in --out",
)
overrides_argument = click.argument(
    "overrides", nargs=-1, metavar="[key.path=value]...", help="changes to the configuration"
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help=QUIET_HELP)
run_argument = click.argument("run", type=PATH, metavar="RUN", help="directory of a finished run")


def run_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of commands that train: a configuration, changes to it, a run directory."""
    for add in (
        quiet_option,
        allow_code_option,
        click.option(
            "--check",
            is_flag=True,
            help="print the resolved configuration and what the run will cost",
        ),
        click.option(
            "--resume", is_flag=True, help="continue from the newest whole checkpoint in --out"
        ),
        click.option("--out", type=PATH, help="run directory (default: runs/<name>-<timestamp>)"),
        config_option,
        overrides_argument,
    ):
        function = add(function)
    return function


def training_command(function: Callable[..., Run]) -> click.Command:
    """Make the command of a function that trains, with the options of `run_options`.

    The function receives the configuration, the command's own options, and `out`, `resume`,
    `overrides`, `quiet` and `allow_code` as `hetero_fl.run` takes them; it returns the finished
    run. With `--check` it is not called.
    """

    @run_options
    @wraps(function)
    def train(
        overrides: tuple[str, ...],
        config: Path | None,
        out: Path | None,
        resume: bool,
        check: bool,
        allow_code: bool,
        quiet: bool,
        **own_options: Any,
    ) -> None:
        permission = code_permission(allow_code)
        say = make_printer(quiet)
        source = load_checked_run(config, overrides, out, resume, check, permission, say)
        if source is None:
            return
        finished = function(
            source,
            out=out,
            resume=resume,
            overrides=overrides,
            quiet=quiet,
            allow_code=permission,
            **own_options,
        )
        if (finished.path / "report.html").exists():
            say(f"report: {finished.path / 'report.html'}")
        print(finished.path)

    return command()(train)


def make_printer(quiet: bool) -> Callable[[str], None]:
    """Return what prints a notice to stderr, or does nothing with `--quiet`."""

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr)

    return say


def code_permission(allow_code: bool) -> CodePermission:
    """Return the permission that `--allow-code` gives; without the flag, a question in a terminal gives it."""
    in_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    return CodePermission(everything=allow_code, ask=_ask_permission if in_terminal else None)


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


def load_checked_run(
    config: Path | None,
    overrides: Sequence[str],
    out: Path | None,
    resume: bool,
    check: bool,
    permission: CodePermission,
    say: Callable[[str], None],
) -> Path | None:
    """Return the configuration of the run that the options name; None if it was only to be checked.

    Args:
        config: `--config`.
        overrides: Changes to the configuration.
        out: `--out`.
        resume: `--resume`.
        check: `--check`: print the configuration and the expected cost.
        permission: Whether code that the configuration names may run.
        say: Prints a notice.

    Raises:
        UserError: If the options name no run.
    """
    from hetero_fl.reporting.run_directory import has_run

    if resume and out is None:
        raise UserError("--resume: which run? name its directory with --out")
    if config is None and out is not None and resume:
        if not has_run(out):
            raise UserError(
                f"--out: {out} is no run to continue{_similar_run(out)} (a new one needs --config)"
            )
        config = out / "config.yaml"
    if config is None:
        raise UserError("--config is missing: name a file (see --help)")
    if check:
        from hetero_fl.cli.printing import print_check, print_draft
        from hetero_fl.experiment import prepare
        from hetero_fl.experiment.preparation import draft_config

        draft = draft_config(config, overrides)
        if refused := dict(permission.find_refused(draft.code_references, draft.key_source)):
            print_draft(draft.config, refused)
        else:
            print_check(prepare(config, overrides, allow_code=permission))
        return None
    # the first turn of a job that is always started with --resume
    if resume and out is not None and _is_vacant(out):
        say(f"nothing to resume in {out}: starting a new run{_similar_run(out)}")
    return config


def _similar_run(out: Path) -> str:
    """Return the name of a run directory next to it whose name is nearly that of one that is not there."""
    runs = [mark.parent.name for mark in out.parent.glob("*/environment.json")]
    meant = closest(out.name, runs)
    return "" if meant is None else f"; did you mean {out.parent / meant}?"


def _is_vacant(out: Path) -> bool:
    """Return whether nothing exists at a place, or an empty folder."""
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))
