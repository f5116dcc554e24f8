"""Whether a run directory is whole: every file there, every line, checksum and model as the run wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from hetero_fl.config.describe import describe_difference, resume_relevant
from hetero_fl.core.saved_model import read_model_file
from hetero_fl.federation.checkpoint import (
    KEPT_CHECKPOINTS,
    checkpoint_files,
    checkpoint_name,
    checkpoint_round,
    read_checkpoint,
)
from hetero_fl.reporting.run_directory import ALWAYS, CHECKSUMS, LOG, METRICS, RunDirectory
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import CodecError, sha256_of
from hetero_fl.utils.text import pluralize

NODES = "nodes"  # the executor of a run across machines, whose sites may keep their models
FREE = ("workers", "reasons")  # what may differ in the record of how a run is computed
CHANGED = "is not what the run wrote"
MISSING = "missing"
FOREIGN = "is not a model of this run"
EARLIER = "the run was made by an earlier version"
_LOGGED_ROUND = re.compile(r"^\S+ \S+  round \d+[/:]", re.MULTILINE)
_LOGGED_START = re.compile(r"^\S+ \S+  [\d,]+ clients?, [\d,]+ rounds?\b", re.MULTILINE)


@dataclass
class Inspection:
    """What was found in a run directory: damage by file name, and notes on what is not damage."""

    path: Path
    state: str = ""
    damage: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """Return the damage, a line each."""
        return [f"{self.path / name}: {what}" for name, what in self.damage.items()]

    def require_whole(self) -> None:
        """Raise UserError with the first thing that is damaged, if anything is."""
        if not self.damage:
            return
        more = f", and {len(self.damage) - 1} more" if len(self.damage) > 1 else ""
        raise UserError(f"{self.lines[0]}{more} (`hetero-fl check {self.path}` lists all)")


def inspect(path: str | Path, thorough: bool = True) -> Inspection:
    """Look for missing and damaged files in a run directory.

    Args:
        path: The run directory, of a run that has finished or not.
        thorough: Also read every model and checkpoint. Otherwise of models only the presence is checked, and
            checkpoints are left out; everything else is read.

    Raises:
        UserError: If it is not a run directory at all.
    """
    directory = RunDirectory.open(path)
    found = Inspection(directory.path)
    # A run that is in progress writes a line before its checkpoint, and checksums before the summary.
    checkpoints = checkpoint_files(directory.path / "checkpoint")
    finished = directory.finished
    sums: dict[str, str] = {}
    try:
        sums = directory.checksums()
    except UserError as error:
        found.damage[CHECKSUMS] = _describe_error(error, directory, CHECKSUMS)
    _check_readable(directory, found)
    if _evidence_of_rounds(directory) and not (directory.path / METRICS).exists():
        found.damage.setdefault(METRICS, MISSING)
    if sums and (finished or thorough):
        _check_checksums(directory, sums, thorough, found)
    elif finished and "run" in directory.environment():
        found.damage.setdefault(CHECKSUMS, f"{MISSING} or empty")
    elif finished:
        found.notes.append(
            f"{EARLIER}, without checksums: only form and number of its files are checked"
        )
        if thorough and "summary.json" not in found.damage:
            _check_models(directory, found)
    rounds = len(_lines(directory, found))
    expected = max(map(checkpoint_round, checkpoints), default=0)
    if finished and "summary.json" not in found.damage:
        expected = directory.summary()["rounds_completed"]
    if rounds < expected and found.damage.get(METRICS) in (None, MISSING, CHANGED):
        found.damage[METRICS] = _missing_lines(directory, rounds, expected)
    if thorough:
        # A run may have been killed between its last line and the checkpoint of that round.
        _check_checkpoints(directory, checkpoints, expected if finished else rounds - 1, found)
    found.state = _state(directory, rounds)
    found.notes += _missing_derived(directory) if finished else []
    found.notes += _missing_optional(directory, checkpoints) if thorough else []
    found.notes += _remedy(directory, checkpoints, found) if thorough else []
    return found


def check_resumable(directory: RunDirectory, saved: Mapping[str, Any]) -> None:
    """Raise UserError if a run directory is not the one whose state is in a checkpoint.

    Args:
        directory: Where the run is to be resumed.
        saved: The tree of the checkpoint.
    """
    found = Inspection(directory.path)
    completed = saved["run"]["completed"]
    _compare(directory, saved, checkpoint_name(completed), found)
    found.require_whole()


def evidence_of_start(directory: RunDirectory) -> str:
    """Return which file shows that a run has written the checkpoint before its first round; empty if none does."""
    if evidence := _evidence_of_rounds(directory):
        return evidence
    return f"{LOG} says that the run has started" if _LOGGED_START.search(_log(directory)) else ""


def identity(directory: RunDirectory) -> dict[str, Any]:
    """Return what a checkpoint holds of its run directory: which run it is, and its configuration."""
    return {
        "run": directory.environment().get("run"),
        "config": json.dumps(resume_relevant(directory.config())),
    }


# Files ---------------------------------------------------------------------------------------------------------------
def _check_readable(directory: RunDirectory, found: Inspection) -> None:
    """Read what is text: it has to be there, and of the right form."""
    readers: dict[str, Callable[[], Any]] = {"config.yaml": directory.config}
    if directory.finished:
        readers |= {"summary.json": lambda: _summary(directory), "details.json": directory.details}
    if directory.finished or (directory.path / METRICS).exists():
        readers[METRICS] = directory.metrics
    for name, read in readers.items():
        if not (directory.path / name).exists():
            found.damage[name] = MISSING
            continue
        try:
            read()
        except UserError as error:
            found.damage[name] = _describe_error(error, directory, name)


def _summary(directory: RunDirectory) -> dict[str, Any]:
    """Return the summary. Raises UserError if it lacks what is needed here."""
    summary = directory.summary()
    clients = summary.get("clients", [])
    named = isinstance(clients, list) and all(
        isinstance(c, dict) and isinstance(c.get("id"), str) for c in clients
    )
    if not isinstance(summary.get("rounds_completed"), int) or not named:
        raise UserError("is not the summary of a run")
    return summary


def _check_checksums(
    directory: RunDirectory, sums: Mapping[str, str], thorough: bool, found: Inspection
) -> None:
    for name in (*ALWAYS, "summary.json"):
        if name not in sums:
            found.damage.setdefault(CHECKSUMS, f"has no checksum of {name}")
    for name, checksum in sums.items():
        path = directory.path / name
        try:
            if not path.exists():
                found.damage[name] = MISSING
            elif (thorough or path.suffix != ".safetensors") and sha256_of(path) != checksum:
                found.damage.setdefault(name, CHANGED)
        except OSError as error:
            found.damage.setdefault(name, f"cannot be read ({error.strerror})")
    for path in directory.model_files():
        if f"models/{path.name}" not in sums:
            found.damage[f"models/{path.name}"] = FOREIGN


def _check_models(directory: RunDirectory, found: Inspection) -> None:
    """Look for the models of a run without checksums: of each client of its summary, and the server's."""
    summary = directory.summary()
    choice = directory.environment().get("choice")
    expected = [f"{client['id']}.safetensors" for client in summary.get("clients", [])]
    expected += ["server.safetensors"] if summary.get("server") else []
    if isinstance(choice, Mapping) and choice.get("executor") == NODES:
        found.notes.append("sites may keep their models: whether one is missing cannot be told")
        expected = []
    for name in expected:
        if not (directory.path / "models" / name).is_file():
            found.damage[f"models/{name}"] = MISSING
    for path in directory.model_files():
        try:
            read_model_file(path)
        except UserError as error:
            found.damage[f"models/{path.name}"] = _describe_error(
                error, directory, f"models/{path.name}"
            )


def _missing_derived(directory: RunDirectory) -> list[str]:
    """Return a note for each of plots and report that is missing and can be made again."""
    try:
        output = directory.config().get("output")
    except UserError:
        return []
    output = output if isinstance(output, Mapping) else {}
    notes = []
    if output.get("plots") and not any(directory.plots.glob("*.png")):
        notes.append(
            f"{directory.plots}: no plots; `hetero_fl.Run({str(directory.path)!r}).plot()` draws them again"
        )
    if output.get("report") and not (directory.path / "report.html").exists():
        notes.append(f"{directory.path / 'report.html'}: missing; `--resume` writes it again")
    return notes


def _missing_optional(directory: RunDirectory, checkpoints: list[Path]) -> list[str]:
    """Return a note for each of log and older checkpoint that is missing: the run can do without them."""
    notes = []
    rounds = {checkpoint_round(path) for path in checkpoints}
    older = max(rounds, default=0) - 1
    if older >= 0 and older not in rounds:
        path = directory.path / "checkpoint" / checkpoint_name(older)
        notes.append(f"{path}: missing; it is only used if {checkpoint_name(older + 1)} is damaged")
    if rounds and not directory.log.exists():
        notes.append(f"{directory.log}: missing; no other file depends on it")
    return notes


def _remedy(directory: RunDirectory, checkpoints: list[Path], found: Inspection) -> list[str]:
    """Return a note on how the damage can be repaired, or that it cannot; none if nothing is damaged."""
    if not found.damage:
        return []
    if METRICS in found.damage:
        return [
            f"{directory.path / METRICS}: no other file has its lines; the run cannot be repaired"
        ]
    if any(
        name.startswith(("checkpoint", "config.yaml", "environment.json")) for name in found.damage
    ):
        return []
    if not checkpoints or not directory.finished or FOREIGN in found.damage.values():
        return []
    again = "models, details, checksums and summary are written again with the same results"
    return [
        f"{directory.path}: delete summary.json and run `hetero-fl train --resume --out {directory.path}`; {again}"
    ]


# Rounds --------------------------------------------------------------------------------------------------------------
def _lines(directory: RunDirectory, found: Inspection) -> list[bytes]:
    """Return the lines of `metrics.jsonl`; none, which is noted as damage, if it cannot be read."""
    try:
        return directory.lines()
    except UserError as error:
        found.damage.setdefault(METRICS, _describe_error(error, directory, METRICS))
        return []


def _evidence_of_rounds(directory: RunDirectory) -> str:
    """Return which file shows that a run has completed a round; empty if none does."""
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
    return f"found {pluralize(rounds, 'line')}; expected {expected}, one for each round"


def _check_checkpoints(
    directory: RunDirectory, files: list[Path], least: int, found: Inspection
) -> None:
    """Read the two newest checkpoints, and compare the directory with what they say of it.

    Args:
        directory: The run directory.
        files: Its checkpoints, the newest last.
        least: The round that the newest has to be of, if not a later one.
        found: Takes what is missing or damaged.
    """
    newest = max(map(checkpoint_round, files), default=-1)
    if newest < least:
        found.damage[f"checkpoint/{checkpoint_name(least)}"] = MISSING
    elif not files and (evidence := evidence_of_start(directory)):
        found.damage["checkpoint"] = f"{MISSING}, although {evidence}"
    for path in reversed(files[-KEPT_CHECKPOINTS:]):
        try:
            saved = read_checkpoint(path).tree
        except (CodecError, OSError) as error:
            reason = str(error)
            if isinstance(error, OSError):
                missing = isinstance(error, FileNotFoundError)
                reason = (
                    f"refers to {error.filename}, which is missing"
                    if missing
                    else str(error.strerror)
                )
            found.damage[f"checkpoint/{path.name}"] = f"damaged ({reason})"
            continue
        _compare(directory, saved, path.name, found)


def _compare(
    directory: RunDirectory, saved: Mapping[str, Any], name: str, found: Inspection
) -> None:
    """Compare a run directory with what one of its checkpoints says of it."""
    known = saved.get("directory")
    completed = saved["run"]["completed"]
    if known is None:
        note = f"{EARLIER}: that {METRICS} and config.yaml are as written cannot be checked"
        if not directory.finished and note not in found.notes:
            found.notes.append(note)
    elif known["run"] != directory.environment().get("run"):
        found.damage[f"checkpoint/{name}"] = "is of another run"
        return
    if checkpoint_name(completed) != name:
        found.damage[f"checkpoint/{name}"] = (
            f"holds the state after {pluralize(completed, 'round')}"
        )
    lines = _lines(directory, found)
    if len(lines) < completed:
        found.damage.setdefault(METRICS, _missing_lines(directory, len(lines), completed))
    elif known is not None and sha256(b"".join(lines[:completed])).hexdigest() != known["metrics"]:
        found.damage.setdefault(METRICS, _changed_lines(directory, completed))
    if _result_relevant(directory.environment().get("choice")) != _result_relevant(saved["choice"]):
        found.damage["environment.json"] = f"choice {CHANGED}"
    if known is None or found.damage.get("config.yaml") not in (None, CHANGED):
        return
    config = directory.config()
    was = json.loads(known["config"])
    now = resume_relevant(config)
    rounds = config.get("rounds")
    if not isinstance(rounds, int) or rounds < known["rounds"]:
        was = {"rounds": known["rounds"], **was}
        now = {"rounds": rounds, **now}
    if differs := describe_difference(was, now):
        found.damage["config.yaml"] = f"{CHANGED}: {differs}"


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
    """What decides the bits of a run's results in the record of how it is computed."""
    return (
        {k: v for k, v in choice.items() if k not in FREE}
        if isinstance(choice, Mapping)
        else choice
    )


def _describe_error(error: UserError, directory: RunDirectory, name: str) -> str:
    return str(error).removeprefix(f"{directory.path / name}: ")
