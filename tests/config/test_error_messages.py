"""Every validation error of pydantic that the schema can cause is translated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field, ValidationError

from hetero_fl.algorithms import register_algorithm
from hetero_fl.config.describe import CUSTOM_ERROR_TYPES, EXPECTED, LIMITS, describe_error
from hetero_fl.config.schema import Config
from hetero_fl.experiment.comparison.study import Study
from tests.support.cases import each_case

ERRORS_OF_NODE: dict[str, set[str]] = {
    "bool": {"bool_type", "bool_parsing"},
    "int": {"int_type", "int_parsing", "int_parsing_size", "int_from_float", "finite_number"},
    "float": {"float_type", "float_parsing", "finite_number"},
    "str": {"string_type", "string_unicode"},
    "literal": {"literal_error"},
    "list": {"list_type"},
    "tuple": {"tuple_type"},
    "dict": {"dict_type"},
    "model": {"model_type", "model_attributes_type"},
    "model-fields": {"missing", "extra_forbidden", "invalid_key"},
    "function-after": {"value_error", "assertion_error"},
    "function-before": {"value_error", "assertion_error"},
    "function-plain": {"value_error", "assertion_error"},
    "function-wrap": {"value_error", "assertion_error"},
    "is-instance": {"is_instance_of"},
    "lax-or-strict": {"path_type"},  # pydantic's node of a Path
    **{
        name: set()
        for name in (
            "any",
            "default",
            "definition-ref",
            "definitions",
            "json-or-python",
            "model-field",
            "no-info",
            "nullable",
            "union",
            "with-info",
        )
    },
}
ERRORS_OF_CONSTRAINT = {
    "gt": {"greater_than"},
    "ge": {"greater_than_equal"},
    "lt": {"less_than"},
    "le": {"less_than_equal"},
    "multiple_of": {"multiple_of"},
    "pattern": {"string_pattern_mismatch"},
}
IN_DESCRIBE = {"literal_error", "missing", "extra_forbidden", "invalid_key"}


def nodes(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        if isinstance(schema.get("type"), str):
            yield schema
        schema = list(schema.values())
    if isinstance(schema, list | tuple):
        for part in schema:
            yield from nodes(part)


def test_every_error_type_of_the_schema_has_a_message() -> None:
    errors = set()
    for model in (Config, Study, *(register_algorithm[name] for name in register_algorithm)):
        for node in nodes(model.__pydantic_core_schema__):
            # After a KeyError, add the errors of the node here and in errors.py.
            errors |= ERRORS_OF_NODE[node["type"]]
            errors |= set().union(
                *(found for key, found in ERRORS_OF_CONSTRAINT.items() if key in node)
            )
            for key, of_text, of_list in (
                ("min_length", "string_too_short", "too_short"),
                ("max_length", "string_too_long", "too_long"),
            ):
                errors |= {of_text if node["type"] == "str" else of_list} if key in node else set()

    assert errors - EXPECTED.keys() - LIMITS.keys() - CUSTOM_ERROR_TYPES - IN_DESCRIBE == set()


class Small(BaseModel):
    exact: int = Field(0, multiple_of=3)
    code: str = Field("", max_length=2)
    few: list[int] = Field([], max_length=1)
    file: Path = Path()


@each_case(
    ("tree", "line"),
    [
        ({"exact": 4}, "exact: must be a multiple of 3, got 4"),
        ({"code": "abc"}, "code: expected at most 2 characters, got 'abc'"),
        ({"few": [1, 2]}, "few: expected at most 1 entry, got [1, 2]"),
        ({"file": 5}, "file: expected a string, got 5"),
    ],
)
def test_describe_error_covers_fields_of_user_methods(tree: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError) as error:
        Small.model_validate(tree)

    assert describe_error(error.value, tree, Small) == line
