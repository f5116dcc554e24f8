"""Completion of commands, options, configuration keys and methods in shells.

The shell calls the command for each completion. Names are read from `names.json` instead of the
schema and the registries, because importing torch takes seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from importlib.metadata import entry_points
from typing import Any

from click import Context, Group, Parameter, echo
from click.shell_completion import BashComplete, CompletionItem, get_completion_class

PROGRAM = "hetero-fl"
COMPLETION_VARIABLE = "_HETERO_FL_COMPLETE"
"""Environment variable with which the shell requests completions."""

SHELLS = ("bash", "zsh", "fish", "powershell")
# Groups of entry points whose names are values of a configuration key.
PLUGIN_GROUPS = {
    "algorithm.name": "hetero_fl.algorithms",
    "clients.defaults.model": "hetero_fl.models",
    "data.name": "hetero_fl.sources",
    "output.loggers": "hetero_fl.loggers",
}
# Keys whose value is a list of names, such as `[csv,tensorboard]`.
LISTS = ("output.loggers",)


class BashCompleteWithoutSpace(BashComplete):
    """Completion in bash that does not add a space after `key=`."""

    source_template = BashComplete.source_template.replace(
        "    return 0\n", "    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace\n    return 0\n"
    )


def is_completion_requested() -> bool:
    """Return whether the shell has called the command for completions."""
    return COMPLETION_VARIABLE in os.environ


def complete(app: Group) -> int:
    """Print the completions that the shell requests, and return the exit status."""
    shell, _, _ = os.environ[COMPLETION_VARIABLE].partition("_")
    if shell not in SHELLS:
        return 1
    echo(_completion_class(shell)(app, {}, PROGRAM, COMPLETION_VARIABLE).complete())
    return 0


def completion_script(app: Group, shell: str) -> str:
    """Return the script that enables completion in a shell.

    Args:
        app: The command line.
        shell: One of `SHELLS`.
    """
    return _completion_class(shell)(app, {}, PROGRAM, COMPLETION_VARIABLE).source()


def _completion_class(shell: str) -> Any:
    return BashCompleteWithoutSpace if shell == "bash" else get_completion_class(shell)


@cache
def known_names() -> dict[str, Any]:
    """Return the content of `names.json`.

    The content is `{"methods": {name: {"summary": text, "properties": text}}, "keys": {key:
    {"help": text, "values": [...]}}}`.
    """
    file = resources.files("hetero_fl.cli") / "names.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def values_of(key: str) -> dict[str, str]:
    """Return the known values of a configuration key with their descriptions, plug-ins included."""
    names = known_names()
    if key == "algorithm.name":
        values = {name: about["summary"] for name, about in names["methods"].items()}
    else:
        values = dict.fromkeys(names["keys"].get(key, {}).get("values", ()), "")
    if key in PLUGIN_GROUPS:
        for entry in entry_points(group=PLUGIN_GROUPS[key]):
            values.setdefault(entry.name, "plug-in")
    return values


def complete_methods(_context: Context, _parameter: Parameter, text: str) -> list[CompletionItem]:
    """Complete the name of a method, or the last name of a list such as `fedavg,fedmd`."""
    before, comma, last = text.rpartition(",")
    return _items(values_of("algorithm.name"), last, before + comma)


def complete_overrides(context: Context, parameter: Parameter, text: str) -> list[CompletionItem]:
    """Complete an override `key=value`.

    Bash passes `key=value` as the three words `key`, `=` and `value`, and omits an `=` at the end.
    """
    words = list(context.params.get(parameter.name or "") or ())
    if len(words) > 1 and words[-1] == "=":
        return _value_items(words[-2], text)
    if not text and words and words[-1] in known_names()["keys"]:
        return _value_items(words[-1], text)
    key, equals, value = text.partition("=")
    if equals:
        return _value_items(key, value, f"{key}=")
    keys = {f"{name}=": about["help"] for name, about in known_names()["keys"].items()}
    return _items(keys, text)


def _value_items(key: str, text: str, prefix: str = "") -> list[CompletionItem]:
    """Complete the value of a key, or the last name of a list such as `[csv,tensorboard]`."""
    if key not in LISTS:
        return _items(values_of(key), text, prefix)
    before, comma, last = text.rpartition(",")
    opened = before + comma if comma else "["
    return _items(values_of(key), last.removeprefix("["), prefix + opened, "]")


def _items(
    names: Mapping[str, str], start: str, prefix: str = "", suffix: str = ""
) -> list[CompletionItem]:
    found: Iterable[tuple[str, str]] = sorted(names.items())
    return [
        CompletionItem(prefix + name + suffix, help=about or None)
        for name, about in found
        if name.startswith(start)
    ]
