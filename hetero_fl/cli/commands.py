"""The commands `train`, `evaluate` and `methods`, and the group of all commands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click import Context, Group, Option, Parameter
from click.exceptions import BadParameter, Exit, MissingParameter, NoSuchOption, UsageError
from click.shell_completion import shell_complete
from typing_extensions import override

from hetero_fl.cli.deployment_commands import (
    audit_log,
    federate,
    flower_app,
    shared_key,
    status,
)
from hetero_fl.cli.experiment_commands import audit, check, compare, export, join
from hetero_fl.cli.run_options import (
    METHODS_HINT,
    PATH,
    PERSONAL_HELP,
    QUIET_HELP,
    allow_code_option,
    best_option,
    command,
    examples,
    make_printer,
    quiet_option,
    run_argument,
    training_command,
)
from hetero_fl.utils.code_permission import check_code, find_references
from hetero_fl.utils.errors import (
    UserError,
    describe_removed,
    echo,
    suggest_or_list,
    suggest_similar,
)
from hetero_fl.utils.version import __version__

if TYPE_CHECKING:
    from hetero_fl.reporting.run import Run
    from hetero_fl.utils.code_permission import AllowCode


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


@training_command(
    "hetero-fl train -c configs/digits_quickstart.yaml",
    "hetero-fl train -c configs/digits_quickstart.yaml rounds=5 algorithm.name=fedprox",
    "hetero-fl train --resume --out runs/my-run",
)
def train(source: Path, **options: Any) -> Run:
    """Train a federation in simulation and write a run directory."""
    from hetero_fl import experiment

    finished = experiment.run(source, **options)
    if advice := comparison_command(finished):
        make_printer(options["quiet"])(f"compare with training alone: {advice}")
    return finished


@command(
    epilog=examples(
        "hetero-fl evaluate runs/my-run --data digits",
        "hetero-fl evaluate runs/my-run --data clinic.csv --label diagnosis --client clinic_1",
    )
)
@run_argument
@click.option(
    "--data",
    required=True,
    metavar="FILE|NAME",
    help="Data set: a local file or folder, or the name of a data source.",
)
@click.option(
    "--label",
    metavar="COLUMN",
    help="Label column of a table; separate several by commas.  [default: as in the run]",
)
@click.option(
    "--client",
    metavar="ID",
    help="Evaluate only the model of this client, or of `server`.  [default: all models]",
)
@best_option
@click.option("--personal", "--home", "personal", is_flag=True, help=PERSONAL_HELP)
@click.option(
    "--json", "json_file", type=PATH, metavar="FILE", help="Also write the metrics to a JSON file."
)
@allow_code_option
@quiet_option
def evaluate(
    *,
    run: Path,
    data: str,
    label: str | None,
    client: str | None,
    best: str | None,
    personal: bool,
    json_file: Path | None,
    allow_code: AllowCode,
    quiet: bool,
) -> None:
    """Evaluate the models of a finished run on a data set."""
    from hetero_fl import experiment
    from hetero_fl.cli.printing import print_scores
    from hetero_fl.reporting.run import Run
    from hetero_fl.reporting.terminal import Terminal
    from hetero_fl.utils.serialization import make_folder

    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise UserError(f"--json: expected a file in an existing folder, got {json_file}")
    if json_file:
        make_folder(json_file.parent)
    log = make_printer(quiet)
    loaded = Run(run, allow_code)
    loaded = loaded.best(best) if best else loaded
    results = experiment.evaluate(
        loaded,
        data,
        client,
        personal=personal,
        label=label,
        allow_code=allow_code,
        log=lambda note: log(f"note: {note}"),
    )
    unit = next(iter(loaded.load_models(client).values())).task.unit
    title = f"{run} on {data}" + (f", errors in {unit}" if unit else "")
    print_scores(results, title, Terminal())
    if json_file:
        try:
            json_file.write_text(json.dumps(results, indent=2), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json: {json_file}: cannot be written ({error.strerror})") from None


@command(epilog=examples("hetero-fl methods", "hetero-fl methods fedprox fedmd"))
@click.argument(
    "names",
    nargs=-1,
    metavar="[NAME]...",
    help="Methods to describe, with their settings. Without a name, all methods are listed.",
)
@allow_code_option
def methods(names: tuple[str, ...], allow_code: AllowCode) -> None:
    """List all methods, or describe the given methods."""
    from hetero_fl.cli.printing import print_method_details, print_methods
    from hetero_fl.reporting.terminal import Terminal

    check_code(dict.fromkeys(find_references(names), ""), "", allow_code)
    if names:
        print_method_details(names, Terminal())
    else:
        print_methods(Terminal())


COMPLETION_VARIABLE = "_HETERO_FL_COMPLETE"
"""Environment variable with which a shell requests completions."""

SHELLS = ("bash", "zsh", "fish", "powershell")


def complete(instruction: str) -> int:
    """Print completions, or a script that enables them, and return the exit status.

    Args:
        instruction: Name of the shell, followed by `_complete` or `_source`.
    """
    return shell_complete(APP, {}, "hetero-fl", COMPLETION_VARIABLE, instruction)


@command(
    epilog=examples(
        "hetero-fl completion bash",
        'eval "$(hetero-fl completion bash)"   # enable it in this shell',
    )
)
@click.argument(
    "shell",
    type=click.Choice(SHELLS),
    metavar="SHELL",
    help=f"Name of the shell: {', '.join(SHELLS)}.",
)
def completion(shell: str) -> None:
    """Print a script that enables completion of commands and options in a shell."""
    complete(f"{shell}_source")


def _print_version(_context: Context, _option: Parameter, is_given: bool) -> None:
    if is_given:
        echo(f"hetero-fl {__version__}")
        raise Exit(0)


COMMON_OPTIONS = (
    Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_version,
        help="Print the version and exit.",
    ),
    Option(["-q", "--quiet"], is_flag=True, expose_value=False, help=QUIET_HELP),
    Option(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        help="Print the tracebacks of errors and their causes.",
    ),
)
"""Options that all commands accept, even if an option has no effect on a command."""


class OrderedGroup(Group):
    """Group that lists the commands in the order in which they were added."""

    @override
    def list_commands(self, ctx: Context) -> list[str]:
        return list(self.commands)


APP = OrderedGroup(
    name="hetero-fl",
    commands=[
        train,
        federate,
        flower_app,
        audit_log,
        shared_key,
        status,
        compare,
        evaluate,
        join,
        audit,
        export,
        check,
        methods,
        completion,
    ],
    params=list(COMMON_OPTIONS),
    help="Federated learning with heterogeneous models.",
    epilog=METHODS_HINT,
    context_settings={"help_option_names": ["-h", "--help"]},
)

REMOVED_COMMANDS = {
    "benchmark": "python -m benchmarks league, in a checkout of the repository",
    "watch": "output.loggers=[tensorboard] and tensorboard --logdir runs",
    "server": "flower-superlink, and hetero-fl flower-app with flwr run (docs/how_to/deploy.md)",
    "node": "flower-supernode --node-config 'site=\"FILE\"' (docs/how_to/deploy.md), or audit-log "
    "for --audit",
    "certificates": "openssl and ssh-keygen (docs/how_to/deploy.md)",
}
"""What to use instead of each command of earlier versions."""

REMOVED_OPTIONS = {"audit --batch": "--images (each training step has one image)"}
"""What to use instead of each option of earlier versions, keyed by command and option."""

for _command in APP.commands.values():
    _command.short_help = (_command.help or "").split("\n\n")[0]
    _own = {parameter.name for parameter in _command.params}
    _command.params += [option for option in COMMON_OPTIONS if option.name not in _own]


def parse_command(prog: str, name: str | None, arguments: list[str]) -> Context:
    """Parse the arguments of a command and return the context in which to invoke it.

    Args:
        prog: Name under which the command was called, for messages.
        name: Name of the command. If None, the help of `hetero-fl` is printed.
        arguments: Arguments of the command.

    Raises:
        UserError: If a command, option or value is invalid.
        Exit: After `--help` or `--version`.
    """
    if name is not None and name not in APP.commands:
        unknown = f"unknown command '{name}'{suggest_or_list(name, APP.commands)}"
        removed = describe_removed(name, REMOVED_COMMANDS)
        raise UserError(f"{removed or unknown} (see hetero-fl --help)")
    command = APP if name is None else APP.commands[name]
    try:
        return command.make_context(prog, [*arguments, *(["--help"] if name is None else [])])
    except NoSuchOption as error:
        option = f"{name} {error.option_name}"
        if removed := describe_removed(option, REMOVED_OPTIONS):
            raise UserError(removed) from None
        options = [option for parameter in command.params for option in parameter.opts]
        hint = suggest_similar(error.option_name, [o for o in options if o.startswith("--")])
        if not hint and {"config", "overrides"} <= {parameter.name for parameter in command.params}:
            hint = _suggest_override(error.option_name, arguments)
        raise UserError(f"unknown option {error.option_name}{hint} (see {prog} --help)") from None
    except BadParameter as error:
        raise UserError(f"{_describe_bad_parameter(error)} (see {prog} --help)") from None
    except UsageError as error:
        message = error.format_message().rstrip(".")
        raise UserError(f"{message[:1].lower()}{message[1:]} (see {prog} --help)") from None


def _describe_bad_parameter(error: BadParameter) -> str:
    """Describe an invalid option or argument, with the value found and the valid values."""
    parameter = error.param
    if parameter is None or error.ctx is None:
        return error.message.rstrip(".")
    longest = max(parameter.opts, key=len, default="")
    place = longest if isinstance(parameter, Option) else parameter.make_metavar(error.ctx)
    kind = parameter.type
    if isinstance(kind, click.Choice):
        expected = f"one of {', '.join(kind.choices)}"
    elif isinstance(kind, click.IntRange):
        expected = f"an integer >= {kind.min}"
    else:
        expected = "an integer" if kind is click.INT else ""
    if isinstance(error, MissingParameter):
        return f"{place}: missing"
    value = re.match(r"'?(.*?)'? is not ", error.message)
    if not expected or value is None:
        return f"{place}: {error.message.rstrip('.')}"
    return f"{place}: expected {expected}, got '{value[1]}'"


def _suggest_override(option: str, arguments: Sequence[str]) -> str:
    """Suggest an override for an unknown option that resembles a configuration key.

    Returns:
        A suggestion such as `; did you mean rounds=3?`, or an empty string.
    """
    from hetero_fl.config.errors import nearest_key

    names = [argument.partition("=")[0] for argument in arguments]
    key = nearest_key(option.removeprefix("--"))
    # A short option may be part of a group, such as `-x` in `-qx`.
    if key is None or option not in names:
        return ""
    index = names.index(option)
    value = arguments[index].partition("=")[2]
    following = arguments[index + 1 :][:1]
    if "=" not in arguments[index] and following and not following[0].startswith("-"):
        value = following[0]
    return f"; did you mean {key}={value or '…'}?"
