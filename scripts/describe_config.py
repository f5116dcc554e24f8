#!/usr/bin/env python3
"""Write docs/reference/configuration.md from the schema and the tables of docs/reference/methods.md from the methods.

python scripts/describe_config.py            # write the pages
python scripts/describe_config.py --check    # exit status 1 if a page is outdated
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hetero_fl.algorithms import register_algorithm  # noqa: E402
from hetero_fl.algorithms.base import Algorithm  # noqa: E402
from hetero_fl.algorithms.distillation import ProxyDistillation  # noqa: E402
from hetero_fl.algorithms.requirements import (  # noqa: E402
    describe_needs,
    format_needs,
    method_summary,
)
from hetero_fl.config import Config  # noqa: E402
from hetero_fl.config.describe import (  # noqa: E402
    describe_key,
    describe_values,
    format_default,
    section_of,
    section_summary,
)

PAGE = ROOT / "docs" / "reference" / "configuration.md"
INDEX = ROOT / "docs" / "reference" / "methods.md"
INTRODUCTION = """\
# Configuration

<!-- written by scripts/describe_config.py (`make docs`) from the schema in \
hetero_fl/config; do not edit -->

A configuration is a YAML file, a JSON file or a Python dictionary. Every key has a default; a file
contains the keys that differ. `configs/medical_hetero.yaml` is a commented example.

- **Overrides** on the command line take precedence over the file:
  `rounds=5 data.partition.alpha=0.1 algorithm.name=fedmd`. Lists and mappings are written as in
  YAML: `"clients.groups.0.model={name: mlp, hidden: [64]}"`. An override that names another
  algorithm drops the settings of the file's algorithm.
- **Errors** are reported in one line with the key, the value found and the nearest valid key or
  value, before anything is written.
- `--check` prints the resolved configuration. A run saves it as `config.yaml`.
- **User-defined** algorithms, models, data sources and partitions are written as
  `python:package.module:Name` instead of a name. They require `--allow-code`
  ([why](../explanation/threat_model.md#code-from-configuration-files)).
- JSON files of a well-known tutorial, which have ten keys, are translated
  ([page](../scenarios/cifar10.md)).
- A model may be given by its name: `model: mlp` means `model: {name: mlp}`.
- `null` is the default of keys that are not set.
"""


def page() -> str:
    """Return the text of docs/reference/configuration.md."""
    return INTRODUCTION + "\n" + "\n".join(_sections(Config, "", {})) + "\n" + _algorithms()


def _sections(model: type[BaseModel], path: str, seen: dict[type[BaseModel], str]) -> list[str]:
    """Return the section of a part of the schema and those of its parts at their first use."""
    seen[model] = path
    base = next((b for b in model.__mro__[1:] if b in seen), None)
    fields = {
        n: f for n, f in model.model_fields.items() if base is None or n not in base.model_fields
    }
    lines = [
        f"## {'Top level' if not path else f'`{path}`'}",
        "",
        f"{section_summary(model)}{_also(model, base, seen)}",
        "",
    ]
    later: list[str] = []
    rows = []
    for name, field in fields.items():
        part = section_of(field.annotation)
        if part is not None and part not in seen:
            seen[part] = f"{path}.{name}".lstrip(".")
            later += _sections(part, seen[part], seen)
        rows.append(_row(model, name, field, seen))
    return [*lines, *_table(rows), "", *later]


def _algorithms() -> str:
    # Methods that are registered outside the package are not documented.
    known = {
        name: register_algorithm[name]
        for name in sorted(register_algorithm)
        if register_algorithm[name].__module__.startswith("hetero_fl.")
    }
    distilling = ", ".join(
        name for name, kind in known.items() if issubclass(kind, ProxyDistillation)
    )
    lines = [
        "## Settings of the algorithms",
        "",
        "Write them next to `algorithm.name`. `logit_adjustment` may be written there, too; "
        "it is an",
        "alias of `clients.defaults.logit_adjustment`. "
        "[methods.md](methods.md) describes the methods.",
        "",
    ]
    of_distilling = list(ProxyDistillation.model_fields)
    sections: list[tuple[str, type[BaseModel], list[str]]] = [
        (f"All distillation algorithms ({distilling})", ProxyDistillation, of_distilling),
    ]
    sections += [
        (f"`{n}`", kind, [f for f in kind.model_fields if _differs(kind, f)])
        for n, kind in known.items()
    ]
    for title, kind, fields in sections:
        if fields:
            rows = [_row(kind, n, kind.model_fields[n]) for n in fields]
            lines += [f"### {title}", "", *_table(rows), ""]
    return "\n".join(lines)


def _differs(kind: type[BaseModel], name: str) -> bool:
    """Return whether a setting or its default differs from the table of common settings."""
    common = (ProxyDistillation if issubclass(kind, ProxyDistillation) else Algorithm).model_fields
    return name not in common or common[name].default != kind.model_fields[name].default


def _row(
    model: type[BaseModel],
    name: str,
    field: FieldInfo,
    seen: dict[type[BaseModel], str] | None = None,
) -> tuple[str, str, str, str]:
    given = "" if field.is_required() else format_default(field)

    def link(part: type[BaseModel]) -> str:
        return f"[`{seen[part]}`](#{_anchor(seen[part])})" if seen and part in seen else "table"

    return (
        f"`{name}`",
        describe_values(field.annotation, field.metadata, link),
        given,
        describe_key(model, name).replace("|", "\\|"),
    )


def _table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    return [
        "| key | values | default | meaning |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(r)} |" for r in rows),
    ]


def _also(
    model: type[BaseModel], base: type[BaseModel] | None, seen: dict[type[BaseModel], str]
) -> str:
    if model.model_config.get("extra") == "allow":
        return (
            " Options: `python -m model_zoo` lists the models, `model_zoo.model_options(name)` "
            "their options."
        )
    return (
        ""
        if base is None
        else f" It also has every key of [`{seen[base]}`](#{_anchor(seen[base])})."
    )


def _anchor(path: str) -> str:
    """Return the anchor that GitHub creates for a heading."""
    return path.replace(".", "").lower()


def methods_index() -> str:
    """Return docs/reference/methods.md with file, summary and needs of each method from its class."""

    def row(match: re.Match[str]) -> str:
        name, page, travels = match.groups()
        kind = register_algorithm[name]
        file = kind.__module__.rpartition(".")[2]
        summary = method_summary(kind).rstrip(".")
        needs = format_needs(describe_needs(kind())) or "–"
        return f"| [`{name}`]({page}) | `{file}.py` | {summary} | {travels} | {needs} |"

    pattern = r"^\| \[`(\w+)`\]\(([^)]*)\) \| `\w+\.py` \| .*? \| (.*? \| .*?) \| .*? \|$"
    return re.sub(pattern, row, INDEX.read_text(encoding="utf-8"), flags=re.MULTILINE)


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with status 1 if a page is outdated",
    )
    if parser.parse_args().check:
        current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        index = INDEX.read_text(encoding="utf-8")
        return 0 if current == page() and index == methods_index() else 1
    PAGE.write_text(page(), encoding="utf-8")
    INDEX.write_text(methods_index(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
