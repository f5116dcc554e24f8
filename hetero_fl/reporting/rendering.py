"""Render the templates of reports and format tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from hetero_fl.reporting.formatting import (
    algorithm_name,
    capitalize_first,
    format_bytes,
    format_deviation,
    format_duration,
    format_metric,
    format_privacy,
    format_range,
    format_score,
    metric_name,
)
from hetero_fl.utils.errors import printable, printable_lines
from hetero_fl.utils.text import pluralize

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

LATEX = {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": "$\\pm$",
    "–": "--",
    "−": "$-$",
    "²": "$^2$",
    "↓": "$\\downarrow$",
    "⁶": "$^6$",
    "“": "\x60\x60",
    "”": "''",
    **{character: "\\" + character for character in "&%$#_{}"},
}
"""Characters that must be escaped or replaced in LaTeX, with their replacements."""


def escape_latex(text: str) -> str:
    """Escape text for LaTeX."""
    return re.sub("|".join(map(re.escape, LATEX)), lambda match: LATEX[match.group()], text)


def markdown_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], alignment: Sequence[str]
) -> str:
    """Format a table in GitHub Markdown.

    Args:
        columns: Names of the columns.
        rows: Cells of each row. Short rows are padded with empty cells.
        alignment: `left` or `right` for each column.

    Returns:
        The table, without a final line break.
    """
    from tabulate import tabulate

    return tabulate(
        [[cell.replace("|", "\\|") for cell in row] for row in rows],
        headers=columns,
        tablefmt="pipe",
        colalign=alignment,
        disable_numparse=True,
    )


def format_environment(environment: Mapping[str, Any]) -> dict[str, str]:
    """Format the content of `environment.json` as the labels and values of a table.

    Rows of missing entries are omitted. Unknown entries are listed under their own names.
    """
    known = dict(environment)
    choice = known.pop("choice", {})
    workers = choice.get("workers", 1)
    chunk = choice.get("chunk", 1)
    threads = known.pop("threads", None)
    if "server_threads" in choice:
        threads = f"{threads} for clients, {choice['server_threads']} for the server"
    cores = known.pop("cores", None)
    device = known.pop("device", "")
    rows = {
        "Executor": [
            choice.get("executor"),
            pluralize(workers, "worker") if workers > 1 else None,
            f"{pluralize(chunk, 'client')} at a time" if chunk > 1 else None,
        ],
        "Threads": [threads],
        "Reasons": ["; ".join(choice.get("reasons", []))],
        "Device, precision": [
            "CPU" if device == "cpu" else device,
            choice.get("precision"),
            "deterministic algorithms" if choice.get("deterministic") else None,
        ],
        "Processor": [known.pop("cpu", None), pluralize(cores, "core") if cores else None],
        "Run id": [known.pop("run", None)],
        "Run directory format": [known.pop("run_directory_version", None)],
        "Packages": [f"{name} {found}" for name, found in known.pop("packages", {}).items()],
        **{name: found if isinstance(found, list) else [found] for name, found in known.items()},
    }
    texts = {name: ", ".join(str(part) for part in parts if part) for name, parts in rows.items()}
    return {name: text for name, text in texts.items() if text}


# Client settings that change the loss or the predictions and that methods may enable.
ADJUSTMENTS = (
    "logit_adjustment",
    "local_prior",
    "prior_correction",
    "class_weights",
    "recalibrate",
    "fine_tune_epochs",
)


# Adjustments that use the frequencies of classes, and have no effect in a regression.
OF_CLASSES = ("logit_adjustment", "local_prior", "prior_correction", "class_weights")


def format_training(settings: Mapping[str, Any], kind: str = "multiclass") -> str:
    """Format the training settings of a client, as recorded in `details.json`, as one line.

    Args:
        settings: The settings.
        kind: Kind of the task. Settings that do not apply to it are left out.
    """
    own = {
        **settings.get("optimizer", {}),
        **{key: settings[key] for key in ("epochs", "steps", "batch_size") if key in settings},
    }
    words = [
        f"{name.replace('_', ' ')} {value}" for name, value in own.items() if value is not None
    ]
    for name in ADJUSTMENTS:
        value = settings.get(name)
        if not value or (kind == "regression" and name in OF_CLASSES):
            continue
        word = name.replace("_", " ")
        if name == "recalibrate":
            predictions = ", ".join(value).replace("_", " ")
            word = f"recalibrated BatchNorm statistics ({predictions})"
        elif name == "fine_tune_epochs":
            word = f"fine-tuning epochs {value}"
            if settings.get("fine_tune_before") == "local_tests":
                word += " before local tests"
        words.append(word)
    return ", ".join(words)


def format_code(text: str) -> Markup:
    """Convert docstring text to HTML, with `<code>` elements for text in backticks."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


FILTERS: dict[str, Callable[..., str]] = {
    "algorithm": algorithm_name,
    "bytes": format_bytes,
    "capitalize_first": capitalize_first,
    "code": format_code,
    "deviation": format_deviation,
    "duration": format_duration,
    "latex": escape_latex,
    "metric": format_metric,
    "metric_name": metric_name,
    "plural": pluralize,
    "printable": lambda text: printable(str(text)),
    "privacy": format_privacy,
    "score": format_score,
    "span": format_range,
    "thousands": "{:,}".format,
    "training_settings": format_training,
}
"""Template filters in addition to those of Jinja."""


@cache
def _environment() -> Environment:
    # Runs without a report do not need Jinja.
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("hetero_fl.reporting"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= FILTERS
    return environment


def render(template: str, **content: Any) -> str:
    """Render a template of this package.

    Values are escaped if the template is an HTML page, and control characters in every template.

    Args:
        template: File name of the template.
        **content: Values of the template's variables.
    """
    return printable_lines(_environment().get_template(template).render(**content))


def render_line(template: str, **content: Any) -> str:
    """Render a template of this package as a single line of text."""
    return " ".join(render(template, **content).split())
