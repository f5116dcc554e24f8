"""Check that a run directory is complete and unmodified."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from hetero_fl.config.describe import describe_difference, resume_relevant
from hetero_fl.federation.checkpoint import (
    KEPT_CHECKPOINTS,
    checkpoint_files,
    checkpoint_name,
    checkpoint_round,
    read_checkpoint,
)
from hetero_fl.reporting.run_directory import ALWAYS, CHECKSUMS, LOG, METRICS, RunDirectory
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import CodecError, refuse_malformed, sha256_of
from hetero_fl.utils.text import pluralize

# Fields of the executor choice in `environment.json` that do not affect results.
IRRELEVANT_CHOICES = ("workers", "reasons")
CHANGED = "modified since the run wrote it"
MISSING = "missing"
FOREIGN = "does not belong to this run"
EARLIER = "the run was written by an earlier version"
_LOGGED_ROUND = re.compile(r"^\S+ \S+  round \d+[/:]", re.MULTILINE)
_LOGGED_START = re.compile(r"^\S+ \S+  [\d,]+ clients?, [\d,]+ rounds?\b", re.MULTILINE)


@dataclass
class Inspection:
    """Result of the inspection of a run directory.

    Attributes:
        path: The run directory.
        state: Text that says whether the run has finished, and after how many rounds.
        damage: Descriptions of missing and damaged files, keyed by file name.
        notes: Other remarks, such as how to repair the damage.
    """

    path: Path
    state: str = ""
    damage: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """Descriptions of the damage, one line for each file."""
        return [f"{self.path / name}: {what}" for name, what in self.damage.items()]

    def require_whole(self) -> None:
        """Check that no file is missing or damaged.

        Raises:
            UserError: If a file is missing or damaged. The message describes the first such file.
        """
        if not self.damage:
            return
        more = f", and {len(self.damage) - 1} more" if len(self.damage) > 1 else ""
        raise UserError(f"{self.lines[0]}{more} (`hetero-fl check {self.path}` lists all)")


def inspect(path: str | Path, thorough: bool = True) -> Inspection:
    """Look for missing and damaged files in a run directory.

    Args:
        path: The directory of a finished or unfinished run.
        thorough: Whether to read models and checkpoints. Otherwise, models only have to exist, and
            checkpoints are not checked.

    Returns:
        Inspection with descriptions of all missing and damaged files.

    Raises:
        UserError: If the path is not a run directory.
    """
    directory = RunDirectory.open(path)
    inspection = Inspection(directory.path)
    # The checkpoints and the summary are looked up first, because an active run writes each line of
    # metrics before the checkpoint, and the checksums before the summary.
    checkpoints = checkpoint_files(directory.path / "checkpoint")
    finished = directory.finished
    sums: dict[str, str] = {}
    try:
        sums = directory.checksums()
    except UserError as error:
        inspection.damage[CHECKSUMS] = _describe_error(error, directory, CHECKSUMS)
    _check_readable(directory, inspection)
    if _evidence_of_rounds(directory) and not (directory.path / METRICS).exists():
        inspection.damage.setdefault(METRICS, MISSING)
    if sums and (finished or thorough):
        _check_checksums(directory, sums, thorough, inspection)
    elif finished and "run" in directory.environment():
        inspection.damage.setdefault(CHECKSUMS, f"{MISSING} or empty")
    elif finished:
        inspection.notes.append(
            f"{EARLIER}, without checksums: only the format of its text files is checked"
        )
    rounds = len(_lines(directory, inspection))
    expected = max(map(checkpoint_round, checkpoints), default=0)
    if finished and "summary.json" not in inspection.damage:
        expected = directory.summary()["rounds_completed"]
    if rounds < expected and inspection.damage.get(METRICS) in (None, MISSING, CHANGED):
        inspection.damage[METRICS] = _missing_lines(directory, rounds, expected)
    if thorough:
        # A run may have been killed between the last line and the checkpoint of that round.
        _check_checkpoints(directory, checkpoints, expected if finished else rounds - 1, inspection)
    inspection.state = _state(directory, rounds)
    inspection.notes += _missing_derived(directory) if finished else []
    inspection.notes += _missing_optional(directory, checkpoints) if thorough else []
    inspection.notes += _remedy(directory, checkpoints, inspection) if thorough else []
    return inspection


def check_resumable(directory: RunDirectory, saved: Mapping[str, Any]) -> None:
    """Check that a checkpoint belongs to a run directory.

    Args:
        directory: The run directory.
        saved: The state dict of the checkpoint.

    Raises:
        UserError: If the checkpoint belongs to a different run, or if a file was modified.
    """
    inspection = Inspection(directory.path)
    completed = saved["run"]["completed"]
    _compare(directory, saved, checkpoint_name(completed), inspection)
    inspection.require_whole()


def evidence_of_start(directory: RunDirectory) -> str:
    """Describe a file that shows that the run has started and written its first checkpoint.

    Returns:
        The description, or an empty string if there is no such file.
    """
    if evidence := _evidence_of_rounds(directory):
        return evidence
    return f"{LOG} shows that the run has started" if _LOGGED_START.search(_log(directory)) else ""


def identity(directory: RunDirectory) -> dict[str, Any]:
    """Return the id and the configuration of a run, as stored in the checkpoints of the run."""
    return {
        "run": directory.environment().get("run"),
        "config": json.dumps(resume_relevant(directory.config())),
    }


def _check_readable(directory: RunDirectory, inspection: Inspection) -> None:
    """Check that text files exist and have the right format."""
    readers: dict[str, Callable[[], Any]] = {"config.yaml": directory.config}
    if directory.finished:
        readers |= {"summary.json": lambda: _summary(directory), "details.json": directory.details}
    if directory.finished or (directory.path / METRICS).exists():
        readers[METRICS] = directory.metrics
    for name, read in readers.items():
        if not (directory.path / name).exists():
            inspection.damage[name] = MISSING
            continue
        try:
            read()
        except UserError as error:
            inspection.damage[name] = _describe_error(error, directory, name)


def _summary(directory: RunDirectory) -> dict[str, Any]:
    """Return the summary, or raise UserError if the summary lacks required keys."""
    summary = directory.summary()
    clients = summary.get("clients", [])
    has_ids = isinstance(clients, list) and all(
        isinstance(c, dict) and isinstance(c.get("id"), str) for c in clients
    )
    if not isinstance(summary.get("rounds_completed"), int) or not has_ids:
        raise UserError("not the summary of a run")
    return summary


def _check_checksums(
    directory: RunDirectory, sums: Mapping[str, str], thorough: bool, inspection: Inspection
) -> None:
    for name in (*ALWAYS, "summary.json"):
        if name not in sums:
            inspection.damage.setdefault(CHECKSUMS, f"no checksum of {name}")
    for name, checksum in sums.items():
        path = directory.path / name
        try:
            if not path.exists():
                inspection.damage[name] = MISSING
            elif (thorough or path.suffix != ".safetensors") and sha256_of(path) != checksum:
                inspection.damage.setdefault(name, CHANGED)
        except OSError as error:
            inspection.damage.setdefault(name, f"cannot be read ({error.strerror})")
    for path in directory.all_model_files():
        if (name := directory.name_of(path)) not in sums:
            inspection.damage[name] = FOREIGN


def _missing_derived(directory: RunDirectory) -> list[str]:
    """Return notes on missing plots and a missing report, which can be created again."""
    try:
        output = directory.config().get("output")
    except UserError:
        return []
    output = output if isinstance(output, Mapping) else {}
    notes = []
    if output.get("plots") and not any(directory.plots.glob("*.png")):
        notes.append(
            f"{directory.plots}: no plots; "
            f"`hetero_fl.Run({str(directory.path)!r}).plot()` draws them again"
        )
    if output.get("report") and not (directory.path / "report.html").exists():
        notes.append(f"{directory.path / 'report.html'}: missing; `--resume` writes it again")
    return notes


def _missing_optional(directory: RunDirectory, checkpoints: list[Path]) -> list[str]:
    """Return notes on a missing log or a missing older checkpoint, which the run does not need."""
    notes = []
    rounds = {checkpoint_round(path) for path in checkpoints}
    older = max(rounds, default=0) - 1
    if older >= 0 and older not in rounds:
        path = directory.path / "checkpoint" / checkpoint_name(older)
        notes.append(f"{path}: missing; it is only used if {checkpoint_name(older + 1)} is damaged")
    if rounds and not directory.log.exists():
        notes.append(f"{directory.log}: missing; no other file depends on it")
    return notes


def _remedy(directory: RunDirectory, checkpoints: list[Path], inspection: Inspection) -> list[str]:
    """Return notes on how to repair the damage, or an empty list if there are no instructions."""
    if not inspection.damage:
        return []
    if METRICS in inspection.damage:
        return [
            f"{directory.path / METRICS}: no other file contains its lines; "
            "the run cannot be repaired"
        ]
    if any(
        name.startswith(("checkpoint", "config.yaml", "environment.json"))
        for name in inspection.damage
    ):
        return []
    if not checkpoints or not directory.finished or FOREIGN in inspection.damage.values():
        return []
    return [
        f"{directory.path}: delete summary.json and run "
        f"`hetero-fl train --resume --out {directory.path}`; "
        "models, details, checksums and summary are written again with the same results"
    ]


def _lines(directory: RunDirectory, inspection: Inspection) -> list[bytes]:
    """Return the lines of `metrics.jsonl`, or record that the file cannot be read as damage."""
    try:
        return directory.lines()
    except UserError as error:
        inspection.damage.setdefault(METRICS, _describe_error(error, directory, METRICS))
        return []


def _evidence_of_rounds(directory: RunDirectory) -> str:
    """Describe a file that shows that the run completed a round, or return an empty string."""
    metrics = directory.path / METRICS
    if metrics.is_file() and metrics.stat().st_size > 0:
        return f"{METRICS} has rounds"
    left = [name for name in ("details.json", CHECKSUMS) if (directory.path / name).exists()]
    left += [f"models/{path.name}" for path in directory.model_files()]
    if left:
        return f"{left[0]} exists"
    return f"{LOG} has rounds" if _LOGGED_ROUND.search(_log(directory)) else ""


def _log(directory: RunDirectory) -> str:
    try:
        return directory.log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _missing_lines(directory: RunDirectory, rounds: int, expected: int) -> str:
    if not (directory.path / METRICS).exists():
        return f"{MISSING}; expected a line for each of {pluralize(expected, 'round')}"
    return f"expected {expected} lines, one for each round, got {rounds}"


def _check_checkpoints(
    directory: RunDirectory, files: list[Path], least: int, inspection: Inspection
) -> None:
    """Read the newest checkpoints and compare the run directory with them.

    Args:
        directory: The run directory.
        files: Checkpoints of the run, the newest last.
        least: Smallest valid round of the newest checkpoint.
        inspection: Inspection to which damage is added.
    """
    newest = max(map(checkpoint_round, files), default=-1)
    if newest < least:
        inspection.damage[f"checkpoint/{checkpoint_name(least)}"] = MISSING
    elif not files and (evidence := evidence_of_start(directory)):
        inspection.damage["checkpoint"] = f"{MISSING}, although {evidence}"
    for path in reversed(files[-KEPT_CHECKPOINTS:]):
        try:
            with refuse_malformed():
                _compare(directory, read_checkpoint(path).tree, path.name, inspection)
        except (CodecError, OSError) as error:
            inspection.damage[f"checkpoint/{path.name}"] = f"damaged ({_reason(error)})"


def _reason(error: CodecError | OSError) -> str:
    """Describe why a checkpoint could not be read."""
    if isinstance(error, FileNotFoundError):
        return f"refers to {error.filename}, which is missing"
    return str(error.strerror) if isinstance(error, OSError) else str(error)


def _compare(
    directory: RunDirectory, saved: Mapping[str, Any], name: str, inspection: Inspection
) -> None:
    """Compare a run directory with the values that were recorded in a checkpoint.

    Args:
        directory: The run directory.
        saved: The state dict of the checkpoint.
        name: File name of the checkpoint.
        inspection: Inspection to which damage and notes are added.
    """
    known = saved.get("directory")
    completed = saved["run"]["completed"]
    if known is None:
        note = f"{EARLIER}: changes of {METRICS} and config.yaml cannot be detected"
        if not directory.finished and note not in inspection.notes:
            inspection.notes.append(note)
    elif known["run"] != directory.environment().get("run"):
        inspection.damage[f"checkpoint/{name}"] = "belongs to another run"
        return
    if checkpoint_name(completed) != name:
        inspection.damage[f"checkpoint/{name}"] = (
            f"contains the state after {pluralize(completed, 'round')}"
        )
    lines = _lines(directory, inspection)
    if len(lines) < completed:
        inspection.damage.setdefault(METRICS, _missing_lines(directory, len(lines), completed))
    elif known is not None and sha256(b"".join(lines[:completed])).hexdigest() != known["metrics"]:
        inspection.damage.setdefault(METRICS, _changed_lines(directory, completed))
    if _result_relevant(directory.environment().get("choice")) != _result_relevant(saved["choice"]):
        inspection.damage["environment.json"] = f"choice {CHANGED}"
    if known is not None and inspection.damage.get("config.yaml") in (None, CHANGED):
        _compare_config(directory, known, inspection)


def _compare_config(
    directory: RunDirectory, known: Mapping[str, Any], inspection: Inspection
) -> None:
    config = directory.config()
    # A checkpoint of an earlier version may contain keys that no longer count as relevant.
    before = resume_relevant(json.loads(known["config"]))
    now = resume_relevant(config)
    rounds = config.get("rounds")
    if not isinstance(rounds, int) or rounds < known["rounds"]:
        before = {"rounds": known["rounds"], **before}
        now = {"rounds": rounds, **now}
    if difference := describe_difference(before, now):
        inspection.damage["config.yaml"] = f"{CHANGED}: {difference}"


def _changed_lines(directory: RunDirectory, completed: int) -> str:
    try:
        directory.metrics()
    except UserError as error:
        return _describe_error(error, directory, METRICS)
    return f"{CHANGED} ({'line 1' if completed == 1 else f'lines 1 to {completed}'})"


def _state(directory: RunDirectory, rounds: int) -> str:
    if directory.finished:
        return f"finished after {pluralize(rounds, 'round')}"
    try:
        planned = directory.config().get("rounds", "?")
    except UserError:
        planned = "?"
    total = pluralize(planned, "round") if isinstance(planned, int) else f"{planned} rounds"
    return f"not finished, {rounds} of {total}; `--resume` continues it"


def _result_relevant(choice: Any) -> Any:
    """Return the fields of the recorded executor choice that affect results."""
    if not isinstance(choice, Mapping):
        return choice
    return {key: value for key, value in choice.items() if key not in IRRELEVANT_CHOICES}


def _describe_error(error: UserError, directory: RunDirectory, name: str) -> str:
    return str(error).removeprefix(f"{directory.path / name}: ")
