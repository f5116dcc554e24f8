"""Run directories of strangers: any content with valid checksums gives one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hetero_fl.cli import main
from hetero_fl.core.saved_model import read_model_file
from hetero_fl.deployment.monitoring import read_status
from hetero_fl.experiment import run
from hetero_fl.federation.store import CHECKPOINT_FORM, Checkpoints, Head, StateStore
from hetero_fl.reporting.comparison.result import Comparison
from hetero_fl.reporting.run_directory import CHECKSUMS, RunDirectory
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import decode, encode, sha256_of
from tests.support.cases import each_case
from tests.support.federations import config

Change = Callable[[dict[str, Any]], Any]
MODEL = "models/site_1.safetensors"
# Replaced by nested lists: as deep as the parser accepts, and deeper.
NESTED = {"DEEP": "[" * 900 + "]" * 900, "DEEPER": "[" * 20_000 + "]" * 20_000}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(config("fedper", "mlp", 2, rounds=1), out=tmp_path_factory.mktemp("runs") / "a").path


def copy_of(finished: Path, folder: Path) -> Path:
    return Path(shutil.copytree(finished, folder / "run"))


def forge_model(folder: Path, path: str, value: object, tensors: Change = lambda t: t) -> None:
    """Replace a value in the metadata of a model, and write valid checksums."""
    metadata, saved = read_model_file(folder / MODEL)
    *sections, key = path.split(".")
    section = metadata
    for name in sections:
        section = section[name]
    section[key] = value
    text = json.dumps(metadata)
    for name, nested in NESTED.items():
        text = text.replace(f'"{name}"', nested)
    save_file(tensors(saved), folder / MODEL, {"hetero_fl": text})
    sums = [f"{sha256_of(folder / name)}  {name}\n" for name in RunDirectory(folder).checksums()]
    (folder / CHECKSUMS).write_text("".join(sums))


def assert_refused(capsys: pytest.CaptureFixture[str], *command: object) -> None:
    assert main([*map(str, command)]) in (1, 2)
    error = capsys.readouterr().err
    kinds = {line.partition(":")[0] for line in error.splitlines()}
    assert kinds & {"error", "failed"} and "Traceback" not in error


@each_case(
    ("path", "value"),
    [
        ("architecture.name", "timm:no_such"),
        ("architecture.name", "hf:no_such"),
        ("architecture.name", "python:no_such:Name"),
        ("architecture.outputs", 10**30),
        ("architecture.outputs", float("inf")),
        ("architecture.input_shape", []),
        ("architecture.options", [["hidden", "DEEP"]]),
        ("architecture.options", "DEEPER"),
        ("preprocess.mean", "DEEP"),
        ("preprocess.resize", -5),
        ("preprocess.no_such", 1),
        ("preprocess", [1]),
        ("task.kind", ["x"]),
        ("log_prior", ["a"]),
        ("log_prior", [0.0]),
    ],
)
def test_forged_metadata_of_a_model_is_refused_in_one_line(
    path: str, value: object, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = copy_of(finished, tmp_path)
    forge_model(copied, path, value)

    assert_refused(capsys, "evaluate", copied, "--data", "digits", "--personal", "--allow-code")
    assert_refused(capsys, "export", copied, "--format", "safetensors", "--allow-code")


@each_case(
    "change",
    [
        lambda tensors: {**tensors, "extra": tensors["head.bias"].clone()},
        lambda tensors: {**tensors, "head.bias": tensors["head.bias"][:3].clone()},
        lambda tensors: {n: t for n, t in tensors.items() if n != "head.bias"},
    ],
)
def test_tensors_that_do_not_fit_the_model_are_refused_in_one_line(
    change: Change, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = copy_of(finished, tmp_path)
    forge_model(copied, "head", None, change)
    source = copied.with_name("c.yaml")
    source.write_text(json.dumps(config("fedper", "mlp", 2)))

    assert_refused(capsys, "evaluate", copied, "--data", "digits")
    assert_refused(capsys, "export", copied, "--format", "safetensors")
    assert_refused(capsys, "join", copied, "--data", "digits", "--out", copied.with_name("joined"))
    assert_refused(capsys, "train", "-c", source, "--check", f"init_from={copied}")


@each_case("name", ["status.json", "metrics.jsonl", ".lock"])
def test_pipe_in_a_run_is_reported(name: str, finished: Path, tmp_path: Path) -> None:
    copied = copy_of(finished, tmp_path)
    (copied / name).unlink(missing_ok=True)
    os.mkfifo(copied / name)

    for reader in (read_status, Comparison):
        with pytest.raises(UserError, match=f"{name}: expected a file or a folder"):
            reader(copied)


def drop(key: str, tree: dict[str, Any]) -> Any:
    return {name: value for name, value in tree.items() if name != key}


TREES: dict[str, Change] = {
    **{key: partial(drop, key) for key in ("run", "choice")},
    "text": lambda tree: {**tree, "run": {**tree["run"], "completed": "x"}},
    "number": lambda tree: {**tree, "directory": 7},
    "extended": lambda tree: {**tree, "directory": {**tree["directory"], "extended": 7}},
    "server": lambda tree: {**tree, "run": {**tree["run"], "server": {"models": {}, "state": {}}}},
}
HEADS: dict[str, Change] = {
    **{key: partial(drop, key) for key in ("tree", "committed")},
    "other folder": lambda head: {**head, "tree": "../../../../../dev/zero"},
    "device": lambda head: {**head, "tree": {"run": "/dev/zero"}},
    "number": lambda head: {**head, "tree": {"run": 7}},
    "clients": lambda head: {**head, "committed": {**head["committed"], "clients": "site_1/"}},
    "names": lambda head: {**head, "committed": {**head["committed"], "names": torch.ones(3)}},
}


@each_case(
    ("change_tree", "change_head"),
    [*((tree, dict) for tree in TREES.values()), *((dict, head) for head in HEADS.values())],
)
def test_forged_checkpoint_is_refused_in_one_line(
    change_tree: Change,
    change_head: Change,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copied = copy_of(finished, tmp_path)
    encode_head = Head.encode
    checkpoints = Checkpoints(StateStore(copied / "checkpoint"), print)
    tree = checkpoints.load_newest()

    def forge(names: Head) -> bytes:
        head = decode(encode_head(names), CHECKPOINT_FORM, bounded=False)
        return encode(change_head(head), CHECKPOINT_FORM)

    # The checkpoint is the only one, and the run is not inspected as one that has finished.
    for name in ("summary.json", "checkpoint/round-000000.ckpt"):
        (copied / name).unlink()
    monkeypatch.setattr(Head, "encode", forge)
    checkpoints.save(1, change_tree(tree or {}))

    assert main(["check", str(copied)]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert_refused(capsys, "train", "--resume", "--out", copied, "rounds=2")
