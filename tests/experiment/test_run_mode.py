"""Asynchronous mode: which methods support it, and which settings are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from hetero_fl.algorithms import register_algorithm
from hetero_fl.config.base import StalenessConfig
from hetero_fl.experiment import prepare
from hetero_fl.federation.asynchronous import AsynchronousTrainer
from hetero_fl.utils.errors import UserError
from tests.federation.test_asynchronous import EACH, SUMS
from tests.support.federations import MIXED, config

ASYNC = {"threads": 1, "mode": "async"}


def refused(source: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        prepare(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_method_is_supported_or_refused() -> None:
    built_in = {
        name
        for name in register_algorithm
        if register_algorithm[name].__module__.startswith("hetero_fl.")
    }
    assert {*SUMS, *EACH, "fedasync", "fedbuff"} == built_in


@pytest.mark.parametrize("method", EACH)
def test_synchronous_methods_refuse_asynchronous_mode(method: str) -> None:
    line = refused(config(method, MIXED, clients=4, runtime=ASYNC))
    assert line.startswith(f"runtime.mode=async cannot be combined with algorithm.name={method}")


def test_asynchronous_runs_require_all_proxy_rows() -> None:
    assert refused(config("fedmd", runtime=ASYNC, algorithm__proxy_rows=20)).startswith(
        "algorithm.proxy_rows=20"
    )
    prepared = prepare(config("fedmd", runtime=ASYNC, algorithm__proxy_rows=60))
    assert prepared.config.runtime.mode == "async"


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"runtime": {"buffer": 3}}, "runtime.buffer=3 requires runtime.mode=async"),
        (
            {"runtime": {"staleness": {"a": 1.0}}},
            "runtime.staleness: requires runtime.mode=async",
        ),
        (
            {"runtime": {**ASYNC, "buffer": 7}},
            "runtime.buffer: must be <= 6",
        ),
        (
            {"runtime": ASYNC, "clients__defaults__share_every": 2},
            "runtime.mode=async cannot be combined with share_every",
        ),
        (
            {"runtime": ASYNC, "cohort": {"deadline": 9.0}},
            "cohort.deadline: cannot be combined with runtime.mode=async",
        ),
        (
            {"runtime": ASYNC, "cohort": {"least": 2}},
            "cohort.least: cannot be combined with runtime.mode=async",
        ),
        (
            {"runtime": ASYNC, "cohort": {"sampling": "available"}},
            "cohort.sampling: cannot be combined with runtime.mode=async",
        ),
    ],
)
def test_settings_of_the_other_mode_are_refused(changes: dict[str, Any], line: str) -> None:
    assert refused(config("fedavg", **changes)).startswith(line)


def test_unused_staleness_settings_are_noted_or_refused() -> None:
    section = {**ASYNC, "staleness": {"kind": "constant", "a": 3.0, "b": 2}}
    notes = prepare(config("fedavg", runtime=section)).notes
    assert [n for n in notes if "is ignored" in n] == [
        f"runtime.staleness.{key} is ignored because the staleness kind is constant" for key in "ab"
    ]
    section_of_one = {"threads": 1, "mode": "async", "buffer": 1}
    for changes, is_noted in [
        ({"runtime": section_of_one}, True),
        ({"runtime": {**section_of_one, "buffer": 2}}, False),
        ({"runtime": {**section_of_one, "staleness": {"kind": "constant"}}}, False),
        ({"method": "fedasync"}, False),
    ]:
        notes = prepare(config(**{"method": "fedavg", **changes})).notes
        assert any(note.startswith("runtime.staleness has no effect") for note in notes) == is_noted
    assert (
        "algorithm.b is ignored because the staleness kind is polynomial"
        in prepare(config("fedasync", algorithm__b=2)).notes
    )
    line = refused(config("fedbuff", clients=4, runtime={"staleness": {"a": 1.0}}))
    assert line == "runtime.staleness: not used by fedbuff; set algorithm.staleness instead"


def test_buffer_is_set_by_one_key_only() -> None:
    assert "which aggregates after each upload" in refused(
        config("fedasync", runtime={"buffer": 3})
    )
    assert "which uses algorithm.buffer=2" in refused(
        config("fedbuff", clients=4, runtime={"buffer": 3})
    )


@pytest.mark.parametrize("method", ["fedasync", "fedbuff"])
def test_asynchronous_methods_imply_the_mode(method: str) -> None:
    prepared = prepare(config(method, MIXED, clients=4))
    assert prepared.config.runtime.mode == "async" and isinstance(
        prepared.make_trainer(), AsynchronousTrainer
    )
    assert any(note.startswith("runtime.mode=async") for note in prepared.notes)
    reloaded = prepare(prepared.config)
    assert reloaded.config == prepared.config


def test_schedules_count_server_versions() -> None:
    assert prepare(config("fedasync", clients=4, rounds=5)).federation.num_rounds == 20
    assert (
        prepare(config("fedbuff", clients=4, rounds=5, clients__per_round=3)).federation.num_rounds
        == 8
    )
    assert prepare(config("hybrid", clients=4, rounds=5, runtime=ASYNC)).federation.num_rounds == 5


@pytest.mark.parametrize(
    "kind, a, weights",
    [
        ("constant", None, [1, 1, 1]),
        ("polynomial", None, [1, 2**-0.5, 1 / 3]),
        ("polynomial", 1.0, [1, 1 / 2, 1 / 9]),
        ("hinge", None, [1, 1, 1 / 41]),
        ("hinge", 0.5, [1, 1, 1 / 3]),
    ],
)
def test_staleness_weights_match_the_formulas(
    kind: str, a: float | None, weights: list[float]
) -> None:
    section = StalenessConfig(kind=kind, a=a)  # type: ignore[arg-type]
    assert [section.weight(t) for t in (0, 1, 8)] == pytest.approx(weights, rel=1e-15)
