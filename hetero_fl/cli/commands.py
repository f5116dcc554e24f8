"""What each command takes and does: parse, call, print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hetero_fl.cli import Parser, deployment_commands, experiment_commands
from hetero_fl.cli.run_options import (
    add_code_option,
    add_common_options,
    add_run_options,
    code_permission_from,
    load_checked_run,
    make_printer,
    print_results_location,
)
from hetero_fl.utils.code_permission import find_references
from hetero_fl.utils.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

Setup = Callable[[argparse.ArgumentParser], None]
HINT = (
    "`hetero-fl methods` lists what algorithm.name may be: what each method does, sends and needs."
)


def _setup_train(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.set_defaults(run_command=_run_train)


def _run_train(options: argparse.Namespace) -> int:
    permission = code_permission_from(options)
    if (source := load_checked_run(options, permission)) is None:
        return 0
    from hetero_fl.experiment import run

    finished = run(
        source,
        out=options.out,
        resume=options.resume,
        overrides=options.overrides,
        quiet=options.quiet,
        allow_code=permission,
    )
    print_results_location(finished, make_printer(options))
    return 0


def _setup_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE|NAME",
        help="a local file or folder, or a source by name",
    )
    parser.add_argument(
        "--label",
        metavar="COLUMN",
        help="of a table: the column of labels (several: A,B,…; default: the run's own)",
    )
    parser.add_argument("--client", help="only this client's model")
    parser.add_argument(
        "--home", action="store_true", help="read with the client's own label frequencies"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    add_code_option(parser)
    parser.set_defaults(run_command=_run_evaluate)


def _run_evaluate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from hetero_fl.experiment import evaluate
    from hetero_fl.reporting.run import Run

    if options.json and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise UserError(f"--json: found {options.json}; name a file in a folder that exists")
    permission = code_permission_from(options)
    run = Run(options.run, permission)
    say = make_printer(options)
    results = evaluate(
        run,
        options.data,
        options.client,
        options.home,
        options.label,
        permission,
        lambda note: say(f"note: {note}"),
    )
    unit = next(iter(run.models.values())).task.unit
    print_scores(
        results,
        f"{options.run} on {options.data}" + (f", errors in {unit}" if unit else ""),
        Console(),
    )
    if options.json:
        try:
            options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--json: {options.json}: cannot be written ({error.strerror})"
            ) from None
    return 0


def print_scores(
    results: Mapping[str, Mapping[str, float | None]], title: str, console: Console
) -> None:
    """A row a model; in a terminal too narrow for that, a row a figure. Nothing is clipped."""
    from rich.measure import Measurement
    from rich.table import Table

    names = list(next(iter(results.values())))
    wide = Table("model", *(n.replace("_", " ") for n in names), title=title)
    long = Table("model", "figure", "value", title=title)
    for column in [*wide.columns, *long.columns]:
        column.overflow = "fold"
    for model, scores in results.items():
        told = ["–" if scores[n] is None else f"{scores[n]:.3f}" for n in names]
        wide.add_row(model, *told)
        for name, value in zip(names, told, strict=True):
            long.add_row(model, name.replace("_", " "), value)
    # measured there, a table is as wide as its longest words need
    unbounded = console.options.update(width=10_000)
    fits = Measurement.get(console, unbounded, wide).minimum <= console.width
    console.print(wide if fits else long)


def _setup_methods(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="explain these and their settings (default: all, a line each)",
    )
    add_code_option(parser)
    parser.set_defaults(run_command=_run_methods)


def _run_methods(options: argparse.Namespace) -> int:
    from rich.console import Console

    from hetero_fl.cli.printing import print_method_details, print_methods

    code_permission_from(options).check(dict.fromkeys(find_references(options.names), "NAME"), "")
    if options.names:
        print_method_details(options.names, Console())
    else:
        print_methods(Console())
    return 0


COMMANDS: dict[str, tuple[str, Setup]] = {
    "train": ("one run: configuration in, finished run directory out", _setup_train),
    "federate": (
        "the same by a real federation on this machine, a process for each client",
        deployment_commands.setup_federate,
    ),
    "server": ("a run with nodes on other machines", deployment_commands.setup_server),
    "node": ("one site of such a run, on a machine of its own", deployment_commands.setup_node),
    "certificates": (
        "what the machines of a federation know each other by",
        deployment_commands.setup_certificates,
    ),
    "status": (
        "how a run across machines stands: nodes, round, figures",
        deployment_commands.setup_status,
    ),
    "compare": ("algorithms × seeds: table, figure and report", experiment_commands.setup_compare),
    "evaluate": ("score the saved models of a run on any data set", _setup_evaluate),
    "join": (
        "a newcomer begins with what a finished run leaves, and is compared with one from scratch",
        experiment_commands.setup_join,
    ),
    "audit": (
        "what a finished run gives away: who was a member, and images out of an upload",
        experiment_commands.setup_audit,
    ),
    "export": (
        "models of a finished run as files that predict without this package, each with a card",
        experiment_commands.setup_export,
    ),
    "check": (
        "whether a run directory is whole: every line, checksum, model and checkpoint",
        experiment_commands.setup_check,
    ),
    "methods": ("the algorithms, a line each: what it does, sends and needs", _setup_methods),
}


def build_parser(command: str, prog: str) -> Parser:
    """The parser of one command."""
    about, setup = COMMANDS[command]
    made = Parser(prog=prog, description=about, epilog=HINT, allow_abbrev=False)
    setup(made)
    add_common_options(made)
    return made


def build_main_parser() -> Parser:
    """The parser that tells which commands there are."""
    made = Parser(
        prog="hetero-fl",
        description="Federated learning between participants whose models differ.",
        epilog=HINT,
    )
    add_common_options(made)
    commands = made.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (about, _) in COMMANDS.items():
        commands.add_parser(name, help=about)
    return made
