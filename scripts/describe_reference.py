#!/usr/bin/env python3
"""Write the generated pages of docs/reference.

These pages describe the configuration, the files of a deployment, the methods, the command line,
the messages and the modules.

    python scripts/describe_reference.py            # write the pages
    python scripts/describe_reference.py --check    # exit status 1 if a page is outdated
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hetero_fl.algorithms import Algorithm, register_algorithm  # noqa: E402
from hetero_fl.algorithms.base import shared_part_of  # noqa: E402
from hetero_fl.algorithms.distillation import (  # noqa: E402
    InitialPhase,
    ProxyDistillation,
    ProxyTraining,
)
from hetero_fl.algorithms.mutual import MenteeTraining  # noqa: E402
from hetero_fl.algorithms.prototypes import CommonFeatureWidth  # noqa: E402
from hetero_fl.algorithms.requirements import (  # noqa: E402
    describe_needs,
    format_needs,
    method_paragraphs,
    method_references,
    method_summary,
    method_title,
    supported_tasks,
)
from hetero_fl.cli.commands import APP, COMMON_OPTIONS  # noqa: E402
from hetero_fl.config import Config  # noqa: E402
from hetero_fl.config.clients import ClientSettings  # noqa: E402
from hetero_fl.config.describe import (  # noqa: E402
    describe_key,
    describe_values,
    format_default,
    section_of,
    section_summary,
)
from hetero_fl.config.schema import CLIENT_OPTIONS, LoggerConfig  # noqa: E402
from hetero_fl.core.payload import ItemSpec  # noqa: E402
from hetero_fl.deployment.config import DeploymentServerConfig, SiteConfig  # noqa: E402
from hetero_fl.reporting.loggers import Logger, register_logger  # noqa: E402

REFERENCE = ROOT / "docs" / "reference"


def all_pages() -> dict[str, str]:
    """Return the texts of all generated pages, keyed by path below docs/reference."""
    pages = {
        "configuration.md": configuration_page(),
        "deployment_files.md": deployment_files_page(),
        "methods.md": methods_index(),
        "command_line.md": command_line_page(),
        "messages.md": messages_page(),
        "modules.md": modules_page(),
    }
    for family in FAMILIES:
        pages[f"methods/{family.page}.md"] = family_page(family)
    return pages


def _notice(source: str) -> str:
    script = Path(__file__).name
    return f"<!-- written by scripts/{script} (`make docs`) from {source}; do not edit -->"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    cells = [header, ("---",) * len(header), *rows]
    return [f"| {' | '.join(row)} |" for row in cells]


# Configuration


CONFIGURATION_TEXT = """\
A configuration is a YAML file, a JSON file or a Python dictionary. Every key has a default; a file
contains the keys that differ. `configs/medical_hetero.yaml` is a commented example.

- **Overrides** on the command line take precedence over the file:
  `rounds=5 data.partition.alpha=0.1 algorithm.name=fedmd`. Lists and mappings are written as in
  YAML: `"clients.groups.0.model={name: mlp, hidden: [64]}"`. An override that names another
  algorithm, kind of partition, model or optimizer drops the settings of the one in the file.
  Settings that all of them have remain: `min_size` of a partition, `feature_dim` of a model, and
  the settings of an optimizer other than `momentum` and `nesterov`.
- **References** such as `path: ${data.root}/a.csv` insert the value of another key of the file.
  They are replaced when the file is read, before overrides. Environment variables and functions
  are refused.
- **Errors** are reported in one line with the key, the value found and the nearest valid key or
  value, before anything is written. [Messages](messages.md) lists them.
- `--check` prints the resolved configuration. A run saves it as `config.yaml`.
- **User-defined** algorithms, models, data sources and partitions are written as
  `python:package.module:Name` instead of a name. They require `--allow-code`
  ([why](../explanation/threat_model.md#code-from-configuration-files)).
- JSON files in the format of the book *Practicing Federated Learning*, which have ten keys, are
  translated ([CIFAR-10](../scenarios/cifar10.md)).
- A model may be given by its name: `model: mlp` means `model: {name: mlp}`.
- `null` is the default of keys that are not set.
"""
CONFIGURATION_HEADER = ("key", "values", "default", "meaning")


def configuration_page() -> str:
    """Return the text of docs/reference/configuration.md."""
    lines = [
        "# Configuration",
        "",
        _notice("the schema in hetero_fl/config"),
        "",
        CONFIGURATION_TEXT,
        *_sections(Config, "", {}, "Top level"),
        "## Settings of the algorithms",
        "",
        "Write them next to `algorithm.name`. [Methods](methods.md) lists the methods, whose pages",
        "contain the settings, and the",
        "[options of all methods](methods.md#options-of-all-methods).",
        "",
        *_logger_sections(),
    ]
    return "\n".join(lines)


LOGGERS_TEXT = """\
Write them next to `kind` in an entry of `output.loggers`:
`output.loggers: [csv, {kind: wandb, project: hospitals}]`.
[Follow runs](../how_to/follow_runs.md) shows examples.
"""


def _built_in_loggers() -> dict[str, type[Logger]]:
    """Return the loggers of the package, keyed by kind."""
    # An example of a docstring, run by the tests, has the name of its module, too.
    return {
        kind: logger
        for kind in register_logger
        if (logger := register_logger[kind]).__module__.startswith("hetero_fl.")
        and getattr(sys.modules[logger.__module__], logger.__name__, None) is logger
    }


def _logger_sections() -> list[str]:
    """Return the lines of the page section with the settings of the built-in loggers."""
    lines = ["## Settings of the loggers", "", LOGGERS_TEXT]
    for kind, logger in _built_in_loggers().items():
        rows = [_setting_row(logger, name, field) for name, field in logger.model_fields.items()]
        settings = [*_table(CONFIGURATION_HEADER, rows), ""] if rows else []
        extra = f" Requires `hetero_fl[{logger.extra}]`." if logger.extra else ""
        lines += [f"### `{kind}`", "", f"{section_summary(logger)}{extra}", "", *settings]
    return lines


DEPLOYMENT_FILES_TEXT = """\
[Deploy a federation](../how_to/deploy.md) shows both files with comments;
`hetero-fl certificates` writes them. Keys are checked as those of a
[configuration](configuration.md). Keys without a default are required.
"""


def deployment_files_page() -> str:
    """Return the text of docs/reference/deployment_files.md."""
    configured: dict[type[BaseModel], str] = {}
    _sections(Config, "", configured)
    seen = {
        section: link.replace("(#", "(configuration.md#") for section, link in configured.items()
    }
    lines = [
        "# Server file and site file",
        "",
        _notice("the schema in hetero_fl/deployment/config.py"),
        "",
        DEPLOYMENT_FILES_TEXT,
        *_sections(DeploymentServerConfig, "", seen, "Server file"),
        *_sections(SiteConfig, "", seen, "Site file"),
    ]
    return "\n".join(lines)


def _sections(
    model: type[BaseModel], path: str, seen: dict[type[BaseModel], str], title: str = ""
) -> list[str]:
    """Return the lines of the page section for a model of the schema.

    The sections of nested models follow. Each nested model has one section, at its first use.

    Args:
        model: The pydantic model.
        path: Configuration key of the model, or an empty string for the whole configuration.
        seen: Links to the sections, keyed by model. New models are added in place.
        title: Heading of the section if `path` is empty.
    """
    seen[model] = _section_link(path)
    base = next((kind for kind in model.__mro__[1:] if kind in seen), None)
    inherited = base.model_fields if base is not None else {}
    later: list[str] = []
    rows = []
    for name, field in model.model_fields.items():
        if name in inherited:
            continue
        part = section_of(field.annotation)
        if part is not None and part not in seen:
            later += _sections(part, f"{path}.{name}".lstrip("."), seen)
        rows.append(_setting_row(model, name, field, seen))
    return [
        f"## `{path}`" if path else f"## {title}",
        "",
        f"{section_summary(model)}{_further_keys(model, base, seen)}",
        "",
        *_table(CONFIGURATION_HEADER, rows),
        "",
        *later,
    ]


def _setting_row(
    model: type[BaseModel],
    name: str,
    field: FieldInfo,
    seen: dict[type[BaseModel], str] | None = None,
) -> tuple[str, ...]:
    def link(part: type[BaseModel]) -> str:
        return (seen or {}).get(part, "mapping")

    return (
        f"`{name}`",
        describe_values(field.annotation, field.metadata, link),
        "" if field.is_required() else format_default(field),
        describe_key(model, name).replace("|", "\\|"),
    )


def _further_keys(
    model: type[BaseModel], base: type[BaseModel] | None, seen: dict[type[BaseModel], str]
) -> str:
    if model.model_config.get("extra") == "allow" and model is not LoggerConfig:
        return (
            " Options: `python -m model_zoo` lists the models, `model_zoo.model_options(name)` "
            "their options."
        )
    if base is None:
        return ""
    return f" It also has every key of {seen[base]}."


def _section_link(path: str) -> str:
    # GitHub derives the anchor from the heading.
    return f"[`{path}`](#{path.replace('.', '').lower()})"


# Methods


class Family(NamedTuple):
    """A family of methods that are described on one page.

    Args:
        page: Name of the page file, without suffix.
        title: Title of the page.
        text: Introduction of the page.
        methods: Names of the methods.
        notes: Base classes whose docstrings are added to the page, keyed by heading.
    """

    page: str
    title: str
    text: str
    methods: tuple[str, ...]
    notes: dict[str, type[Algorithm]] = {}


PROXY_NOTES: dict[str, type[Algorithm]] = {
    "Proxy set and student": ProxyTraining,
    "Teacher and alignment": ProxyDistillation,
    "The initial phase": InitialPhase,
}
FAMILIES = (
    Family(
        "references",
        "Baseline and references",
        "Methods for comparison. `local`, the baseline, exchanges nothing. The other two, the "
        "references, have all rows or all models in one place, of at most 10,000 clients. Tables "
        "and figures set the references apart.",
        ("local", "centralized", "ensemble"),
    ),
    Family(
        "parameter_sharing",
        "Parameter sharing",
        "The whole model travels and is averaged: P parameters take 4·P bytes per client and "
        "round in each direction. With several architectures, each tensor is averaged over the "
        "clients of one architecture, and across architectures where `clients.common` names a "
        "common part. A tensor that only one client has does not change. The server needs only "
        "sums, so these methods work with secure aggregation, except `fedasync` and `fedbuff`, "
        "which do not sum the uploads of one cohort.",
        (
            "fedavg",
            "fedprox",
            "fedlc",
            "fedavg_ft",
            "scaffold",
            "fednova",
            "fedavgm",
            "fedadam",
            "fedyogi",
            "fedasync",
            "fedbuff",
            "heterofl",
        ),
    ),
    Family(
        "partial_sharing",
        "Partial sharing and personalization",
        "A part of each model is averaged as in [parameter sharing](parameter_sharing.md) and the "
        "rest is private state, which never leaves the client; or a client trains a personal model "
        "in addition to the shared one. Each shared parameter takes 4 bytes. A head of C classes "
        "on d features has C·(d + 1) parameters.",
        ("fedper", "lg_fedavg", "fedbn", "fedrep", "fedbabu", "ditto"),
    ),
    Family(
        "public_distillation",
        "Distillation with a proxy set",
        "Clients of any architecture learn from the predictions of all clients on public examples, "
        "the proxy set (`data.proxy`). A run without a proxy set is refused. Predictions come from "
        "models trained on private rows and count as a release of these. "
        "[Hybrid](hybrid.md) combines this with parameter sharing. "
        "[Label skew](../../explanation/label_skew.md) explains which options help when clients' "
        "labels differ.",
        ("fedmd", "feddf", "ds_fl", "kt_pfl"),
        PROXY_NOTES,
    ),
    Family(
        "class_knowledge",
        "Distillation without a proxy set",
        "Mean outputs or features of each class, a generator or the features of rows carry the "
        "knowledge. These methods support multi-class tasks only.",
        ("fd", "fedproto", "fedtgp", "fedgh", "fedgen", "fedgkt"),
        {"Common feature width": CommonFeatureWidth},
    ),
    Family(
        "mutual_learning",
        "Mutual learning",
        "Each client trains its own model, of any architecture, which is not sent, and a small "
        "common model, the mentee, which is averaged.",
        ("fml", "fedkd", "fedmrl"),
        {"The mentee": MenteeTraining},
    ),
    Family(
        "one_shot",
        "One-shot learning",
        "Clients upload once, in the last round. In a run of R rounds, this takes 1/(2·R) of the "
        "bytes of FedAvg.",
        ("dense",),
    ),
    Family(
        "hybrid",
        "Hybrid",
        "The method of this project: parameter averaging and distillation of the consensus. "
        "[Label skew](../../explanation/label_skew.md) explains its defaults. [Where Hybrid falls "
        "short](../../results/finding.md#where-hybrid-falls-short) lists where other methods are "
        "better. [Public "
        "distillation](public_distillation.md#teacher-and-alignment) describes teacher, alignment, "
        "proxy rows and the server's student.",
        ("hybrid",),
    ),
)
INDEX_TEXT = """\
One row per method; the name links to its description and settings. `hetero-fl methods` prints the
same list and `hetero-fl methods NAME` one description. Choose a method with `algorithm.name` and
write its settings next to the name.

θ are parameters, z logits, n_k the rows of client k, w_k = n_k / Σn its weight, C classes, D proxy
rows, d the feature width and T a temperature. *Needs* is derived from the classes: *one
architecture* means that at least two clients have it; *single uploads* that the server uses each
upload separately, which excludes secure aggregation. "as in the paper" refers to the paper at the
end of each section. `--check` prints the bytes that a run will send.
"""
OPTIONS_TEXT = """\
Each is an alias of the setting of that name in `clients.defaults`, and can differ between clients
in `clients.groups`. A method may set its own default."""
COMMON_TEXT = """\
A client shares what its `shares` permit: `parameters`, `backbone` (only that part), `predictions`,
`statistics` (of classes) and `features` (of private rows). With `share_every: n`, it uploads in
every n-th round. `clients.per_round` samples a cohort for each round; the other clients are
evaluated as well.
"""
CONTENTS = {
    "params": "tensors by name",
    "update": "difference from the received parameters",
    "rows": "outputs of proxy rows, `[D, C]`",
    "class_sums": "sums of features by class, `[C, d]`, and counts `[C]`",
    "counts": "label counts, `[C]`",
}
"""Content of the items of a kind."""
UPLOADS = {
    ("fd", "class_logits"): "sums of logits by class, `[C, C]`, and counts `[C]`",
    ("fedgkt", "features"): "features of the training rows, `[n_k, d]`",
    ("fedgkt", "logits"): "logits of the training rows, `[n_k, C]`",
    ("fedgkt", "labels"): "labels of the training rows, `[n_k]`",
}
"""Content of uploaded items that differs from that of their kind, keyed by method and item."""
TEACHER = {"teacher": "consensus logits of proxy rows, `[D, C]`"}
PROTOTYPES = {
    "prototypes": "prototypes, `[C, d]`",
    "known": "1 for classes with a prototype, otherwise 0, `[C]`",
}
BROADCASTS: dict[str, dict[str, str]] = {
    "scaffold": {"control": "the server's control variate"},
    "fedmd": TEACHER,
    "ds_fl": {
        "teacher": "sharpened mean probabilities of the round's proxy rows, `[D, C]`",
        "drawn": "round in which these rows were sampled",
    },
    "kt_pfl": {"teacher": "the client's mixture of all predictions of proxy rows, `[D, C]`"},
    "hybrid": TEACHER,
    "fd": {
        "teacher": "mean logits by class of all clients, `[C, C]`",
        "known": "1 for classes with mean logits, otherwise 0, `[C]`",
    },
    "fedproto": PROTOTYPES,
    "fedtgp": PROTOTYPES,
    "fedgh": {"head": "parameters of the head, C·(d + 1)"},
    "fedgen": {
        "generator": "parameters and buffers of the generator",
        "labels": "label counts of the last round's clients, `[C]`",
    },
    "fedgkt": {
        "logits": "the server's logits of the client's training rows, `[n_k, C]`",
        "large": "parameters and buffers of the server's model, for evaluation",
    },
    "fedkd": {"change": "change of the mentee since the last round, as truncated SVDs"},
}
"""Content of broadcast items in addition to the shared part of the model, keyed by method."""


def built_in_methods() -> dict[str, type[Algorithm]]:
    """Return the classes of the built-in methods, keyed by name."""
    methods = {name: register_algorithm[name] for name in register_algorithm}
    return {n: kind for n, kind in methods.items() if kind.__module__.startswith("hetero_fl.")}


def methods_index() -> str:
    """Return the text of docs/reference/methods.md.

    Raises:
        SystemExit: If `FAMILIES` does not contain exactly the built-in methods.
    """
    known = built_in_methods()
    listed = [name for family in FAMILIES for name in family.methods]
    if missing := sorted(set(known) ^ set(listed)):
        raise SystemExit(f"FAMILIES of {Path(__file__).name} and the registry differ in {missing}")
    lines = ["# Method reference", "", _notice("hetero_fl/algorithms"), "", INDEX_TEXT]
    for family in FAMILIES:
        rows = []
        for name in family.methods:
            link = f"[`{name}`](methods/{family.page}.md#{name})"
            needs = format_needs(describe_needs(known[name]())) or "–"
            rows.append(
                (link, method_title(known[name]), method_summary(known[name]).rstrip("."), needs)
            )
        lines += [f"## {family.title}", ""]
        lines += [*_table(("name", "title", "summary", "needs"), rows), ""]
    rows = [
        _setting_row(ClientSettings, name, ClientSettings.model_fields[name], {})
        for name in CLIENT_OPTIONS
    ]
    lines += ["## Options of all methods", "", OPTIONS_TEXT, ""]
    lines += [*_table(CONFIGURATION_HEADER, rows), ""]
    return "\n".join([*lines, COMMON_TEXT])


def family_page(family: Family) -> str:
    """Return the text of the page of a family, which is docs/reference/methods/`page`.md."""
    known = built_in_methods()
    lines = [f"# {family.title}", "", _notice("hetero_fl/algorithms"), "", family.text, ""]
    for name in family.methods:
        lines += _method_section(name, known[name])
    for heading, base in family.notes.items():
        _summary, *paragraphs = method_paragraphs(base)
        used_by = [name for name, kind in known.items() if issubclass(kind, base)]
        lines += [f"## {heading}", "", f"Used by {', '.join(f'`{n}`' for n in sorted(used_by))}."]
        for paragraph in paragraphs:
            lines += ["", paragraph]
        lines.append("")
    return "\n".join(lines)


def _method_section(name: str, kind: type[Algorithm]) -> list[str]:
    method = kind()
    first, *paragraphs = method_paragraphs(kind)
    lines = [f"## `{name}`", "", f"**{method_title(kind)}.** {first}"]
    for paragraph in paragraphs:
        lines += ["", paragraph]
    needs = format_needs(describe_needs(method))
    facts = {
        "Needs": needs or "–",
        "Tasks": ", ".join(supported_tasks(method)) or "all",
        "Evaluated": kind.evaluated_when,
        "Module": f"`{kind.__module__.replace('.', '/')}.py`",
        "Paper": " · ".join(method_references(kind)),
    }
    lines += ["", *(f"- **{word}:** {text}" for word, text in facts.items() if text), ""]
    rows = exchanged_items(name, method)
    if rows:
        lines += [*_table(("item", "direction", "content", "permitted by `shares`"), rows), ""]
    elif method.needs.all_clients:
        lines += ["All rows are in one place; this is not counted as traffic.", ""]
    else:
        lines += ["Nothing is exchanged.", ""]
    settings = [_setting_row(kind, key, field) for key, field in kind.model_fields.items()]
    if settings:
        lines += [*_table(("key", "values", "default", "description"), settings), ""]
    return lines


def exchanged_items(name: str, method: Algorithm) -> list[tuple[str, ...]]:
    """Return one table row (item, direction, content, share) for each exchanged item of a method.

    An item is a named part of a broadcast or upload. With other settings, the method may exchange
    additional items.

    Args:
        name: Name of the method.
        method: The method with its default settings.
    """
    shared = shared_part_of(method)
    rows: list[tuple[str, ...]] = []
    if method.uploads and shared.part != () and shared.received != ():
        rows.append((f"`{shared.slot}`", "down", _shared_content(method), "parameters"))
    for item, content in BROADCASTS.get(name, {}).items():
        rows.append((f"`{item}`", "down", content, "–"))
    for item, spec in method.uploads.items():
        content = UPLOADS.get((name, item)) or _content(method, item, spec)
        rows.append((f"`{item}`", "up", content, spec.needed_share))
    return rows


def _content(method: Algorithm, name: str, spec: ItemSpec) -> str:
    if name == shared_part_of(method).slot and spec.kind == "params":
        return _shared_content(method)
    content = CONTENTS[spec.kind]
    if spec.kind == "rows" and spec.prediction_type:
        content = f"{spec.prediction_type} of proxy rows, `[D, C]`"
    return content + (", as truncated SVDs" if spec.ranks else "")


def _shared_content(method: Algorithm) -> str:
    shared = shared_part_of(method)
    model = "the mentee" if shared.slot == "mentee" else "the model"
    content = f"parameters and buffers of {model}"
    if shared.part:
        content = f"{', '.join(prefix.rstrip('.') for prefix in shared.part)} of {model}"
    if shared.local == "batch_norm":
        content += " without BatchNorm layers"
    elif shared.local == "batch_norm_statistics":
        content += " without BatchNorm statistics"
    return content


# Command line


EXIT_STATUSES = (
    ("0", "success"),
    ("1", "the run failed"),
    ("2", "invalid input, reported in one line on stderr"),
    ("130", "interrupted; after the first checkpoint, `--resume` continues the run"),
    ("141", "the reader of the output closed the pipe"),
)


def command_line_page() -> str:
    """Return the text of docs/reference/command_line.md."""
    rows = [
        (f"[`{name}`](#hetero-fl-{name})", command.short_help or "")
        for name, command in APP.commands.items()
    ]
    lines = [
        "# Command line",
        "",
        _notice("the commands in hetero_fl/cli"),
        "",
        "`hetero-fl COMMAND --help` prints the description of a command. In a checkout,",
        "`python scripts/train.py` is equivalent to `hetero-fl train`. There are also scripts for",
        "`federate`, `compare`, `evaluate`, `join`, `audit` and `export`.",
        "",
        *_table(("exit status", "meaning"), EXIT_STATUSES),
        "",
        *_table(("command", "purpose"), rows),
        "",
        "## Options of all commands",
        "",
        *_table(
            ("option", "description"),
            [(_option_names(option), _help_text(option)) for option in COMMON_OPTIONS]
            + [("`-h`, `--help`", "Show the help and exit.")],
        ),
        "",
    ]
    for name, command in APP.commands.items():
        lines += _command_section(name, command)
    return "\n".join(lines)


def _command_section(name: str, command: click.Command) -> list[str]:
    context = click.Context(command, info_name=f"hetero-fl {name}")
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = [f"## `hetero-fl {name}`", "", *_paragraphs(command.help or "")]
    lines += ["```text", usage, "```", ""]
    documented = {option.name for option in COMMON_OPTIONS}
    rows = []
    for parameter in command.params:
        if parameter.name in documented:
            continue
        name_text = _option_names(parameter)
        default = "" if isinstance(parameter, click.Argument) else _default_text(parameter)
        rows.append((name_text, default, _help_text(parameter)))
    if rows:
        lines += [*_table(("argument or option", "default", "description"), rows), ""]
    examples = (command.epilog or "").partition("Examples:\n")[2].partition("\n\n")[0]
    return [*lines, "```sh", *(line[2:] for line in examples.splitlines() if line), "```", ""]


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.strip().split("\n\n"):
        yield " ".join(paragraph.split())
        yield ""


def _option_names(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Argument):
        return f"`{parameter.metavar or (parameter.name or '').upper()}`".replace("|", "\\|")
    names = ", ".join(f"`{name}`" for name in parameter.opts)
    if getattr(parameter, "is_flag", False):
        return names
    values = parameter.metavar
    if values is None and isinstance(parameter.type, click.Choice):
        values = "|".join(parameter.type.choices)
    values = values or parameter.type.name.upper()
    return f"{names} `{values}`".replace("|", "\\|")


def _default_text(parameter: click.Parameter) -> str:
    if parameter.required:
        return "required"
    written = re.search(r"\[default: (.*?)\]$", getattr(parameter, "help", None) or "")
    if written:
        return f"`{written[1]}`" if "<" in written[1] or "/" in written[1] else written[1]
    value = parameter.to_info_dict()["default"]
    # Compare with `is`, because 0 == False.
    return "" if value is None or value is False or value == () else f"`{value}`"


def _help_text(parameter: click.Parameter) -> str:
    text = re.sub(r"\s*\[default: .*\]$", "", getattr(parameter, "help", None) or "")
    return text.replace("<", "\\<").replace("|", "\\|")


# Messages


MESSAGES_TEXT = """\
The messages of errors that a user, a site or the author of a method can cause, by package; notes of
a run are marked as such. A part in braces is replaced: `{path}` by a path, `…` by other text. Most
messages start with the key, file or option that causes the error; where a message has none, the
caller adds it. An `ArgumentError` names an argument of a Python function; the command line prints
the option instead.
"""
# Classes of errors whose messages are addressed to users.
ERROR_CLASSES = {
    "ArgumentError",
    "BadParameter",
    "InputError",
    "ModelError",
    "PayloadError",
    "RequestRefusedError",
    "RoundAbandonedError",
    "RunFailedError",
    "ScoringError",
    "TypeError",
    "UsageError",
    "UserError",
    "ValueError",
}
RULE_CLASS = "CompatibilityRule"
RULE_ERRORS = {RULE_CLASS: "UserError"}
SOURCES = ("hetero_fl", "model_zoo")
# Functions whose results are named after their first argument in a message.
TRANSPARENT = {"str", "repr", "list", "sorted", "tuple", "set", "format_value", "printable", "len"}


def messages_page() -> str:
    """Return the text of docs/reference/messages.md."""
    lines = [
        "# Messages",
        "",
        _notice("the source of hetero_fl and model_zoo"),
        "",
        MESSAGES_TEXT,
    ]
    for package, messages in sorted(collect_messages().items()):
        rows = [
            (_code(text), error, f"`{module}`")
            for text, error, module in sorted(messages, key=lambda row: (row[0].lower(), row))
        ]
        lines += [f"## `{package}`", "", *_table(("message", "error", "module"), rows), ""]
    return "\n".join(lines)


def collect_messages() -> dict[str, set[tuple[str, str, str]]]:
    """Collect the messages of all errors in the source code.

    Returns:
        Tuples (message, error class, module), keyed by package.
    """
    found: dict[str, set[tuple[str, str, str]]] = {}
    for source in SOURCES:
        for path in sorted((ROOT / source).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            package = ".".join(parts[:2]) if len(parts) > 2 else source
            tree = ast.parse(path.read_text(encoding="utf-8"))
            module = ".".join(parts)
            for text, error in _messages_of(tree):
                found.setdefault(package, set()).add((_with_constants(text, module), error, module))
    return found


def _with_constants(text: str, module: str) -> str:
    """Replace the names of constants in braces by their values, if these are texts or numbers."""

    def value(name: re.Match[str]) -> str:
        constant = getattr(importlib.import_module(module), name[1], None)
        return str(constant) if isinstance(constant, str | int | float) else name[0]

    return re.sub(r"\{([A-Z][A-Z_]+)\}", value, text)


def _messages_of(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield a tuple (message, error class) for each error that a module creates."""
    constants = _assigned_texts(tree.body)
    scopes: list[tuple[ast.AST, dict[str, list[ast.expr]]]] = [(tree, constants)]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            scopes.append((node, constants | _assigned_texts(list(ast.walk(node)))))
    seen: set[ast.Call] = set()
    notes = {
        call
        for statement in tree.body
        if isinstance(statement, ast.AnnAssign) and _name_of(statement.target).endswith("NOTES")
        for call in ast.walk(statement)
    }
    # `ast.walk` yields inner functions last. Inner functions are searched first, because their
    # scopes contain the most names.
    for scope, names in reversed(scopes):
        for node in ast.walk(scope):
            if not isinstance(node, ast.Call) or node in seen:
                continue
            seen.add(node)
            error = _name_of(node.func)
            position = 2 if error == RULE_CLASS else 0
            if (error in ERROR_CLASSES or error == RULE_CLASS) and len(node.args) > position:
                for text in _texts(node.args[position], names):
                    if re.search(r"[a-z]{2,}", re.sub(r"\{[^}]*\}", "", text)):
                        yield text, "note" if node in notes else RULE_ERRORS.get(error, error)


def _assigned_texts(body: list[ast.stmt] | list[ast.AST]) -> dict[str, list[ast.expr]]:
    """Return the text expressions that are assigned to variables, keyed by variable name."""
    found: dict[str, list[ast.expr]] = {}
    for node in body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            if isinstance(target, ast.Name) and isinstance(
                node.value, ast.Constant | ast.JoinedStr | ast.BinOp | ast.IfExp
            ):
                found.setdefault(target.id, []).append(node.value)
    return found


def _texts(node: ast.expr, names: dict[str, list[ast.expr]]) -> list[str]:
    """Return all texts to which an expression can evaluate, with variable names in braces."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return ["".join(map(_part, node.values))]
    if isinstance(node, ast.IfExp):
        return _texts(node.body, names) + _texts(node.orelse, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        lefts = _texts(node.left, names) or [_placeholder(node.left)]
        rights = _texts(node.right, names) or [_placeholder(node.right)]
        return [left + right for left in lefts for right in rights]
    if isinstance(node, ast.Name) and node.id in names:
        values = names[node.id]
        others = {key: value for key, value in names.items() if key != node.id}
        return [text for value in values for text in _texts(value, others)]
    return []


def _part(node: ast.expr) -> str:
    """Return the text of one part of a formatted string."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    assert isinstance(node, ast.FormattedValue)
    return _placeholder(node.value)


def _placeholder(node: ast.expr) -> str:
    return f"{{{_name_of(node)}}}" if _name_of(node) else "…"


def _name_of(node: ast.AST) -> str:
    """Return a short name for an expression.

    The name is that of the variable, attribute or function, or empty for other expressions.
    """
    name = ""
    if isinstance(node, ast.Name):
        name = node.id
    elif isinstance(node, ast.Attribute):
        name = node.attr
    elif isinstance(node, ast.Subscript):
        name = _name_of(node.value)
    elif isinstance(node, ast.Call):
        name = _name_of(node.func)
        if name == "join" or name in TRANSPARENT:
            name = _name_of(node.args[0]) if node.args else ""
    elif isinstance(node, ast.GeneratorExp | ast.ListComp):
        name = _name_of(node.generators[0].iter)
    return name.lstrip("_")


def _code(text: str) -> str:
    """Format a text as Markdown code for a table cell."""
    # Messages of rules contain attributes, such as {run.config.clients.per_round:g}.
    short = re.sub(r"\{(?:\w+\.)*(\w+)(?:\[\w+\])?(?::[^}]*)?\}", r"{\1}", text)
    line = " ".join(short.split()).replace("|", "\\|")
    return f"`` {line} ``" if "`" in line else f"`{line}`"


# Modules


MODULES_TEXT = """\
The modules of each folder with the first sentence of their docstrings.
[Architecture](../explanation/architecture.md) explains how the packages depend on each other.
"""


def modules_page() -> str:
    """Return the text of docs/reference/modules.md."""
    lines = [
        "# Modules",
        "",
        _notice("the docstrings of hetero_fl and model_zoo"),
        "",
        MODULES_TEXT,
    ]
    for source in SOURCES:
        for package in sorted((ROOT / source).rglob("__init__.py")):
            folder = package.parent
            name = folder.relative_to(ROOT).as_posix()
            rows = [
                (f"[`{path.name}`](../../{name}/{path.name})", first_sentence(path).rstrip("."))
                for path in sorted(folder.glob("*.py"))
                if path != package
            ]
            lines += [f"## `{name}/`", "", first_sentence(package), ""]
            lines += [*_table(("module", "content"), rows), ""]
    return "\n".join(lines)


def first_sentence(path: Path) -> str:
    """Return the first sentence of the docstring of a module file, for a table cell."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(docstring.partition("\n\n")[0].split())
    first = re.split(r"(?<=\.)(?<!et al\.) ", first)[0]
    return first.replace("|", "\\|")


def main() -> int:
    """Write the generated pages, or check with `--check` whether they are up to date.

    Returns:
        The exit status, which is 1 if a checked page is outdated and 0 otherwise.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check",
        action="store_true",
        help="do not write files; list outdated pages and exit with status 1 if there are any",
    )
    is_check = parser.parse_args().check
    files = {REFERENCE / name: text for name, text in all_pages().items()}
    outdated = [path for path, text in files.items() if _read(path) != text]
    if is_check:
        for path in outdated:
            name = path.relative_to(REFERENCE).as_posix()
            print(f"docs/reference/{name}: outdated; run `make docs`", file=sys.stderr)
        return 1 if outdated else 0
    for path in outdated:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[path], encoding="utf-8")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
