"""Every validation error of pydantic that the schema can cause is translated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field, ValidationError

from hetero_fl.algorithms import register_algorithm
from hetero_fl.config.errors import CUSTOM_ERROR_TYPES, EXPECTED, LIMITS, describe_error
from hetero_fl.config.schema import Config
from hetero_fl.experiment.comparison.study import Study
from hetero_fl.experiment.configuration import load_config
from hetero_fl.utils.errors import UserError

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


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"rounds": "ten"}, "rounds: expected an integer, got 'ten'"),
        ({"rounds": 2.5}, "rounds: expected an integer, got 2.5"),
        ({"rounds": None}, "rounds: expected an integer, got null"),
        ({"rounds": True}, "rounds: expected an integer, got true"),
        (
            {"data": {"partition": {"alpha": True}}},
            "data.partition.alpha: expected a number, got true",
        ),
        (
            {"clients": {"defaults": {"class_weights": [True, 2.0]}}},
            "clients.defaults.class_weights: expected a number, got [True, 2.0]",
        ),
        (
            {"privacy": {"clip": {"params": True}}},
            "privacy.clip: expected a number, got {'params': True}",
        ),
        ({"rounds": [1]}, "rounds: expected an integer, got [1]"),
        ({"rounds": float("nan")}, "rounds: expected a finite number, got nan"),
        ({"rounds": 0}, "rounds: must be > 0, got 0"),
        ({"rounds": -(10**5000)}, "rounds: must be > 0, got a very large integer"),
        ({"seed": -1}, "seed: must be >= 0, got -1"),
        ({"data": {"split": {"test": 1}}}, "data.split.test: must be < 1, got 1"),
        (
            {"clients": {"defaults": {"augment": {"rotate": 400}}}},
            "augment.rotate: must be <= 180, got 400",
        ),
        (
            {"data": {"partition": {"alpha": "x"}}},
            "data.partition.alpha: expected a number, got 'x'",
        ),
        ({"output": {"plots": "maybe"}}, "output.plots: expected true or false, got 'maybe'"),
        ({"output": {"plots": 2}}, "output.plots: expected true or false, got 2"),
        ({"name": 5}, "name: expected a string, got 5"),
        ({"seed": {"name": 1}}, "seed: expected an integer, got {'name': 1}"),
        ({"name": ""}, "name: expected at least 1 character, got ''"),
        ({"name": "my run"}, "name: must match ^[A-Za-z0-9][A-Za-z0-9_.-]*$, got 'my run'"),
        ({5: 1}, "5: expected a string as key, got 5"),
        ({"algorithm": {5: 1}}, "algorithm.5: expected a string as key, got 5"),
        (
            {"attacks": {"name": "label_flip", "pairs": {"a": 1}}},
            "attacks.pairs.a: expected an integer as key, got 'a'",
        ),
        (
            {"runtime": {"divergence": "skp"}},
            "expected 'skip' or 'stop', got 'skp'; did you mean 'skip'?",
        ),
        (
            {"clients": {"defaults": {"preprocess": {"channels": 2}}}},
            "preprocess.channels: expected 1 or 3, got 2",
        ),
        (
            {"clients": {"defaults": {"preprocess": {"normalize": "x"}}}},
            "expected a mapping or 'own', got 'x'",
        ),
        (
            {"clients": {"defaults": {"preprocess": {"normalize": {"mean": "x"}}}}},
            "expected a number or a list, got 'x'",
        ),
        (
            {"clients": {"defaults": {"preprocess": {"normalize": {"std": -1}}}}},
            "normalize.std: must be > 0, got -1",
        ),
        (
            {"clients": {"defaults": {"class_weights": [1, "a"]}}},
            "class_weights.1: expected a number, got 'a'",
        ),
        (
            {"data": {"series": {"sites": []}}},
            "data.series.sites: expected at least 1 entry, got []",
        ),
        (
            {"data": {"series": {"horizons": 5}}},
            "data.series.horizons: expected a list, got 5; write [5]",
        ),
        ({"clients": {"groups": [{}]}}, "clients.groups.0.name: missing"),
    ],
)
def test_describe_error_names_expected_and_found_values(tree: dict[Any, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(tree)

    assert line in str(error.value)
    assert "Input" not in str(error.value) and "valid" not in str(error.value)


@pytest.mark.parametrize(
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
