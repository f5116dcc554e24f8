"""Check that a run directory is complete and unmodified."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from hetero_fl.config.describe import describe_difference, resume_relevant
from hetero_fl.federation.store import (
    KEPT_CHECKPOINTS,
    EarlierVersionError,
    checkpoint_files,
    checkpoint_name,
    checkpoint_round,
    read_checkpoint,
)
from hetero_fl.reporting.run_directory import ALWAYS, CHECKSUMS, METRICS, RunDirectory
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import CodecError, refuse_malformed, sha256_of
from hetero_fl.utils.text import format_list, pluralize

CHANGED = "modified since the run wrote it"
MISSING = "missing"


def verify(path: str | Path, *, models: bool = True) -> dict[str, str]:
    """Look for missing and damaged files in a run directory.

    Plots, report and log are not checked.

    Args:
        path: The directory of a finished or unfinished run.
        models: Whether to read models and checkpoints. Otherwise, models only have to exist, and
            checkpoints are not checked.

    Returns:
        The problem of each missing or damaged file, keyed by file name.

    Raises:
        UserError: If the path is not a run directory.
    """
    directory = RunDirectory.open(path)
    # Looked up first, because an active run writes each line of metrics before the checkpoint, and
    # the checksums before the summary.
    checkpoints = checkpoint_files(directory.path / "checkpoint")
    finished = directory.finished
    problems = _unreadable_files(directory, finished)
    if finished:
        _check_checksums(directory, models, problems)
    if models:
        _check_checkpoints(directory, checkpoints, finished, problems)
    return problems


def describe_progress(path: str | Path) -> str:
    """Describe in a few words whether an undamaged run has finished, and after how many rounds."""
    directory = RunDirectory(path)
    rounds = len(directory.lines())
    if directory.finished:
        return f"finished after {pluralize(rounds, 'round')}"
    planned = directory.config().get("rounds")
    return f"not finished, {rounds} of {planned} rounds; `--resume` continues it"


def refuse_damaged(path: str | Path, problems: Mapping[str, str]) -> None:
    """Check that no file of a run directory is missing or damaged.

    Args:
        path: The run directory.
        problems: The problem of each missing or damaged file, from `verify`.

    Raises:
        UserError: If there is a problem. The message describes the first one.
    """
    for name, problem in problems.items():
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(
            f"{Path(path) / name}: {problem}{more} (`hetero-fl check {path}` lists all)"
        )


def check_resumable(
    directory: RunDirectory, saved: Mapping[str, Any] | None, inputs: Mapping[str, Any]
) -> None:
    """Check that a run can continue from a checkpoint.

    The run id, the configuration, the executor and the lines of `metrics.jsonl` must be those of
    the checkpoint.

    Args:
        directory: The run directory.
        saved: The state dict of the newest checkpoint, or None if there is none.
        inputs: Hashes of the data and of user-defined code (see `check_inputs`).

    Raises:
        UserError: If the checkpoint is missing or belongs to a different run, if a file was
            modified, or if the data or the code has changed.
    """
    if saved is not None:
        problems = _unreadable_files(directory, directory.finished)
        _compare(directory, saved, checkpoint_name(saved["run"]["completed"]), problems)
        refuse_damaged(directory.path, problems)
    elif result := _first_result(directory):
        raise UserError(
            f"{directory.path / 'checkpoint'}: missing, although {result} exists; "
            "restore it, or start a new run in another folder"
        )
    check_inputs(directory, inputs)


def check_inputs(directory: RunDirectory, inputs: Mapping[str, Any]) -> None:
    """Check that the data and the code of a run have not changed.

    Args:
        directory: The run directory.
        inputs: Hash of the data and, keyed by module name, hashes of user-defined code, as `data`
            and `code` in `environment.json`.

    Raises:
        UserError: If a hash differs. Data and modules without a recorded hash are not checked.
    """
    recorded = directory.environment()
    code = recorded.get("code", {})
    modules = [name for name, value in inputs["code"].items() if code.get(name, value) != value]
    changed = f"the code of {format_list(modules)}" if modules else ""
    if recorded.get("data", inputs["data"]) != inputs["data"]:
        changed = "the data"
    if changed:
        raise UserError(
            f"{directory.path}: {changed} has changed since this run; restore it, delete the "
            "folder, or choose another one"
        )


def identity(directory: RunDirectory) -> dict[str, Any]:
    """Return the id and the configuration of a run, as stored in the checkpoints of the run."""
    return {
        "run": directory.environment().get("run"),
        "config": json.dumps(resume_relevant(directory.config())),
    }


def _unreadable_files(directory: RunDirectory, finished: bool) -> dict[str, str]:
    """Return the problems of text files that are missing or do not have the right format."""
    readers: dict[str, Callable[[], Any]] = {
        "config.yaml": directory.config,
        METRICS: directory.metrics,
    }
    if finished:
        readers |= {
            "summary.json": directory.summary,
            "details.json": directory.details,
            CHECKSUMS: directory.checksums,
        }
    problems = {}
    for name, read in readers.items():
        try:
            read()
        except UserError as error:
            problem = str(error).removeprefix(f"{directory.path / name}: ")
            problems[name] = problem if (directory.path / name).exists() else MISSING
    return problems


def _check_checksums(directory: RunDirectory, models: bool, problems: dict[str, str]) -> None:
    """Compare the files of a finished run with their checksums, and add problems.

    Args:
        directory: The run directory.
        models: Whether to read models.
        problems: Problems of the directory, keyed by file name.
    """
    sums = {} if CHECKSUMS in problems else directory.checksums()
    for name in (*ALWAYS, "summary.json"):
        if name not in sums:
            problems.setdefault(CHECKSUMS, f"missing, or contains no checksum of {name}")
            return
    for name, checksum in sums.items():
        path = directory.path / name
        try:
            if not path.exists():
                problems.setdefault(name, MISSING)
            elif (models or path.suffix != ".safetensors") and sha256_of(path) != checksum:
                problems.setdefault(name, CHANGED)
        except OSError as error:
            problems.setdefault(name, f"cannot be read ({error.strerror})")
    for name in map(directory.name_of, directory.all_model_files()):
        if name not in sums:
            problems[name] = "does not belong to this run"


def _check_checkpoints(
    directory: RunDirectory, files: list[Path], finished: bool, problems: dict[str, str]
) -> None:
    """Read the newest checkpoints, compare the run directory with them, and add problems.

    Args:
        directory: The run directory.
        files: Checkpoints of the run, the newest last.
        finished: Whether the run has finished.
        problems: Problems of the directory, keyed by file name.
    """
    rounds = 0 if METRICS in problems else len(directory.lines())
    # A run may have been killed between the last line and the checkpoint of that round.
    least = rounds if finished else rounds - 1
    if not files and (result := _first_result(directory)):
        problems["checkpoint"] = f"{MISSING}, although {result} exists"
    elif files and checkpoint_round(files[-1]) < least:
        problems[f"checkpoint/{checkpoint_name(least)}"] = MISSING
    for path in reversed(files[-KEPT_CHECKPOINTS:]):
        try:
            with refuse_malformed():
                _compare(directory, read_checkpoint(path)[0], path.name, problems)
        except (CodecError, OSError) as error:
            problems[f"checkpoint/{path.name}"] = f"damaged ({error})"
        except EarlierVersionError:
            problems[f"checkpoint/{path.name}"] = "written by an earlier version of hetero_fl"


def _first_result(directory: RunDirectory) -> str:
    """Return the name of a file that a run writes after its first checkpoint.

    The result is empty if there is no such file.
    """
    files = [directory.path / name for name in (METRICS, "details.json", CHECKSUMS)]
    files += directory.all_model_files()
    return next((directory.name_of(path) for path in files if path.exists()), "")


def _compare(
    directory: RunDirectory, saved: Mapping[str, Any], name: str, problems: dict[str, str]
) -> None:
    """Compare a run directory with the values that were recorded in a checkpoint.

    Args:
        directory: The run directory.
        saved: The state dict of the checkpoint.
        name: File name of the checkpoint.
        problems: Problems of the directory, keyed by file name, to which others are added.
    """
    known = saved["directory"]
    completed = saved["run"]["completed"]
    environment = directory.environment()
    if known["run"] != environment.get("run"):
        problems[f"checkpoint/{name}"] = "belongs to another run"
        return
    if checkpoint_name(completed) != name:
        problems[f"checkpoint/{name}"] = f"contains the state after {pluralize(completed, 'round')}"
    if METRICS not in problems:
        written = b"".join(directory.lines()[:completed])
        if sha256(written).hexdigest() != known["metrics"]:
            exists = (directory.path / METRICS).exists()
            problems[METRICS] = f"{CHANGED} (lines 1 to {completed})" if exists else MISSING
    # The number of workers does not affect results.
    free = {"workers": None, "reasons": None}
    choice = environment.get("choice")
    if not isinstance(choice, dict) or {**choice, **free} != {**saved["choice"], **free}:
        problems.setdefault("environment.json", f"choice {CHANGED}")
    if "config.yaml" not in problems and (difference := _changed_settings(directory, known)):
        problems["config.yaml"] = f"{CHANGED}: {difference}"


def _changed_settings(directory: RunDirectory, known: Mapping[str, Any]) -> str | None:
    """Describe the difference between `config.yaml` and the configuration in a checkpoint."""
    config = directory.config()
    rounds = config.get("rounds")
    # The rounds of an extended run are recorded before its next checkpoint.
    is_extended = isinstance(rounds, int) and rounds >= known["rounds"]
    # A checkpoint of an earlier version may contain keys that no longer count as relevant.
    before = {"rounds": known["rounds"], **resume_relevant(json.loads(known["config"]))}
    now = {"rounds": known["rounds"] if is_extended else rounds, **resume_relevant(config)}
    return describe_difference(before, now)
