#!/usr/bin/env python3
"""Write docs/configuration.md: every key of the configuration, from the descriptions in the schema.

python scripts/describe_config.py            # write it
python scripts/describe_config.py --check    # status 1 if it is not up to date
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hetero_fl.algorithms import algorithm  # noqa: E402
from hetero_fl.algorithms.base import Algorithm  # noqa: E402
from hetero_fl.algorithms.distillation import Distilling  # noqa: E402
from hetero_fl.config import Config  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

<!-- written by scripts/describe_config.py (`make docs`) from the schema in hetero_fl/config; do not edit -->

A configuration is a YAML file (or JSON, or a dictionary from Python). Every key has a default; a file holds what differs.
`configs/medical_hetero.yaml` explains the keys where they first appear.

- **Overrides** on the command line come after the file: `rounds=5 data.partition.alpha=0.1 algorithm.name=fedmd`. Lists and
  tables are written as in YAML: `"clients.groups.0.model={name: mlp, hidden: [64]}"`. When an override names another
  algorithm, the file's settings of its own algorithm are dropped.
- **Mistakes** are one line: the place, what was found, and the nearest valid key or value. Nothing is written.
- `--check` prints the resolved configuration; a run keeps it as `config.yaml`.
- **One's own** algorithm, model, data source or partition stands as `python:package.module:Name` in place of a name.
- A JSON file with the ten keys of the classic tutorial is translated as it is read ([page](scenarios/cifar10.md)).
- A model, where one is asked for, may be given by its name alone: `model: mlp` is `model: {name: mlp}`.
"""
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "table"}


def page() -> str:
    """The whole page."""
    return INTRODUCTION + "\n" + "\n".join(_sections(Config, "", {})) + "\n" + _algorithms()


def _sections(model: type[BaseModel], path: str, seen: dict[type[BaseModel], str]) -> list[str]:
    """A section for this part of the schema, then those of its parts; each part is described where it first appears."""
    seen[model] = path
    base = next((b for b in model.__mro__[1:] if b in seen), None)
    fields = {n: f for n, f in model.model_fields.items() if base is None or n not in base.model_fields}
    lines = [f"## {'The whole' if not path else f'`{path}`'}", "", f"{_summary(model)}{_also(model, base, seen)}", ""]
    later: list[str] = []
    rows = []
    for name, field in fields.items():
        part = _part(field.annotation)
        if part is not None and part not in seen:
            seen[part] = f"{path}.{name}".lstrip(".")
            later += _sections(part, seen[part], seen)
        rows.append(_row(model, name, field, seen))
    return [*lines, *_table(rows), "", *later]


def _algorithms() -> str:
    # one's own methods, registered by whoever imported this, are left out
    known = {name: algorithm[name] for name in sorted(algorithm) if algorithm[name].__module__.startswith("hetero_fl.")}
    distilling = ", ".join(name for name, kind in known.items() if issubclass(kind, Distilling))
    lines = [
        "## Settings of the algorithms",
        "",
        "They stand beside `algorithm.name`. What the methods do is in [methods.md](methods.md).",
        "",
    ]
    of_all = list(Algorithm.model_fields)
    of_distilling = [n for n in Distilling.model_fields if n not in of_all]
    sections: list[tuple[str, type[BaseModel], list[str]]] = [
        ("Every algorithm", Algorithm, of_all),
        (f"Every distilling algorithm ({distilling})", Distilling, of_distilling),
    ]
    sections += [(f"`{n}`", kind, [f for f in kind.model_fields if _differs(kind, f)]) for n, kind in known.items()]
    for title, kind, fields in sections:
        if fields:
            rows = [_row(kind, n, kind.model_fields[n]) for n in fields]
            lines += [f"### {title}", "", *_table(rows), ""]
    return "\n".join(lines)


def _differs(kind: type[BaseModel], name: str) -> bool:
    """Whether a setting is not already told, with this default, of all algorithms or of all that distil."""
    common = (Distilling if issubclass(kind, Distilling) else Algorithm).model_fields
    return name not in common or common[name].default != kind.model_fields[name].default


def _row(
    model: type[BaseModel], name: str, field: FieldInfo, seen: dict[type[BaseModel], str] | None = None
) -> tuple[str, str, str, str]:
    default = "" if field.is_required() else _default(field)
    return f"`{name}`", _kind(field.annotation, field.metadata, seen or {}), default, meaning(model, name)


def meaning(model: type[BaseModel], name: str) -> str:
    """What a key means: its description, or that of the key it takes over, or what the part that it holds says of itself."""
    for kind in model.__mro__:
        fields = getattr(kind, "model_fields", {})
        if name in fields and (told := fields[name].description):
            return str(told).replace("|", "\\|")
    part = _part(model.model_fields[name].annotation)
    return "" if part is None else re.split(r"(?<!et al)\. ", _summary(part))[0].rstrip(".")


def _table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    return [
        "| key | values | default | meaning |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(r)} |" for r in rows),
    ]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        return f"`{', '.join(str(getattr(v, 'name', v)) for v in value)}`"
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else _plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) + "}"
    return "[" + ", ".join(map(_plain, value)) + "]" if isinstance(value, list | tuple) else str(value)


def _kind(annotation: Any, metadata: typing.Iterable[Any], seen: dict[type[BaseModel], str]) -> str:
    """The values that a field takes, in words."""
    metadata = list(metadata)
    for validator in metadata:
        if isinstance(validator, BeforeValidator):  # hetero_fl.config.base.choice keeps its names in a closure
            known = inspect.getclosurevars(validator.func).nonlocals
            if "names" in known:
                own = [f"{known['prefix']}…"] if known.get("prefix") else []
                return ", ".join(f"`{n}`" for n in [*known["names"], *own])
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(arguments[0], [*arguments[1:], *metadata], seen)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(a, metadata, seen) for a in arguments if a is not type(None))
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (list, tuple):
        return f"list of {_kind(arguments[0], [], seen)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[`{seen[annotation]}`](#{_anchor(seen[annotation])})" if annotation in seen else "table"
    return "table" if origin is dict else WORDS[annotation] + _bounds(metadata)


def _bounds(metadata: typing.Iterable[Any]) -> str:
    told = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}
    constraints = [part for m in metadata for part in (m.metadata if isinstance(m, FieldInfo) else [m])]
    found = [text.format(v) for m in constraints for k, text in told.items() if (v := getattr(m, k, None)) is not None]
    return f", {' and '.join(found)}" if found else ""


def _part(annotation: Any) -> type[BaseModel] | None:
    """The part of the schema that a field holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_part, typing.get_args(annotation))), None)


def _summary(model: type[BaseModel]) -> str:
    return " ".join(inspect.cleandoc(model.__doc__ or "").split())


def _also(model: type[BaseModel], base: type[BaseModel] | None, seen: dict[type[BaseModel], str]) -> str:
    if model.model_config.get("extra") == "allow":
        return " Options: `python -m model_zoo` lists the models, `model_zoo.model_options(name)` their options."
    return "" if base is None else f" Besides: every key of [`{seen[base]}`](#{_anchor(seen[base])})."


def _anchor(path: str) -> str:
    """The anchor that GitHub makes of a heading: without dots and backticks."""
    return path.replace(".", "").lower()


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the page is not up to date")
    if parser.parse_args().check:
        current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        return 0 if current == page() else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
