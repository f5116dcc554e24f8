"""`hetero-fl check`, `--resume` and `Run` name whatever a run directory lacks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from hetero_fl import Run
from hetero_fl.cli import main
from hetero_fl.experiment import run
from hetero_fl.federation.store import Checkpoints
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.reporting.run_directory import CHECKSUMS, RunDirectory, lock_folder
from hetero_fl.utils.errors import Interrupted, UserError
from tests.support.cases import each_case
from tests.support.federations import config

SOURCE = config("fedavg", "linear", 2, rounds=4)
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def prepared_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished and an interrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    run(SOURCE, out=folder / "finished")

    def stop(record: dict) -> None:
        if record["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(SOURCE, out=folder / "stopped", callbacks=[stop])
    return folder


@pytest.fixture
def finished(prepared_runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared_runs / "finished", tmp_path / "a"))


@pytest.fixture
def stopped(prepared_runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared_runs / "stopped", tmp_path / "a"))


def remove(name: str) -> Damage:
    return lambda path: (path / name).unlink()


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Change the content of a file."""

    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        assert change(content) != content
        (path / name).write_bytes(change(content))

    return damage


def replace(name: str, old: str, new: str) -> Damage:
    return rewrite(name, lambda content: content.replace(old.encode(), new.encode(), 1))


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Damage:
    return rewrite("metrics.jsonl", lambda content: b"".join(change(content.splitlines(True))))


def flip(name: str) -> Damage:
    """Invert the bits of the last byte."""
    return rewrite(name, lambda content: content[:-1] + bytes([content[-1] ^ 255]))


def folder_at(name: str) -> Damage:
    """Replace a file with a folder."""

    def damage(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return damage


def no_checkpoints(path: Path) -> None:
    shutil.rmtree(path / "checkpoint")


def head_of_newest(path: Path) -> Path:
    """Return the file that names the other files of the newest checkpoint of a finished run."""
    name = (path / "checkpoint" / "round-000004.ckpt").read_text()
    return path / "checkpoint" / "blobs" / name[:2] / name


def edit(line: bytes) -> bytes:
    return line.replace(b'"up_bytes": ', b'"up_bytes": 1')


FINISHED = {
    "lines missing": (
        remove("metrics.jsonl"),
        "metrics.jsonl: missing",
    ),
    "last line missing": (
        lines(lambda kept: kept[:-1]),
        "metrics.jsonl: modified since the run wrote it",
    ),
    "cut within a line": (
        lines(lambda kept: [*kept[:1], kept[1][:9]]),
        "metrics.jsonl: modified since the run wrote it",
    ),
    "first line missing": (
        lines(lambda kept: kept[1:]),
        "metrics.jsonl: line 1: expected round 1, got round 2",
    ),
    "line twice": (
        lines(lambda kept: [*kept[:2], *kept[1:]]),
        "metrics.jsonl: line 3: expected round 3, got round 2",
    ),
    "half a line": (
        lines(lambda kept: [kept[0], kept[1][:9] + b"\n", *kept[2:]]),
        "metrics.jsonl: line 2: expected the record of a round",
    ),
    "line edited": (
        lines(lambda kept: [edit(kept[0]), *kept[1:]]),
        "metrics.jsonl: modified since the run wrote it",
    ),
    "model missing": (remove("models/site_2.safetensors"), "models/site_2.safetensors: missing"),
    "model added": (
        lambda path: shutil.copy(
            path / "models/site_1.safetensors", path / "models/site_9.safetensors"
        ),
        "models/site_9.safetensors: does not belong to this run",
    ),
    "summary edited": (
        replace("summary.json", '"seed": 0', '"seed": 1'),
        "summary.json: modified since the run wrote it",
    ),
    "summary cut": (replace("summary.json", "}\n", ""), "summary.json: not valid JSON"),
    "details missing": (remove("details.json"), "details.json: missing"),
    "configuration": (
        replace("config.yaml", "seed: 0", "seed: 7"),
        "config.yaml: modified since the run wrote it",
    ),
    "environment": (
        replace("environment.json", '"cores"', '"core"'),
        "environment.json: modified since the run wrote it",
    ),
    "checksums": (
        replace(CHECKSUMS, "  config", " config"),
        "SHA256SUMS: line 1: expected a checksum and a file name",
    ),
    "checksums missing": (
        remove(CHECKSUMS),
        "SHA256SUMS: missing, or contains no checksum of config.yaml",
    ),
    "checksums empty": (
        lambda path: (path / CHECKSUMS).write_text(""),
        "SHA256SUMS: missing, or contains no checksum of config.yaml",
    ),
    "choice missing": (replace("environment.json", '"choice"', '"chosen"'), "environment.json: "),
    "lines in a folder": (
        folder_at("metrics.jsonl"),
        "metrics.jsonl: cannot be read (Is a directory)",
    ),
}
DEEP = {
    "model damaged": (
        flip("models/site_2.safetensors"),
        "models/site_2.safetensors: modified since the run wrote it",
    ),
    "checkpoints missing": (no_checkpoints, "checkpoint: missing, although metrics.jsonl exists"),
    "newest checkpoint missing": (
        remove("checkpoint/round-000004.ckpt"),
        "checkpoint/round-000004.ckpt: missing",
    ),
    "checkpoint under another name": (
        lambda path: shutil.copy(
            path / "checkpoint/round-000003.ckpt", path / "checkpoint/round-000004.ckpt"
        ),
        "checkpoint/round-000004.ckpt: contains the state after 3 rounds",
    ),
    "checkpoint damaged": (
        flip("checkpoint/round-000004.ckpt"),
        "checkpoint/round-000004.ckpt: damaged",
    ),
    "checkpoint in a folder": (
        folder_at("checkpoint/round-000004.ckpt"),
        "checkpoint/round-000004.ckpt: damaged ([Errno 21] Is a directory",
    ),
    "blob missing": (
        lambda path: head_of_newest(path).unlink(),
        "checkpoint/round-000004.ckpt: damaged ([Errno 2] No such file",
    ),
    "earlier version": (
        lambda path: (path / "checkpoint/round-000004.ckpt").write_bytes(b"HFLCKPT2"),
        "checkpoint/round-000004.ckpt: written by an earlier version",
    ),
}
DAMAGED = {**FINISHED, **DEEP}


def check(path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Check a damaged run and return the lines that it prints."""
    assert main(["check", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return lines


def test_opening_a_run_needs_no_checkpoint_and_reading_models_checks_them(finished: Path) -> None:
    no_checkpoints(finished)
    assert Run(finished).models.keys() == {"server", "site_1", "site_2"}

    flip("models/site_2.safetensors")(finished)
    with pytest.raises(UserError, match=r"site_2.safetensors: modified since the run wrote it"):
        _ = Run(finished).models


def test_check_names_every_damaged_file(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("metrics.jsonl", "details.json", "models/site_1.safetensors"):
        (finished / name).unlink()

    assert len(check(finished, capsys)) == 3
    with pytest.raises(UserError, match="and 2 more"):
        Run(finished)


def test_results_are_written_again_without_the_summary(
    prepared_runs: Path,
    tmp_path: Path,
    subtests: pytest.Subtests,
) -> None:
    cases = ("model missing", "details missing", "checksums", "checksums missing", "summary edited")
    for case in cases:
        with subtests.test(damage=case):
            path = Path(shutil.copytree(prepared_runs / "finished", tmp_path / case))
            DAMAGED[case][0](path)
            (path / "summary.json").unlink()
            assert main(["train", "--quiet", "--resume", "--out", str(path)]) == 0

            assert main(["check", str(path)]) == 0
            models = {name: data for name, data in contents(path).items() if "models/" in name}
            assert models and models.items() <= contents(prepared_runs / "finished").items()


def test_check_of_an_undamaged_run_prints_one_line(
    prepared_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(prepared_runs)

    assert main(["check", str(prepared_runs / "finished")]) == 0
    assert capsys.readouterr() == (
        f"{prepared_runs / 'finished'}: no damage found; finished after 4 rounds\n",
        "",
    )

    assert main(["check", str(prepared_runs / "stopped")]) == 0
    output = (
        f"{prepared_runs / 'stopped'}: no damage found; not finished, 3 "
        "of 4 rounds; `--resume` continues it\n"
    )
    assert capsys.readouterr().out == output
    assert contents(prepared_runs) == before


def test_check_ignores_files_with_other_names(prepared_runs: Path, stopped: Path) -> None:
    finished = Path(shutil.copytree(prepared_runs / "finished", stopped.with_name("finished")))
    names = ("round-000003 (1).ckpt", "round-copy.ckpt", "round-9.ckpt")
    for path in (stopped, finished):
        for name in names:
            shutil.copy(path / "checkpoint" / "round-000003.ckpt", path / "checkpoint" / name)
        assert main(["check", str(path)]) == 0
    assert Run(finished).summary["rounds_completed"] == 4

    assert main(["train", "--resume", "--out", str(stopped)]) == 0

    assert all((stopped / "checkpoint" / name).exists() for name in names)
    assert main(["check", str(stopped)]) == 0


def test_check_refuses_a_run_in_progress(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lock_folder(stopped):
        assert main(["check", str(stopped)]) == 2
    assert "in use by another process" in capsys.readouterr().err
    assert main(["check", str(stopped)]) == 0


def test_resume_of_finished_run_reports_it(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)

    assert main(["train", "--resume", "--out", str(finished)]) == 0

    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"{finished}: this run has finished, after 4 rounds; add `rounds=N` to extend it",
        f"compare with training alone: hetero-fl compare --config {finished}/config.yaml "
        f"--algorithms local,fedavg --seeds 0 --out {finished}-comparison-4 "
        "output.best_models=false",
    ]
    assert out == f"{finished}\n"
    assert contents(finished) == before


UNFINISHED = {
    "lines missing": (
        remove("metrics.jsonl"),
        "metrics.jsonl: missing",
    ),
    "last line missing": (
        lines(lambda kept: kept[:-1]),
        "metrics.jsonl: modified since the run wrote it (lines 1 to 3)",
    ),
    "line edited": (
        lines(lambda kept: [edit(kept[0]), *kept[1:]]),
        "metrics.jsonl: modified since the run wrote it (lines 1 to 3)",
    ),
    "line twice": (
        lines(lambda kept: [*kept[:2], *kept[1:]]),
        "metrics.jsonl: line 3: expected round 3, got round 2",
    ),
    "lines in a folder": (
        folder_at("metrics.jsonl"),
        "metrics.jsonl: cannot be read (Is a directory)",
    ),
    "checkpoints missing": (no_checkpoints, "checkpoint"),
    "environment": (
        replace("environment.json", '"chunk": 1', '"chunk": 2'),
        "environment.json: choice modified since",
    ),
    "configuration": (
        replace("config.yaml", "seed: 0", "seed: 7"),
        "config.yaml: modified since the run wrote it: seed: was 0",
    ),
}


CASES = {("finished", case): damage for case, damage in DAMAGED.items()}
CASES |= {("stopped", case): damage for case, damage in UNFINISHED.items()}


def test_check_resume_and_run_name_the_damage(
    prepared_runs: Path,
    tmp_path: Path,
    subtests: pytest.Subtests,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for kind, case in CASES:
        with subtests.test(run=kind, damage=case):
            path = Path(shutil.copytree(prepared_runs / kind, tmp_path / kind / case))
            damage, message = CASES[kind, case]
            damage(path)

            errors = check(path, capsys)
            assert main(["train", "--resume", "--out", str(path)]) == 2
            refused = capsys.readouterr().err.splitlines()

            expected = f"error: {path / message}"
            assert any(line.startswith(expected) for line in errors)
            assert refused[-1].startswith(expected)
            if kind == "finished":
                assert len(errors) == len(refused) == 1
            if kind == "finished" and case in FINISHED:
                with pytest.raises(UserError, match="hetero-fl check") as error:
                    Run(path)
                assert str(error.value).startswith(str(path / message))


def test_damaged_run_cannot_be_extended(
    prepared_runs: Path, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for case, (damage, message) in DAMAGED.items():
        with subtests.test(damage=case):
            path = Path(shutil.copytree(prepared_runs / "finished", tmp_path / case))
            damage(path)
            before = contents(path)

            with pytest.raises(UserError) as error:
                run({**SOURCE, "rounds": 5}, out=path, resume=True)

            damaged = path / message.partition(":")[0]
            assert str(error.value).startswith((str(damaged), f"{path}: cannot be resumed"))
            after = contents(path)
            assert {**after, "log.txt": b""} == {**before, "log.txt": b""}


def test_resume_never_restarts_a_run_with_results(
    prepared_runs: Path,
    tmp_path: Path,
    subtests: pytest.Subtests,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for kept in ("details.json", CHECKSUMS, "models/server.safetensors"):
        with subtests.test(kept=kept):
            path = Path(shutil.copytree(prepared_runs / "finished", tmp_path / kept))
            no_checkpoints(path)
            left = {"config.yaml", "environment.json", kept}
            for file in contents(path).keys() - left:
                (path / file).unlink()
            line = f"error: {path / 'checkpoint'}: missing, although {kept}"

            errors = check(path, capsys)
            assert main(["train", "--resume", "--out", str(path)]) == 2
            refused = capsys.readouterr().err

            assert any(error.startswith(line) for error in errors)
            assert line.removeprefix("error: ") in refused
            assert left <= contents(path).keys()
            for file in left:
                source = prepared_runs / "finished" / file
                assert (path / file).read_bytes() == source.read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of each file of a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_run_without_results_starts_again(tmp_path: Path) -> None:
    for owner, name in ((FederatedTrainer, "run_round"), (Checkpoints, "save")):
        with (
            mock.patch.object(owner, name, side_effect=KeyboardInterrupt),
            pytest.raises(Interrupted),
        ):
            run(SOURCE, out=tmp_path / name)
        assert main(["check", str(tmp_path / name)]) == 0
    no_checkpoints(tmp_path / "run_round")

    for name in ("run_round", "save"):
        assert main(["train", "--resume", "--out", str(tmp_path / name)]) == 0
        assert main(["check", str(tmp_path / name)]) == 0


def test_checkpoint_of_another_run_is_refused(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_checkpoints(stopped)
    run({**SOURCE, "rounds": 3}, out=tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "checkpoint", stopped / "checkpoint")

    assert main(["check", str(stopped)]) == 2
    assert "round-000003.ckpt: belongs to another run" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(stopped)]) == 2


def test_record_without_checkpoint_is_accepted(stopped: Path) -> None:
    (stopped / "checkpoint" / "round-000003.ckpt").unlink()
    assert main(["check", str(stopped)]) == 0

    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"round": 4, "up_by')
    (stopped / "checkpoint" / ".round-000004.ckpt.tmp").write_bytes(b"half")
    (stopped / "checkpoint" / "blobs" / "ab").mkdir(exist_ok=True)
    (stopped / "checkpoint" / "blobs" / "ab" / f"{'ab' * 32}.tmp").write_bytes(b"half")
    assert main(["check", str(stopped)]) == 0
    assert main(["train", "--resume", "--out", str(stopped)]) == 0


@pytest.mark.slow
def test_missing_plots_and_report_are_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = config("fedavg", "linear", 2, rounds=1, output={})
    run(source, out=tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "plots")
    (tmp_path / "a" / "report.html").unlink()

    assert main(["check", str(tmp_path / "a")]) == 0

    assert capsys.readouterr().err == ""
    assert main(["train", "--resume", "--out", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "report.html").exists() and list((tmp_path / "a" / "plots").iterdir())


@pytest.mark.parametrize("case", ["finished", "stopped"])
def test_missing_log_and_older_checkpoint_are_accepted(
    case: str, prepared_runs: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(prepared_runs / case, tmp_path / "a"))
    *_, older, _newest = sorted(file.name for file in (path / "checkpoint").glob("*.ckpt"))
    (path / "checkpoint" / older).unlink()
    (path / "log.txt").unlink()

    assert main(["check", str(path)]) == 0
    assert main(["train", "--resume", "--out", str(path)]) == 0


def test_checksums_match_sha256sum(prepared_runs: Path) -> None:
    sums = RunDirectory(prepared_runs / "finished").checksums()

    names = {"config.yaml", "metrics.jsonl", "summary.json", "models/server.safetensors"}
    assert names <= set(sums)
    for name, checksum in sums.items():
        content = (prepared_runs / "finished" / name).read_bytes()
        assert sha256(content).hexdigest() == checksum


def test_missing_configuration_is_named(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stopped / "config.yaml").unlink()
    source = stopped.with_name("c.yaml")
    source.write_text(yaml.safe_dump(SOURCE))
    resume = ["train", "--resume", "--out", str(stopped)]

    for command in (["check", str(stopped)], resume, [*resume, "--config", str(source)]):
        assert main(command) == 2
        assert f"error: {stopped / 'config.yaml'}: missing" in capsys.readouterr().err


@pytest.mark.parametrize(("clients", "rows"), [(20, 20), (21, 11)])
@each_case("model", ["linear", "python:unknown:Model"])
def test_table_of_the_cost_is_short(
    clients: int, rows: int, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partition = {"kind": "iid", "min_size": 5}
    source = config("local", model, clients, data__partition=partition, data__proxy__size=0)
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(source))

    assert main(["train", "--check", "-c", str(file)]) == 0

    table = capsys.readouterr().out.partition("cost of local")[2]
    listed = [line.split("│")[1].strip() for line in table.splitlines() if "│" in line][:rows]
    names = [f"site_{i:02}" for i in range(1, clients + 1)]
    assert listed == (names if rows == clients else [*names[:5], "… 11 more", *names[-5:]])
