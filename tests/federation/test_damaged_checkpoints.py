"""A damaged newest checkpoint: the previous one is used, and results stay bit-identical."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from hetero_fl.experiment import run
from hetero_fl.utils.errors import Interrupted
from tests.federation.test_crashes import figures, models
from tests.support import asynchronous_runs
from tests.support.federations import TOP, config

MODES: dict[str, dict[str, Any]] = {
    "sync": {"runtime": {"threads": 1}},
    "async": {"runtime": {"threads": 1, "mode": "async", "buffer": 2}},
}
STOP, ROUNDS = 3, 4
# Positions as shares of the file's length.
PLACE = st.floats(0, 1, exclude_max=True)


def source(mode: str) -> dict[str, Any]:
    """Return a run of five clients with heads and residuals: state is in several files."""
    return config(
        "fedper",
        ["linear", {"name": "mlp", "hidden": [8]}, {"name": "mlp", "hidden": [8]}],
        5,
        rounds=ROUNDS,
        clients__per_round=2,
        data__train_limit=200,
        data__partition__min_size=15,
        data__proxy__size=0,
        channel=TOP,
        devices=asynchronous_runs.SLOW,
        faults=asynchronous_runs.FAULTS,
        **MODES[mode],
    )


@pytest.fixture(scope="module", params=MODES)
def stopped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path, Any]:
    """Return a configuration, a run stopped before its last round, and the full run's results."""
    return stopped_run(request.param, tmp_path_factory.mktemp(request.param))


def stopped_run(mode: str, folder: Path) -> tuple[dict[str, Any], Path, Any]:
    run_config = source(mode)

    def stop(record: dict[str, Any]) -> None:
        if record["round"] == STOP:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(run_config, out=folder / "stopped", callbacks=[stop])
    run(run_config, out=folder / "whole")
    return run_config, folder / "stopped", (models(folder / "whole"), figures(folder / "whole"))


def ends_alike(
    stopped: tuple[dict[str, Any], Path, Any], damage: Callable[[bytes], bytes], scratch: Path
) -> bool:
    """Return whether the run resumes bit-identically after damage to its newest checkpoint."""
    result, folder, expected = stopped
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(folder, scratch)
    newest = max((scratch / "checkpoint").glob("*.ckpt"))
    assert newest.name == f"round-{STOP:06}.ckpt"
    newest.write_bytes(damage(newest.read_bytes()))
    run(result, out=scratch, resume=True)
    return (models(scratch), figures(scratch)) == expected


def flip(at: float, bit: int = 0) -> Callable[[bytes], bytes]:
    """Flip one bit of the byte at this position."""

    def damage(data: bytes) -> bytes:
        place = int(at * len(data))
        return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

    return damage


def cut(at: float) -> Callable[[bytes], bytes]:
    """Truncate the file at this position."""
    return lambda data: data[: int(at * len(data))]


def blank(at: float) -> Callable[[bytes], bytes]:
    """Zero a block, like a disk page that was never written."""
    return lambda data: (
        data[: (p := int(at * len(data)))] + bytes(min(4096, len(data) - p)) + data[p + 4096 :]
    )


DAMAGE = st.one_of(
    st.builds(flip, PLACE, st.integers(0, 7)), st.builds(cut, PLACE), st.builds(blank, PLACE)
)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
# The first byte.
@example(flip(0.0))
# The last byte.
@example(lambda data: flip((len(data) - 1) / len(data), 7)(data))
# The length field of the header.
@example(lambda data: flip((len(data) - 36) / len(data))(data))
@example(cut(0.0))
@example(lambda data: data + b"more")
@given(DAMAGE)
def test_damaged_newest_checkpoint_falls_back_to_previous(
    stopped: tuple[dict[str, Any], Path, Any],
    tmp_path_factory: pytest.TempPathFactory,
    damage: Callable[[bytes], bytes],
) -> None:
    assert ends_alike(stopped, damage, tmp_path_factory.getbasetemp() / "damaged")


def test_state_is_spread_over_several_files(
    stopped: tuple[dict[str, Any], Path, Any],
) -> None:
    assert len(list((stopped[1] / "checkpoint").glob("*.ckpt"))) >= 2
