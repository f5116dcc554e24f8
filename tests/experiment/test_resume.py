"""Going on with a run: without its configuration file, after Ctrl-C by the line that was printed, and past a typing error."""

from __future__ import annotations

import errno
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hetero_fl.cli import main
from hetero_fl.federation.checkpoint import Checkpoints
from hetero_fl.federation.synchronous import SynchronousTrainer
from hetero_fl.reporting.run_directory import lock_folder
from tests.helpers.small_federations import config


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a configuration whose settings are not the default ones."""
    monkeypatch.chdir(tmp_path)
    small = config("local", "linear", 2, rounds=3)
    Path("c.yaml").write_text(yaml.safe_dump(small))
    return tmp_path


@pytest.fixture
def stopped_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, int]]:
    """Signals by the number of rounds after which they come, each once."""
    signals: dict[int, int] = {}
    held = SynchronousTrainer.run_round

    def round_then_stop(self: SynchronousTrainer) -> Any:
        if (number := signals.pop(self.completed, None)) is not None:
            os.kill(os.getpid(), number)
        return held(self)

    monkeypatch.setattr(SynchronousTrainer, "run_round", round_then_stop)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
    yield signals
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_line_of_an_interrupted_run_goes_on_with_it(
    number: int, folder: Path, stopped_after: dict[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_after[1] = number
    assert main(["train", "--config", "c.yaml", "seed=4"]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("interrupted; to resume: hetero-fl train --resume --out runs/small-")
    Path("c.yaml").unlink()
    assert main(shlex.split(line.partition(": ")[2])[1:]) == 0
    (again,) = Path("runs").iterdir()
    Path("c.yaml").write_text((again / "config.yaml").read_text())
    assert main(["train", "--config", "c.yaml", "--out", "whole"]) == 0
    for path in (again / "models").iterdir():
        assert path.read_bytes() == (Path("whole") / "models" / path.name).read_bytes()


def test_a_full_disk_is_one_line_and_what_was_committed_is_gone_on_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = Checkpoints.save

    def save_while_there_is_room(self: Checkpoints, round: int, tree: Any) -> Path:
        if round:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, round, tree)

    with monkeypatch.context() as full:
        full.setattr(Checkpoints, "save", save_while_there_is_room)
        assert main(["train", "--config", "c.yaml", "--out", "run"]) == 1
        line = capsys.readouterr().err.strip()
        assert line.splitlines()[-1].startswith("failed: no space left") and "Traceback" not in line
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) < 3
    assert main(["train", "--resume", "--out", "run"]) == 0
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 3


def test_the_callers_own_way_to_end_is_put_back(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = lambda number, frame: None  # noqa: E731
    kept = signal.signal(signal.SIGTERM, mine)
    try:
        for arguments, status in (
            (["--config", "c.yaml", "--out", "a"], 0),
            (["--config", "none.yaml"], 2),
        ):
            assert main(["train", *arguments]) == status
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, kept)


def test_a_script_is_named_as_it_was_started(
    folder: Path,
    stopped_after: dict[int, int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped_after[0] = signal.SIGINT
    given = ["--config", "c.yaml", "--out", "a run"]
    monkeypatch.setattr("sys.argv", ["scripts/train.py", *given])
    monkeypatch.setattr("sys.orig_argv", ["python3", "scripts/train.py", *given])
    assert main(command="train") == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "interrupted; to resume: python3 scripts/train.py --resume --out 'a run'"


def test_before_there_is_a_run_nothing_is_promised(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hetero_fl.experiment.runner.prepare", stop)
    assert main(["train", "--config", "c.yaml", "--out", "a"]) == 130
    assert capsys.readouterr().err == "interrupted before the first checkpoint; there is no run to resume\n"


def test_a_name_that_is_nearly_that_of_a_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", "c.yaml", "--out", "runs/first", "rounds=1"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--out", "runs/frist"]) == 2
    said = "error: --out: runs/frist is not a run directory; did you mean runs/first? (a new run requires --config)\n"
    assert capsys.readouterr().err == said and not Path("runs/frist").exists()
    assert main(["train", "--config", "c.yaml", "--resume", "--out", "runs/frist", "rounds=1"]) == 0
    line = "runs/frist: no run to resume, starting a new one; did you mean runs/first?"
    assert capsys.readouterr().err.splitlines()[0] == line
    assert main(["train"]) == 2
    assert "--config: missing" in capsys.readouterr().err


def test_overrides_are_compared_with_the_runs_own_configuration(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", "c.yaml", "--out", "a", "rounds=1"]) == 0
    assert main(["train", "--resume", "--out", "a"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--out", "a", "clients.groups.0.epochs=2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    said = "error: a: --resume: the configuration differs: clients.groups.0.epochs: was not set, is now 2"
    assert line == said


def test_a_second_process_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--resume"], []):
        with lock_folder(Path("a")):
            assert main(["train", "--config", "c.yaml", "--out", "a", *flags, "rounds=1"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert (
            line
            == "error: a: in use by another process; wait for it to end or choose another --out"
        )
    assert [p.name for p in Path("a").iterdir()] == [".lock"]


def test_a_new_run_says_that_there_is_none_to_resume(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", "c.yaml", "--out", "a", "--resume"]) == 0
    line = "a: no run to resume; starting a new one"
    assert capsys.readouterr().err.count(line) == 1

    assert main(["train", "--config", "c.yaml", "--out", "b"]) == 0
    assert "no run to resume" not in capsys.readouterr().err
