"""Settings as arguments of Python classes: signatures, docstrings and unexpected arguments."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import hetero_fl as hfl
from hetero_fl.algorithms import register_algorithm
from hetero_fl.config.base import Settings, accepted_settings
from tests.support.cases import each_case


def test_signature_has_plain_types() -> None:
    signature = inspect.signature(hfl.FedMD)

    assert signature.parameters["temperature"].annotation is float
    assert signature.parameters["temperature"].default == 2.0
    assert "Annotated" not in str(signature)


@each_case(
    ("kind", "arguments"),
    [
        (hfl.IID, {"min_size"}),
        (hfl.Dirichlet, {"alpha", "cap", "min_size"}),
        (hfl.Classes, {"classes", "classes_spread", "shots", "min_size"}),
        (hfl.Quantity, {"alpha", "min_size"}),
    ],
)
def test_partitions_list_only_the_settings_that_they_use(
    kind: type[Settings], arguments: set[str]
) -> None:
    assert set(inspect.signature(kind).parameters) == arguments
    documented = str(kind.__doc__)
    assert ("shots:" in documented) == ("shots" in arguments)


def test_class_variables_state_their_type() -> None:
    # Under Python 3.10, pydantic cannot evaluate `ClassVar` without a type.
    root = Path(__file__).parents[2]
    bare = [
        path.name
        for package in ("hetero_fl", "model_zoo")
        for path in (root / package).rglob("*.py")
        if re.search(r": ClassVar\b(?!\[)", path.read_text(encoding="utf-8"))
    ]

    assert not bare


@each_case("name", list(register_algorithm))
def test_every_setting_of_a_method_is_described(name: str) -> None:
    method = register_algorithm[name]

    described = str(method.__doc__)

    assert all(f"\n    {setting}: " in described for setting in accepted_settings(method))
