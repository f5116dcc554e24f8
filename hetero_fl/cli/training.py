"""The commands `train` and `federate`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hetero_fl.utils.code_permission import AllowCode, find_references
from hetero_fl.utils.errors import UserError, closest, echo

if TYPE_CHECKING:
    from hetero_fl.reporting.run import Run


def train(
    overrides: tuple[str, ...],
    *,
    config: Path | None = None,
    out: Path | None = None,
    resume: bool = False,
    check: bool = False,
    allow_code: AllowCode = False,
    quiet: bool = False,
) -> None:
    """Train a federation in simulation and write a run directory.

    Args:
        config: Configuration file (YAML or JSON). Optional with --resume.
        out: Run directory.  [default: runs/<name>-<timestamp>]
        resume: Continue the run in --out from its last checkpoint.
        check: Print the resolved configuration and the expected cost, and exit.

    Example:
        hetero-fl train -c configs/digits_quickstart.yaml
        hetero-fl train -c configs/digits_quickstart.yaml rounds=5 algorithm.name=fedprox
        hetero-fl train --resume --out runs/my-run
    """
    from hetero_fl.experiment import run

    finished = _run_or_check(
        run, config, overrides, out, resume=resume, check=check, allow_code=allow_code, quiet=quiet
    )
    if finished is not None and (advice := comparison_command(finished)):
        make_printer(quiet)(f"compare with training alone: {advice}")


def federate(
    overrides: tuple[str, ...],
    *,
    config: Path | None = None,
    out: Path | None = None,
    resume: bool = False,
    check: bool = False,
    allow_code: AllowCode = False,
    quiet: bool = False,
) -> None:
    """Train with a server and one process per client on this machine.

    Args:
        config: Configuration file (YAML or JSON). Optional with --resume.
        out: Run directory.  [default: runs/<name>-<timestamp>]
        resume: Continue the run in --out from its last checkpoint.
        check: Print the resolved configuration and the expected cost, and exit.

    Example:
        hetero-fl federate -c configs/digits_quickstart.yaml rounds=2
    """
    from hetero_fl.deployment.local import run_local_federation

    _run_or_check(
        run_local_federation,
        config,
        overrides,
        out,
        resume=resume,
        check=check,
        allow_code=allow_code,
        quiet=quiet,
    )


def _run_or_check(
    run: Callable[..., Run],
    config: Path | None,
    overrides: tuple[str, ...],
    out: Path | None,
    *,
    resume: bool,
    check: bool,
    allow_code: AllowCode,
    quiet: bool,
) -> Run | None:
    """Train and print the run directory, or print the configuration and the cost with `check`.

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
        _print_check(config, overrides, allow_code)
        return None
    finished = run(
        config, out=out, overrides=overrides, resume=resume, quiet=quiet, allow_code=allow_code
    )
    if (finished.path / "report.html").exists():
        make_printer(quiet)(f"report: {finished.path / 'report.html'}")
    echo(finished.path)
    return finished


def _print_check(config: Path, overrides: tuple[str, ...], allow_code: AllowCode) -> None:
    """Print the resolved configuration and the expected cost."""
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


def comparison_command(run: Run) -> str:
    """Return the command that compares a run's method with training alone and with FedAvg.

    FedAvg needs clients of the same architecture; without them, Hybrid takes its place if there is
    a proxy set. The command is empty if only training alone is left.
    """
    config = run.directory.config()
    groups = [client["group"] for client in run.directory.details()["clients"].values()]
    possible = {"fedavg": len({*groups}) < len(groups), "hybrid": run.summary["data"]["n_proxy"]}
    federated = [name for name, is_possible in possible.items() if is_possible][:1]
    names = list(dict.fromkeys(["local", *federated, run.summary["algorithm"]]))
    command = [
        *("hetero-fl", "compare", "--config", f"{run.path}/config.yaml"),
        *("--algorithms", ",".join(names), "--seeds", str(run.summary["seed"])),
        *("--out", f"{run.path}-comparison-{config['rounds']}"),
        # The settings of the run that comparisons do not have by default.
        "output.best_models=false",
        *(["runtime.mode=sync"] if config["runtime"]["mode"] == "async" else []),
        *(["--allow-code"] if find_references(config) else []),
    ]
    return shlex.join(command) if len(names) > 1 else ""


def make_printer(quiet: bool) -> Callable[[str], None]:
    """Return a function that prints a line to stderr unless `quiet` is set."""

    def print_line(line: str) -> None:
        if not quiet:
            echo(line, err=True)

    return print_line


def _similar_run(out: Path) -> str:
    """Suggest a run directory with a similar name, if there is one, for a message."""
    runs = [file.parent.name for file in out.parent.glob("*/environment.json")]
    match = closest(out.name, runs)
    return "" if match is None else f"; did you mean {out.parent / match}?"
