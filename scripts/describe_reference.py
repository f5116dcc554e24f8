#!/usr/bin/env python3
"""Write the generated pages of docs/reference.

These pages describe the configuration, the files of a deployment, the methods and the command line.

    python scripts/describe_reference.py            # write the pages
    python scripts/describe_reference.py --check    # exit status 1 if a page is outdated
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import click
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hetero_fl.algorithms import Algorithm, register_algorithm  # noqa: E402
from hetero_fl.algorithms.distillation import ProxyDistillation, ProxyTraining  # noqa: E402
from hetero_fl.algorithms.mutual import MenteeTraining  # noqa: E402
from hetero_fl.algorithms.prototypes import CommonFeatureWidth  # noqa: E402
from hetero_fl.algorithms.proxy_distillation import InitialPhase  # noqa: E402
from hetero_fl.algorithms.requirements import (  # noqa: E402
    describe_needs,
    format_needs,
    method_paragraphs,
    method_references,
    method_summary,
    method_title,
    supported_tasks,
)
from hetero_fl.algorithms.round_parts import shared_part_of, shared_parts  # noqa: E402
from hetero_fl.cli.commands import APP  # noqa: E402
from hetero_fl.config import Config  # noqa: E402
from hetero_fl.config.clients import ClientSettings  # noqa: E402
from hetero_fl.config.describe import (  # noqa: E402
    describe_keys,
    section_of,
    section_summary,
)
from hetero_fl.config.schema import CLIENT_OPTIONS, LoggerConfig  # noqa: E402
from hetero_fl.core.payload import ItemSpec  # noqa: E402
from hetero_fl.deployment.config import SiteConfig  # noqa: E402
from hetero_fl.reporting.loggers import Logger, register_logger  # noqa: E402

REFERENCE = ROOT / "docs" / "reference"
NOTICE = "<!-- written by scripts/describe_reference.py (`make docs`); do not edit -->"
METHODS = {
    name: kind
    for name in register_algorithm
    if (kind := register_algorithm[name]).__module__.startswith("hetero_fl.")
}
"""Classes of the built-in methods, keyed by name."""


def all_pages() -> dict[str, str]:
    """Return the texts of all generated pages, keyed by path below docs/reference."""
    return {
        "configuration.md": configuration_page(),
        "site_file.md": site_file_page(),
        "methods.md": methods_index(),
        "command_line.md": command_line_page(),
        **{f"methods/{family.page}.md": family_page(family) for family in FAMILIES},
    }


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    titles, *lines = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return [titles, f"|{'---|' * len(header)}", *lines]


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
  value, before anything is written.
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
    return "\n".join(
        [
            "# Configuration",
            "",
            NOTICE,
            "",
            CONFIGURATION_TEXT,
            *_sections(Config, "", {}, "Top level"),
            "## Settings of the algorithms",
            "",
            "Write them next to `algorithm.name`. [Methods](methods.md) lists the methods, whose",
            "pages contain the settings, and the",
            "[options of all methods](methods.md#options-of-all-methods).",
            "",
            *_logger_sections(),
        ]
    )


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
        rows = _key_rows(logger)
        settings = [*_table(CONFIGURATION_HEADER, rows), ""] if rows else []
        package = f"hetero_fl[{logger.extra}]" if logger.extra else logger.module
        extra = f" Requires `{package}`." if package else ""
        lines += [f"### `{kind}`", "", f"{section_summary(logger)}{extra}", "", *settings]
    return lines


SITE_FILE_TEXT = """\
[Deploy a federation](../how_to/deploy.md) shows a site file with comments. Keys are checked as
those of a [configuration](configuration.md). Keys without a default are required.
"""


def site_file_page() -> str:
    """Return the text of docs/reference/site_file.md."""
    configured: dict[type[BaseModel], str] = {}
    _sections(Config, "", configured)
    seen = {
        section: link.replace("(#", "(configuration.md#") for section, link in configured.items()
    }
    return "\n".join(
        [
            "# Site file",
            "",
            NOTICE,
            "",
            SITE_FILE_TEXT,
            *_sections(SiteConfig, "", seen, "Keys"),
        ]
    )


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
    for name, field in model.model_fields.items():
        part = section_of(field.annotation)
        if name not in inherited and part is not None and part not in seen:
            later += _sections(part, f"{path}.{name}".lstrip("."), seen)
    rows = [row for row in _key_rows(model, seen) if row[0].strip("`") not in inherited]
    return [
        f"## `{path}`" if path else f"## {title}",
        "",
        f"{section_summary(model)}{_further_keys(model, base, seen)}",
        "",
        *([*_table(CONFIGURATION_HEADER, rows), ""] if rows else []),
        *later,
    ]


def _key_rows(
    model: type[BaseModel], seen: Mapping[type[BaseModel], str] = MappingProxyType({})
) -> list[tuple[str, ...]]:
    """Return a row of a table for each key of a section."""
    links = {section.__name__: link for section, link in seen.items()}
    return [
        (f"`{key.name}`", key.values, key.default, key.meaning.replace("|", "\\|"))
        for key in describe_keys(model, links)
    ]


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
LOCAL_PARTS = {
    "batch_norm": " without BatchNorm layers",
    "batch_norm_statistics": " without BatchNorm statistics",
}
"""What shared parameters leave out, keyed by `SharedPart.local`."""


def methods_index() -> str:
    """Return the text of docs/reference/methods.md."""
    lines = ["# Method reference", "", NOTICE, "", INDEX_TEXT]
    for family in FAMILIES:
        rows = [
            (
                f"[`{name}`](methods/{family.page}.md#{name})",
                method_title(METHODS[name]),
                method_summary(METHODS[name]).rstrip("."),
                format_needs(describe_needs(METHODS[name]())) or "–",
            )
            for name in family.methods
        ]
        lines += [f"## {family.title}", ""]
        lines += [*_table(("name", "title", "summary", "needs"), rows), ""]
    rows = [row for row in _key_rows(ClientSettings) if row[0].strip("`") in CLIENT_OPTIONS]
    lines += ["## Options of all methods", "", OPTIONS_TEXT, ""]
    lines += [*_table(CONFIGURATION_HEADER, rows), ""]
    return "\n".join([*lines, COMMON_TEXT])


def family_page(family: Family) -> str:
    """Return the text of the page of a family, which is docs/reference/methods/`page`.md."""
    lines = [f"# {family.title}", "", NOTICE, "", family.text, ""]
    for name in family.methods:
        lines += _method_section(name, METHODS[name])
    for heading, base in family.notes.items():
        users = sorted(f"`{name}`" for name, kind in METHODS.items() if issubclass(kind, base))
        paragraphs = [f"Used by {', '.join(users)}.", *method_paragraphs(base)[1:]]
        lines += [f"## {heading}", "", "\n\n".join(paragraphs), ""]
    return "\n".join(lines)


def _method_section(name: str, kind: type[Algorithm]) -> list[str]:
    method = kind()
    first, *others = method_paragraphs(kind)
    paragraphs = [f"**{method_title(kind)}.** {first}", *others]
    lines = [f"## `{name}`", "", "\n\n".join(paragraphs)]
    facts = {
        "Needs": format_needs(describe_needs(method)) or "–",
        "Tasks": ", ".join(supported_tasks(method)) or "all",
        "Evaluated": kind.evaluated_when,
        "Module": f"`{kind.__module__.replace('.', '/')}.py`",
        "Paper": " · ".join(method_references(kind)),
    }
    lines += ["", *(f"- **{word}:** {text}" for word, text in facts.items() if text), ""]
    rows = exchanged_items(method)
    if rows:
        lines += [*_table(("item", "direction", "content", "permitted by `shares`"), rows), ""]
    if method.needs.all_clients and not method.needs.counts_traffic:
        lines += ["All rows are in one place; this is not counted as traffic.", ""]
    elif not rows:
        lines += ["Nothing is exchanged.", ""]
    settings = _key_rows(kind)
    if settings:
        lines += [*_table(("key", "values", "default", "description"), settings), ""]
    return lines


def exchanged_items(method: Algorithm) -> list[tuple[str, ...]]:
    """Return one table row (item, direction, content, share) for each exchanged item of a method.

    An item is a named part of a broadcast or upload. With other settings, the method may exchange
    additional items.
    """
    rows: dict[tuple[str, ...], list[str]] = {}
    for direction, specs in (("down", method.downloads), ("up", method.uploads)):
        for item, spec in specs.items():
            is_permitted = direction == "up" or item in shared_parts(method)
            share = spec.needed_share if is_permitted else "–"
            row = (f"`{item}`", _content(method, item, spec), share)
            rows.setdefault(row, []).append(direction)
    return [
        (item, ", ".join(directions), content, share)
        for (item, content, share), directions in rows.items()
    ]


def _content(method: Algorithm, name: str, spec: ItemSpec) -> str:
    if spec.description:
        return spec.description
    if name in shared_parts(method) and spec.kind == "params":
        return _shared_content(method, name)
    content = CONTENTS[spec.kind]
    if spec.kind == "rows" and spec.prediction_type:
        content = f"{spec.prediction_type} of proxy rows, `[D, C]`"
    return content + (", as truncated SVDs" if spec.ranks else "")


def _shared_content(method: Algorithm, slot: str) -> str:
    shared = shared_part_of(method, slot)
    content = f"parameters and buffers of the {slot}"
    if shared.part:
        content = f"{', '.join(prefix.rstrip('.') for prefix in shared.part)} of the {slot}"
    return content + LOCAL_PARTS.get(shared.local, "")


# Command line


EXIT_STATUSES = (
    ("0", "success"),
    ("1", "the run failed"),
    ("2", "invalid input, reported in one line on stderr"),
    ("130", "interrupted; after the first checkpoint, `--resume` continues the run"),
    ("141", "the reader of the output closed the pipe"),
)


COMMON_OPTIONS = re.compile(
    r"^  (?:-q, --quiet|-v, --verbose|--version|-h, --help) .*\n?", re.MULTILINE
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
        NOTICE,
        "",
        "`hetero-fl COMMAND --help` prints the description of a command. In a checkout,",
        "`python scripts/train.py` is equivalent to `hetero-fl train`. There are also scripts for",
        "`federate`, `compare`, `evaluate`, `join`, `audit` and `export`. Every command also has",
        "`--quiet` (results, warnings and errors only), `--verbose` (tracebacks of errors),",
        "`--version` and `--help`.",
        "",
        *_table(("exit status", "meaning"), EXIT_STATUSES),
        "",
        *_table(("command", "purpose"), rows),
        "",
    ]
    for name, command in APP.commands.items():
        context = click.Context(
            command, info_name=f"hetero-fl {name}", terminal_width=88, **command.context_settings
        )
        text = COMMON_OPTIONS.sub("", command.get_help(context)).replace("\nOptions:\n\n", "\n")
        lines += [f"## `hetero-fl {name}`", "", "```text", text, "```", ""]
    return "\n".join(lines)


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
    status = 0
    for name, text in all_pages().items():
        path = REFERENCE / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if is_check:
            print(f"docs/reference/{name}: outdated; run `make docs`", file=sys.stderr)
            status = 1
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
