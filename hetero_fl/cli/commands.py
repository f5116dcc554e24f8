"""The group of all commands, `methods` and `completion`, and parsing of the command line."""

from __future__ import annotations

from typing import Literal

import click
from click import Context
from click.exceptions import NoSuchOption, UsageError
from click.shell_completion import shell_complete
from typing_extensions import override

from hetero_fl.cli import deployment_commands, experiment_commands, training
from hetero_fl.cli.options import COMMON_OPTIONS, CONTEXT_SETTINGS, command_from
from hetero_fl.utils.code_permission import AllowCode, check_code, find_references
from hetero_fl.utils.errors import (
    UserError,
    describe_removed,
    suggest_or_list,
    suggest_similar,
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
        command_from(training.train, METHODS_HINT),
        command_from(training.federate, METHODS_HINT),
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
