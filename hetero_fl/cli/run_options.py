"""Options that several commands share, and common code of `train` and `federate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hetero_fl.utils.errors import UserError, closest, echo

if TYPE_CHECKING:
    from hetero_fl.reporting.run import Run
    from hetero_fl.utils.code_permission import AllowCode

METHODS_HINT = "Run `hetero-fl methods` to list the valid values of algorithm.name."
PATH = click.Path(path_type=Path)
QUIET_HELP = "Print only results, warnings and errors."
PERSONAL_HELP = (
    "Predict as on the client's own examples: use its label frequencies and its own BatchNorm "
    "statistics if the run used them for the local test."
)

command = partial(
    click.command,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)


def examples(*lines: str, hint: str = "") -> str:
    """Format the epilog of a help page.

    Args:
        *lines: Lines of examples, which click does not rewrap.
        hint: Sentence below the examples.
    """
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines), "", hint])


allow_code_option = click.option(
    "--allow-code",
    is_flag=True,
    # Without the flag, code that the command line names needs permission, too.
    callback=lambda _context, _option, is_set: is_set or frozenset(),
    help="Allow running code that a file or an option names as python:module:Name. Without this "
    "flag, you are asked for permission; if there is no terminal, permission is denied.",
)


def config_option(text: str = "Configuration file (YAML or JSON).") -> Callable[[Any], Any]:
    """Create the option `--config` with a help text."""
    return click.option("--config", "-c", "--conf", type=PATH, metavar="FILE", help=text)


overrides_argument = click.argument(
    "overrides",
    nargs=-1,
    metavar="[key.path=value]...",
    help="Configuration keys to override, such as rounds=5.",
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help=QUIET_HELP)
run_argument = click.argument(
    "run", type=PATH, metavar="RUN", help="Run directory of a finished run."
)
best_option = click.option(
    "--best",
    type=click.Choice(["personal", "global"]),
    help="Use the models of the round with the best local (personal) or global validation score.  "
    "[default: models of the last round]",
)


def run_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that all training commands share, such as `--config` and `--out`."""
    for add in (
        quiet_option,
        allow_code_option,
        click.option(
            "--check",
            is_flag=True,
            help="Print the resolved configuration and the expected cost, and exit.",
        ),
        click.option(
            "--resume", is_flag=True, help="Continue the run in --out from its last checkpoint."
        ),
        click.option(
            "--out",
            type=PATH,
            metavar="DIR",
            help="Run directory.  [default: runs/<name>-<timestamp>]",
        ),
        config_option("Configuration file (YAML or JSON). Optional with --resume."),
        overrides_argument,
    ):
        function = add(function)
    return function


def training_command(*lines: str) -> Callable[[Callable[..., Run]], click.Command]:
    """Return a decorator that converts a training function to a command.

    The command has the options that `run_options` adds. The function receives the path of the
    configuration, the additional options of the command, and the arguments `out`, `resume`,
    `overrides`, `quiet` and `allow_code` of `hetero_fl.run`. The function must return the finished
    run. With `--check`, the function is not called.

    Args:
        *lines: Examples for the help page.
    """
    return lambda function: _make_training_command(function, examples(*lines, hint=METHODS_HINT))


def _make_training_command(function: Callable[..., Run], epilog: str) -> click.Command:

    @run_options
    @wraps(function)
    def train(
        *,
        overrides: tuple[str, ...],
        config: Path | None,
        out: Path | None,
        resume: bool,
        check: bool,
        allow_code: AllowCode,
        quiet: bool,
        **own_options: Any,
    ) -> None:
        log = make_printer(quiet)
        source = load_checked_run(
            config=config,
            overrides=overrides,
            out=out,
            resume=resume,
            check=check,
            allow_code=allow_code,
            log=log,
        )
        if source is None:
            return
        finished = function(
            source,
            out=out,
            resume=resume,
            overrides=overrides,
            quiet=quiet,
            allow_code=allow_code,
            **own_options,
        )
        if (finished.path / "report.html").exists():
            log(f"report: {finished.path / 'report.html'}")
        echo(finished.path)

    return command(epilog=epilog)(train)


def make_printer(quiet: bool) -> Callable[[str], None]:
    """Return a function that prints a line to stderr unless `quiet` is set."""

    def print_line(line: str) -> None:
        if not quiet:
            echo(line, err=True)

    return print_line


def load_checked_run(
    *,
    config: Path | None,
    overrides: Sequence[str],
    out: Path | None,
    resume: bool,
    check: bool,
    allow_code: AllowCode,
    log: Callable[[str], None],
) -> Path | None:
    """Check the options of a training command and return the configuration file of the run.

    With `check`, the configuration and the expected cost are printed instead.

    Args:
        config: Value of `--config`.
        overrides: Overrides of the configuration.
        out: Value of `--out`.
        resume: Whether `--resume` is set.
        check: Whether `--check` is set.
        allow_code: Whether code that the configuration refers to may run.
        log: Function that prints a line.

    Returns:
        The configuration file of the run to start or resume, or None with `check`.

    Raises:
        UserError: If an option is missing, or if `out` of a run to resume is not a run directory.
    """
    from hetero_fl.reporting.run_directory import has_run

    if resume and out is None:
        raise UserError("--resume: requires --out, the directory of the run to continue")
    if config is None and out is not None and resume:
        if not has_run(out):
            raise UserError(
                f"--out: {out} is not a run directory{_similar_run(out)} "
                "(a new run requires --config)"
            )
        config = out / "config.yaml"
    if config is None:
        raise UserError("--config: missing; expected a YAML or JSON file (see --help)")
    if check:
        from hetero_fl.cli.printing import print_check, print_draft
        from hetero_fl.experiment import prepare
        from hetero_fl.experiment.configuration import draft_config
        from hetero_fl.reporting.run_loggers import check_loggers

        draft = draft_config(config, overrides)
        if draft.code_references and not allow_code:
            print_draft(draft.config, draft.code_references)
        else:
            prepared = prepare(config, overrides, allow_code=allow_code)
            check_loggers(prepared.config)
            print_check(prepared)
        return None
    # Jobs on clusters are often started with --resume from the beginning, so this is no error.
    if resume and out is not None and _is_vacant(out) and (hint := _similar_run(out)):
        log(f"{out}: no run to resume{hint}")
    return config


def _similar_run(out: Path) -> str:
    """Suggest a run directory with a similar name, if there is one, for a message."""
    runs = [file.parent.name for file in out.parent.glob("*/environment.json")]
    match = closest(out.name, runs)
    return "" if match is None else f"; did you mean {out.parent / match}?"


def _is_vacant(out: Path) -> bool:
    """Return whether a path does not exist or is an empty folder."""
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))
