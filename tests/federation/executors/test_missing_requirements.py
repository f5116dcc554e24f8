"""Missing requirements of executors are reported in one line before files are written."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from hetero_fl.experiment import run
from hetero_fl.federation.executors import choose
from hetero_fl.utils import extras
from hetero_fl.utils.errors import UserError
from tests.support.federations import config

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="ray is not installed: pip install 'hetero_fl[ray]'"
)


def refused(out: Path, **runtime: object) -> str:
    with pytest.raises(UserError) as error:
        run(config("fedavg", "mlp", runtime=runtime), out=out)
    assert not out.exists()
    return str(error.value)


def test_missing_ray_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    line = refused(tmp_path / "out", executor="ray")
    assert line == (
        "runtime.executor needs ray, which is not installed; run pip install 'hetero_fl[ray]'"
    )


@needs_ray
@pytest.mark.parametrize(
    "address", ["somewhere", "ray://127.0.0.1:10001", "127.0.0.1:1", "127.0.0.1:123456"]
)
def test_unreachable_ray_address_is_refused(address: str, tmp_path: Path) -> None:
    line = refused(tmp_path / "out", executor="ray", address=address)
    assert line.startswith("runtime.address: ")
    assert f"'{address}'" in line


def test_torchrun_executor_requires_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "torchrun --nproc-per-node 3" in refused(tmp_path / "out", executor="torchrun")
    monkeypatch.setattr(choose, "num_ranks", lambda: 3)
    line = refused(tmp_path / "out", executor="processes")
    assert line == (
        "runtime.executor: must be torchrun, because torchrun started 3 processes, got 'processes'"
    )
