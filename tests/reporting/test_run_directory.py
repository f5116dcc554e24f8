"""The run directory: crashes, locks, damaged and foreign files."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from hetero_fl.reporting.integrity import verify
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import (
    CHECKSUMS,
    LOCK,
    RunDirectory,
    is_locked,
    lock_folder,
)
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.mistakes import check_refused


def create(path: Path) -> RunDirectory:
    return RunDirectory.create(
        path, config={"name": "a", "x": [1, None]}, environment={"python": "3.11"}
    )


def test_interrupted_creation_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def stop(source: Path, target: Path) -> None:
        if Path(target).name == "config.yaml":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        create(tmp_path / "a")
    monkeypatch.undo()
    (tmp_path / "a" / ".config.yaml.tmp").write_text("half")
    assert not (tmp_path / "a" / "config.yaml").exists()
    assert create(tmp_path / "a").config()["name"] == "a"


ALIASES = "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 10))


def test_unreadable_files_raise_one_line(tmp_path: Path, subtests: pytest.Subtests) -> None:
    run = create(tmp_path / "a")

    for content, reason in (
        ("a: " + "[" * 3000, ""),
        ("rounds: " + "9" * 5000, ""),
        ("a: [", ""),
        ("a: \x00", ""),
        (f"a0: &a0 [x]\n{ALIASES}", "YAML node expansion"),
    ):
        (run.path / "config.yaml").write_text(content)
        with subtests.test(content=content[:20]):
            check_refused(rf"a/config.yaml: not valid YAML \({reason}", run.config)
    for bad in ("{", "3", "{}", '{"round": "one"}', "null"):
        (run.path / "metrics.jsonl").write_text(f'{{"round": 1}}\n{bad}\n')
        with subtests.test(line=bad):
            check_refused("metrics.jsonl: line 2: expected the record of a round", run.metrics)
    check_refused(r"summary.json: cannot be read \(No such file", run.summary)
    (run.path / "environment.json").write_bytes(b"\xff")
    check_refused("environment.json: cannot be read", RunDirectory.open, run.path)


def test_missing_models_are_explained(tmp_path: Path) -> None:
    run = create(tmp_path / "a")
    run.append_metrics({"round": 1})
    run.write_json("details.json", {})
    run.finish({"rounds_completed": 1})
    with pytest.raises(
        UserError,
        match=r"has no models; a site uploads its model only with tells.model=true in its",
    ):
        _ = Run(run.path).models


@each_case("bad", [float("nan"), float("inf")])
def test_undefined_numbers_are_refused_and_lines_are_synced(
    bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create(tmp_path / "a")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)

    run.append_metrics({"round": 1})
    with pytest.raises(ValueError, match="JSON"):
        run.write_json("summary.json", {"x": bad})
    with pytest.raises(ValueError, match="JSON"):
        run.append_metrics({"round": 2, "x": bad})

    assert run.metrics() == [{"round": 1}] and not run.finished
    assert len(synced) == 1


def test_rewind_drops_later_rounds_and_partial_lines(tmp_path: Path) -> None:
    run = create(tmp_path / "a")
    run.rewind_metrics(0)
    for r in (1, 2, 3):
        run.append_metrics({"round": r, "loss": {"a": 0.1 * r}})
    file = run.path / "metrics.jsonl"
    content = file.read_bytes()
    for cut in range(1, len(content)):
        file.write_bytes(content[:cut])
        assert [m["round"] for m in run.metrics()] == list(range(1, content[:cut].count(b"\n") + 1))
    file.write_bytes(content + b'{"round": 4, "lo')
    run.rewind_metrics(2)
    run.append_metrics({"round": 3, "loss": {"a": 0.5}})
    assert [(m["round"], m["loss"]["a"]) for m in run.metrics()] == [(1, 0.1), (2, 0.2), (3, 0.5)]
    assert all(json.loads(line) for line in file.read_text().splitlines())


def hold(folder: str, connection: Any) -> None:
    with lock_folder(Path(folder)):
        connection.send(None)
        connection.recv()


@pytest.mark.slow
def test_lock_is_exclusive_and_released_by_a_kill(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    parent_end, child_end = context.Pipe()
    process = context.Process(target=hold, args=(str(tmp_path / "a"), child_end))
    process.start()
    parent_end.recv()
    words = "a: in use by another process; wait for it to end or choose another folder"
    with pytest.raises(UserError, match=words), lock_folder(tmp_path / "a"):
        pass
    process.kill()
    process.join()
    assert (tmp_path / "a" / LOCK).exists()
    with (
        lock_folder(tmp_path / "a"),
        pytest.raises(UserError, match="another process"),
        lock_folder(tmp_path / "a"),
    ):
        pass
    create(tmp_path / "a")  # the remaining lock file is not locked


def test_file_system_without_locks_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    monkeypatch.setattr(
        fcntl, "flock", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented"))
    )
    for _ in range(2):
        with lock_folder(tmp_path / "a") as unheld:
            # An empty file may remain, which does not lock the folder.
            assert all(not path.read_bytes() for path in (tmp_path / "a").iterdir())
            assert not is_locked(tmp_path / "a")
            assert unheld == [
                (
                    f"{tmp_path / 'a'}: the file system has no locks; do "
                    "not start a second process in this folder"
                )
            ]

    monkeypatch.undo()
    with lock_folder(tmp_path / "c") as unheld:
        assert not unheld


def test_unwritable_folder_raises_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not writable"), lock_folder(tmp_path / "file"):
        pass
    # simulates a folder of another user, as root may write anywhere
    (tmp_path / "a" / LOCK).mkdir(parents=True)
    with pytest.raises(UserError, match="a: not writable"), lock_folder(tmp_path / "a"):
        pass


@each_case("name", ["/etc/hostname", "../outside", "models/../../outside"])
def test_checksums_name_only_files_of_the_run(
    name: str, made_run: Callable[..., RunDirectory]
) -> None:
    run = made_run()
    run.write_text(CHECKSUMS, f"{'0' * 64}  {name}\n")

    with pytest.raises(UserError, match="SHA256SUMS: line 1: expected a file in the folder, got"):
        Run(run.path)
    assert CHECKSUMS in verify(run.path)


@each_case("name", [CHECKSUMS, "config.yaml", "models/x.safetensors", "plots/x.png"])
def test_files_of_a_run_are_regular_files_inside_its_folder(
    name: str, made_run: Callable[..., RunDirectory]
) -> None:
    path = made_run().path / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=f"{name}: leads out to /etc/hostname$"):
        verify(path.parents[name.count("/")])
    path.unlink()
    os.mkfifo(path)

    with pytest.raises(UserError, match=f"{name}: expected a file or a folder"):
        RunDirectory.open(path.parents[name.count("/")])
