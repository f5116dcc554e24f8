"""Commands made from functions: options from the signature, help texts from the docstring."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
from click.exceptions import Exit

from hetero_fl.utils.errors import echo
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
