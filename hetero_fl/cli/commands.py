"""The group of all commands, which are made from functions, and parsing of the command line.

The options of a command follow from the signature of its function, the help texts from its
docstring.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
from click import Context
from click.exceptions import Exit, NoSuchOption, UsageError
from click.shell_completion import shell_complete
from typing_extensions import override

from hetero_fl.cli import deployment_commands, experiment_commands
from hetero_fl.utils.code_permission import AllowCode, check_code, find_references
from hetero_fl.utils.errors import (
    UserError,
    describe_removed,
    echo,
    suggest_or_list,
    suggest_similar,
)
from hetero_fl.utils.version import __version__

# Names of options that differ from the name of the argument.
OPTION_NAMES = {
    "config": ("-c", "--config", "--conf"),
    "file_format": ("--format",),
    "json_file": ("--json",),
    "as_json": ("--json",),
    "hosts": ("--host",),
    "personal": ("--personal", "--home"),
    "quiet": ("-q", "--quiet"),
    "transfer": ("--take",),
    "verbose": ("-v", "--verbose"),
}
# Names of values in help texts, if they are not derived from the type.
METAVARS = {
    "config": "FILE",
    "names": "[NAME]...",
    "out": "DIR",
    "overrides": "[key.path=value]...",
    "shell": "SHELL",
    "study": "FILE",
}

# Help texts of arguments that several commands share.
SHARED_TEXTS = {
    "allow_code": "Allow running code that a file or an option names as python:module:Name. "
    "Without this flag, you are asked for permission; if there is no terminal, permission is "
    "denied.",
    "best": "Use the models of the round with the best local (personal) or global validation "
    "score.  [default: models of the last round]",
    "config": "Configuration file (YAML or JSON).",
    "overrides": "Configuration keys to override, such as rounds=5.",
    "personal": "Predict as on the client's own examples: use its label frequencies and its own "
    "BatchNorm statistics if the run used them for the local test.",
    "quiet": "Print only results, warnings and errors.",
    "run": "Run directory of a finished run.",
    "verbose": "Print the tracebacks of errors and their causes.",
}


def _print_version(_context: click.Context, _option: click.Parameter, is_given: bool) -> None:
    if is_given:
        echo(f"hetero-fl {__version__}")
        raise Exit(0)


COMMON_OPTIONS = [
    click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_version,
        help="Print the version and exit.",
    ),
    *(
        click.Option(OPTION_NAMES[name], is_flag=True, expose_value=False, help=SHARED_TEXTS[name])
        for name in ("quiet", "verbose")
    ),
]
"""Options that all commands accept, even if an option has no effect on a command."""

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}


def option_name(argument: str) -> str:
    """Return the longest name of the option of an argument, such as `--take` for `transfer`."""
    return max(OPTION_NAMES.get(argument, (f"--{argument.replace('_', '-')}",)), key=len)


def command_from(function: Callable[..., None], hint: str = "") -> click.Command:
    """Make a command of a function.

    Positional arguments of the function are arguments of the command, and keyword-only arguments
    are options. Their types make them choices (`Literal`), repeated (`tuple`) or plain values;
    options that are False by default are flags. The help texts are the sections of the docstring,
    with the lines of `Example` as they are. Arguments without a text have that of `SHARED_TEXTS`.

    Args:
        function: The function, whose name is that of the command.
        hint: Sentence below the examples.
    """
    text, _, examples = inspect.cleandoc(function.__doc__ or "").partition("\n\nExample:\n")
    text, _, arguments = text.partition("\n\nArgs:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, flags=re.MULTILINE)
    texts = SHARED_TEXTS | {name: " ".join(lines.split()) for name, lines in found}
    types = get_type_hints(function)
    params = [
        _make_parameter(parameter, types[name], texts[name])
        for name, parameter in inspect.signature(function).parameters.items()
    ]
    names = {parameter.name for parameter in params}
    return click.Command(
        function.__name__.replace("_", "-"),
        CONTEXT_SETTINGS,
        function,
        [*params, *(option for option in COMMON_OPTIONS if option.name not in names)],
        help=text,
        short_help=text.partition("\n\n")[0],
        epilog="\n".join(
            ["\b", "Examples:", textwrap.indent(textwrap.dedent(examples), "  "), "", hint]
        ),
    )


def _make_parameter(parameter: inspect.Parameter, kind: Any, text: str) -> click.Parameter:
    """Make the argument or option of a command from an argument of its function."""
    name = parameter.name
    if type(None) in get_args(kind):
        kind = get_args(kind)[0]
    is_repeated = get_origin(kind) is tuple
    is_flag = isinstance(parameter.default, bool)
    if is_repeated:
        kind = get_args(kind)[0]
    elif get_origin(kind) is Literal:
        kind = click.Choice(get_args(kind))
    elif kind is Path:
        kind = click.Path(path_type=Path)
    if parameter.kind is not parameter.KEYWORD_ONLY:
        count = -1 if is_repeated else 1
        return click.Argument([name], type=kind, nargs=count, metavar=METAVARS.get(name), help=text)
    is_required = parameter.default is parameter.empty
    default = {} if is_required else {"default": parameter.default}
    return click.Option(
        [name, *OPTION_NAMES.get(name, (option_name(name),))],
        type=None if is_flag else kind,
        is_flag=is_flag,
        multiple=is_repeated,
        required=is_required,
        metavar=METAVARS.get(name),
        help=text,
        **default,
    )


METHODS_HINT = "Run `hetero-fl methods` to list the valid values of algorithm.name."


def methods(names: tuple[str, ...], *, allow_code: AllowCode = False) -> None:
    """List all methods, or describe the given methods.

    Args:
        names: Methods to describe, with their settings. Without a name, all methods are listed.

    Example:
        hetero-fl methods
        hetero-fl methods fedprox fedmd
    """
    from hetero_fl.cli.printing import print_method_details, print_methods
    from hetero_fl.reporting.terminal import Terminal

    check_code(dict.fromkeys(find_references(names), ""), "", allow_code)
    if names:
        print_method_details(names, Terminal())
    else:
        print_methods(Terminal())


COMPLETION_VARIABLE = "_HETERO_FL_COMPLETE"
"""Environment variable with which a shell requests completions."""


def complete(instruction: str) -> int:
    """Print completions, or a script that enables them, and return the exit status.

    Args:
        instruction: Name of the shell, followed by `_complete` or `_source`.
    """
    return shell_complete(APP, {}, "hetero-fl", COMPLETION_VARIABLE, instruction)


def completion(shell: Literal["bash", "zsh", "fish", "powershell"]) -> None:
    """Print a script that enables completion of commands and options in a shell.

    Args:
        shell: Name of the shell.

    Example:
        hetero-fl completion bash
        eval "$(hetero-fl completion bash)"   # enable it in this shell
    """
    complete(f"{shell}_source")


class OrderedGroup(click.Group):
    """Group that lists the commands in the order in which they were added."""

    @override
    def list_commands(self, ctx: Context) -> list[str]:
        return list(self.commands)


APP = OrderedGroup(
    "hetero-fl",
    commands=[
        command_from(experiment_commands.train, METHODS_HINT),
        command_from(experiment_commands.federate, METHODS_HINT),
        command_from(deployment_commands.flower_app, METHODS_HINT),
        command_from(deployment_commands.audit_log),
        command_from(deployment_commands.shared_key),
        command_from(deployment_commands.status),
        command_from(experiment_commands.compare, METHODS_HINT),
        command_from(experiment_commands.evaluate),
        command_from(experiment_commands.join),
        command_from(experiment_commands.audit),
        command_from(experiment_commands.export),
        command_from(experiment_commands.check),
        command_from(methods),
        command_from(completion),
    ],
    params=list(COMMON_OPTIONS),
    help="Federated learning with heterogeneous models.",
    epilog=METHODS_HINT,
    context_settings=CONTEXT_SETTINGS,
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
        problem = _describe_unknown_option(error.option_name, command)
    except UsageError as error:
        problem = error.format_message().rstrip(".")
    raise UserError(f"{problem[:1].lower()}{problem[1:]} (see {prog} --help)")


def _describe_unknown_option(option: str, command: click.Command) -> str:
    """Describe an unknown option, with a similar option or configuration key."""
    if removed := describe_removed(f"{command.name} {option}", REMOVED_OPTIONS):
        return removed
    options = [name for parameter in command.params for name in parameter.opts]
    hint = suggest_similar(option, [name for name in options if name.startswith("--")])
    if not hint and "overrides" in (parameter.name for parameter in command.params):
        from hetero_fl.config.describe import nearest_key

        key = nearest_key(option.removeprefix("--"))
        hint = f"; did you mean {key}=…?" if key else ""
    return f"unknown option {option}{hint}"
