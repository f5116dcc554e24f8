"""A round of every method sends what is declared and counted, and changes only its own state.

What is not declared, not shared or malformed is refused, in the simulation and in a federation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hetero_fl as hfl
from tests.support.deployments import SITES, Federation
from tests.support.federations import METHODS, MIXED, config, rounds_of, state_of
from tests.support.observe import observe

UNCOUNTED = ("local", "centralized")
ASYNCHRONOUS = ("fedasync", "fedbuff")
CHANNELS: dict[str, dict[str, Any]] = {
    "topk": {"compress": [{"topk": 0.1}, {"quantize": 8}]},
    "random": {
        "compress": [{"randk": 0.3}, {"top_classes": 3}, {"quantize": 4}],
        "compress_down": [{"top_classes": 3}, "half"],
    },
    "quantized": {"compress": [{"quantize": 2}], "compress_down": [{"quantize": 8}]},
}


@pytest.mark.parametrize("method", METHODS)
def test_observed_run_equals_run_without_evaluation(method: str) -> None:
    source = config(method, MIXED, clients=4, server={"model": "linear"})

    seen = observe(source, chunk=4)

    assert seen.changed_in_place == []
    assert all(0 <= record["global"]["accuracy"] <= 1 for record in seen.records)
    assert all(
        record["clients"].keys() == {f"site_{n}" for n in range(1, 5)} for record in seen.records
    )
    assert state_of(seen.trainer) == state_of(rounds_of(source))
    check_traffic(method, seen)


def check_traffic(method: str, seen: Any) -> None:
    """Check that only declared items are sent, and that estimated and counted bytes are theirs."""
    declared = seen.trainer.algorithm.uploads
    assert seen.items <= {(name, spec.kind) for name, spec in declared.items()}
    assert not any(record["failed"] for record in seen.records)
    assert any(seen.counted) == (method not in UNCOUNTED)
    if method in UNCOUNTED:
        assert seen.counted == seen.estimated == (0, 0)
    elif seen.cost.is_upper_bound:
        assert all(e >= c for e, c in zip(seen.estimated, seen.counted, strict=True))
    elif method not in ASYNCHRONOUS:
        assert seen.estimated == seen.counted
    assert method in UNCOUNTED or seen.uploaded == seen.counted[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compressed_run_sends_the_estimated_bytes(method: str) -> None:
    channel = list(CHANNELS)[METHODS.index(method) % len(CHANNELS)]
    # The cost of asynchronous runs is estimated for clients that are not all busy.
    per_round = None if method in ASYNCHRONOUS else 3
    source = config(
        method,
        MIXED,
        4,
        rounds=3,
        server={"model": "linear"},
        channel=CHANNELS[channel],
        clients__per_round=per_round,
    )

    check_traffic(method, observe(source))


# Mistakes of a method after its first round, and words of the refusal.
MISTAKES = {
    "undeclared": "'rows'",
    "missing": "'model'",
    "not shared": "'model'",
    "shape": "'model', backbone.1.weight: expected shape",
    "dtype": "'model', backbone.1.weight: expected dtype",
    "not finite": "'model' is not finite",
    "weight": "'model': weight must be <=",
}
WRONG = "python:tests.support.failing_methods:SendsWrongItem"


@pytest.mark.parametrize("place", ["simulation", "federation"])
def test_wrong_item_is_refused_with_its_name(
    place: str, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for number, (mistake, words) in enumerate(MISTAKES.items()):
        folder = tmp_path / str(number)
        source = config(
            WRONG,
            {"name": "mlp", "hidden": [8]},
            algorithm={"name": WRONG, "mistake": mistake},
            clients__defaults__shares=["backbone"],
        )
        with subtests.test(mistake=mistake):
            reason = reason_of_refusal(hfl.load_config(source, allow_code=True), place, folder)
            assert words in reason, reason


def reason_of_refusal(run_config: Any, place: str, folder: Path) -> str:
    """Return why the second upload of `site_3` was refused, or the error that ended the run."""
    try:
        if place == "simulation":
            run = hfl.run(run_config, out=folder)
        else:
            site = {"allows": {"own_code": [WRONG]}}
            run = Federation(folder, dict.fromkeys(SITES, site)).serve(run_config)
    except Exception as error:
        return str(error)
    assert run.metrics[1]["failed"].keys() == {"site_3"}
    return str(run.metrics[1]["failed"]["site_3"])
