"""`hetero-fl methods`: summaries, requirements and settings."""

from __future__ import annotations

import re

import pytest

from hetero_fl.algorithms import Algorithm, Needs, register_algorithm
from hetero_fl.algorithms.requirements import (
    describe_needs,
    format_needs,
    is_baseline,
    is_reference,
    method_summary,
    shared_kinds,
    supported_tasks,
)
from hetero_fl.cli import main
from hetero_fl.core.payload import ItemSpec
from tests.support.cases import each_case

BUILT_IN = [
    name
    for name in register_algorithm
    if register_algorithm[name].__module__.startswith("hetero_fl.")
]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


def test_methods_lists_all_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in BUILT_IN:
        (place,) = [i for i, line in enumerate(lines) if line.split()[:1] == [name]]
        assert lines[place].split(maxsplit=1)[1].strip() == method_summary(register_algorithm[name])
        assert lines[place + 1].strip().startswith("sends ")


@each_case("name", BUILT_IN)
def test_summary_is_a_short_sentence(name: str) -> None:
    text = method_summary(register_algorithm[name])
    assert text.endswith(".") and 20 < len(text) <= 200, text
    assert text.count("(") == text.count(")")


def test_methods_describes_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "fedprox", "kt_pfl"]) == 0
    out = capsys.readouterr().out
    for name in ("fedprox", "kt_pfl"):
        for key, field in register_algorithm[name].model_fields.items():
            meaning = re.escape((field.description or "").replace("`", ""))
            assert re.search(rf"{key}\s.*{meaning}", out), key
    assert re.search(r"mu\s+│ number >= 0\s+│ 0\.01", out) and "samples, uniform, sum" in out
    assert "needs proxy set, single uploads" in out


@each_case("command", [["--help"], ["train", "--help"], ["compare", "--help"]])
def test_help_mentions_methods(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    assert "Run `hetero-fl methods` to list" in capsys.readouterr().out


class Summed(Algorithm):
    """Averages. More of it."""

    uploads = {"model": ItemSpec("params")}
    needs = Needs(one_architecture=True, also=("a telescope",))


class Looked(Summed):
    uploads = {
        "model": ItemSpec("params", use="each"),
        "said": ItemSpec("rows", share="predictions"),
    }
    needs = Needs(tasks=("regression",), also=("a telescope", "patience"))
    shared = ("backbone.",)


class OnRows(Summed):
    needs = Needs(proxy_set="required", also=("a telescope",))


class Either(Summed):
    needs = Needs(proxy_set="optional", one_architecture=True, also=("a telescope",))
    uploads = {"model": ItemSpec("params"), "said": ItemSpec("rows", share="predictions")}


def test_needs_follow_from_the_declarations() -> None:
    assert format_needs(describe_needs(Summed())) == "shared architectures, a telescope"
    assert format_needs(describe_needs(Looked())) == "a telescope, patience, single uploads"
    assert format_needs(describe_needs(OnRows())) == "proxy set, a telescope"
    assert (
        format_needs(describe_needs(Either())) == "proxy set or shared architectures, a telescope"
    )
    assert shared_kinds(Summed()) == ["parameters"] and shared_kinds(Looked()) == [
        "backbone parameters",
        "predictions",
    ]
    assert supported_tasks(Summed()) == [] and supported_tasks(Looked()) == ["regression"]
    assert method_summary(Summed) == "Averages." and method_summary(Looked) == ""


def test_settings_change_requirements() -> None:
    fedmd = register_algorithm["fedmd"]
    assert format_needs(describe_needs(fedmd())) == "proxy set"
    assert format_needs(describe_needs(fedmd(initial_phase=True))) == "labeled proxy set"


def test_bounds_and_baselines_are_recognized() -> None:
    assert {n for n in BUILT_IN if is_reference(register_algorithm[n])} == {
        "centralized",
        "ensemble",
    }
    assert [n for n in BUILT_IN if is_baseline(register_algorithm[n])] == ["local"]
    assert shared_kinds(register_algorithm["local"]()) == [] and shared_kinds(
        register_algorithm["centralized"]()
    ) == ["all rows"]


class Odd(Algorithm):
    """Its settings are of types that no built-in method has."""

    by_client: dict[str, float] = {}
    kinds: tuple[int, ...] = (1, 2)
    must: complex


def test_user_method_with_any_setting_types_is_described(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["methods", "--allow-code", f"python:{__name__}:Odd"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"by_client\s+│ mapping", out) and re.search(r"must\s+│ string", out)
    assert re.search(r"kinds\s+│ list of integer\s+│ \[1, 2\]", out)
