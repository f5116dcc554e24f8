"""The values that the page shows, for all runs in the watched folders."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

from hetero_fl.core.metrics import SMALLER_IS_BETTER
from hetero_fl.reporting.formatting import (
    TEST_NAMES,
    capitalize_first,
    is_metric,
    is_percentage,
    metric_name,
    short_metrics,
)
from hetero_fl.reporting.run_directory import METRICS
from hetero_fl.reporting.watch.live_run import LiveRun
from hetero_fl.utils.errors import UserError, one_line, suggest_similar

# Maximum depth of a run directory below a watched folder, as in `benchmark/runs/federation/run`.
MAX_DEPTH = 4
MAX_RUNS = 100
# Maximum number of points of a curve.
MAX_POINTS = 1000
# Maximum number of clients in the table, of which the worst are listed.
MAX_CLIENTS = 200

Json = dict[str, Any]
T = TypeVar("T")


def is_run(path: Path) -> bool:
    """Return whether a folder is a run directory."""
    return (path / "config.yaml").is_file() and (
        (path / "environment.json").is_file() or (path / METRICS).is_file()
    )


def find_runs(folder: Path, depth: int = MAX_DEPTH, above: Collection[Path] = ()) -> Iterator[Path]:
    """Yield the run directories in a folder, sorted by path.

    Args:
        folder: A run directory, or a folder that contains run directories.
        depth: Maximum number of folders between `folder` and a run directory.
        above: Resolved folders that contain `folder`, to which links are not followed.
    """
    try:
        place = folder.resolve()
        is_found = is_run(folder)
        children = [c for c in sorted(folder.iterdir()) if c.name[0] != "." and c.is_dir()]
    # Before Python 3.13, `resolve` raises RuntimeError for a loop of links.
    except (OSError, RuntimeError):
        return
    if is_found:
        yield folder
        return
    if depth == 0 or place in above:
        return
    for child in children:
        yield from find_runs(child, depth - 1, (*above, place))


def _suggest_folder(folder: Path) -> str:
    """Suggest a folder with a similar name, for the end of an error message."""
    try:
        names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    return suggest_similar(folder.name, names)


def _name_parent(folder: Path) -> str:
    """Propose to watch the parent of a folder, if it exists, for the end of an error message."""
    return f", or watch {folder.parent}" if folder.parent.is_dir() else ""


class WatchedRuns:
    """The runs in several folders. The methods may be called in several threads.

    Args:
        folders: Run directories, and folders that contain run directories, now or later.

    Raises:
        UserError: If a folder does not exist.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        for folder in folders:
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder}: expected a folder, got a file")
            if not folder.is_dir():
                raise UserError(
                    f"{folder}: folder not found{_suggest_folder(folder)}; a run that has just "
                    f"started creates it within seconds: try again{_name_parent(folder)}"
                )
        self._folders = list(dict.fromkeys(folders))
        self._runs: dict[Path, LiveRun] = {}
        self._labels: dict[Path, str] = {}
        self._omitted = 0
        self._refreshing = threading.Lock()

    def overview(self, test: str = "", metric: str = "") -> Json:
        """Return the state and the curves of all runs.

        Args:
            test: `personal`, `global` or `server`. If no run has such scores, another test is
                chosen.
            metric: Name of the metric. If no run has the metric, another metric is chosen.
        """
        with self._refreshing:
            self._refresh()
            runs = list(self._runs.values())
            available = _available_metrics(runs)
            if test not in available:
                test = next(iter(available), "personal")
            names = available.get(test, [])
            if metric not in names:
                metric = _default_metric(names)
            return {
                "test": test,
                "metric": metric,
                "metrics": {
                    name: [{"name": m, "title": capitalize_first(metric_name(m))} for m in found]
                    for name, found in available.items()
                },
                "is_percentage": is_percentage(metric),
                "omitted": self._omitted,
                "runs": [
                    _content_or_problem(run, self._labels[path], test, metric)
                    for path, run in self._runs.items()
                ],
            }

    def clients(self, key: str, test: str = "", metric: str = "") -> Json:
        """Return the scores of the clients of a run, the worst client first.

        Args:
            key: Key of the run. If it is unknown, there are no clients.
            test: `personal` or `global`.
            metric: Name of the metric.
        """
        with self._refreshing:
            self._refresh()
            run = next((run for run in self._runs.values() if run.key == key), None)
            rows = [] if run is None else _client_rows(run, test, metric)
        return {
            "run": key,
            "is_percentage": is_percentage(metric),
            "clients": rows[:MAX_CLIENTS],
            "omitted": len(rows[MAX_CLIENTS:]),
        }

    def _refresh(self) -> None:
        found: dict[Path, Path] = {}
        places: set[Path] = set()
        for folder in self._folders:
            for path in find_runs(folder):
                if path.resolve() not in places:
                    places.add(path.resolve())
                    found[path] = folder
        self._omitted = max(0, len(found) - MAX_RUNS)
        shown = list(found)[:MAX_RUNS]
        self._runs = {path: self._runs.get(path) or LiveRun(path) for path in shown}
        self._labels = _labels({path: found[path] for path in shown})
        for run in self._runs.values():
            run.refresh()


def _labels(found: Mapping[Path, Path]) -> dict[Path, str]:
    """Return a short distinct name of each run.

    Args:
        found: The watched folder in which each run was found.
    """
    short = {}
    for path, folder in found.items():
        relative = path.relative_to(folder).as_posix().removeprefix("runs/")
        short[path] = path.resolve().name if path == folder else relative
    counts = Counter(short.values())
    labels = {}
    for path, name in short.items():
        if counts[name] == 1:
            labels[path] = name
        elif found[path] == path:
            labels[path] = str(path)
        else:
            labels[path] = f"{found[path].resolve().name}/{name}"
    return labels


def _available_metrics(runs: Sequence[LiveRun]) -> dict[str, list[str]]:
    """Return the metrics of each test in the last evaluations of the runs."""
    found: dict[str, dict[str, None]] = {test: {} for test in TEST_NAMES}
    for run in runs:
        last = next((r.means for r in reversed(run.rounds) if r.means), {})
        for test, scores in last.items():
            found[test] |= dict.fromkeys(filter(is_metric, scores))
    return {test: list(names) for test, names in found.items() if names}


def _default_metric(names: Sequence[str]) -> str:
    """Return the most important metric, or an empty string if there are no metrics."""
    if not names:
        return ""
    preferred = short_metrics(dict.fromkeys(names))[0]
    return preferred if preferred in names else names[0]


def _content_or_problem(run: LiveRun, label: str, test: str, metric: str) -> Json:
    """Return the content of a run, without rounds if it cannot be shown."""
    try:
        return _run_content(run, label, test, metric)
    # A damaged run must not hide the other runs.
    except Exception as error:
        damaged = copy(run)
        damaged.rounds = []
        damaged.problem = one_line(f"{run.path / METRICS}: cannot be shown ({error})")
        return _run_content(damaged, label, test, metric)


def _run_content(run: LiveRun, label: str, test: str, metric: str) -> Json:
    last = run.rounds[-1] if run.rounds else None
    scores = [(r, r.means[test]) for r in run.rounds if test in r.means]
    known = [value for _, s in scores if (value := _number(s.get(metric))) is not None]
    return {
        "key": run.key,
        "label": label,
        "folder": str(run.path),
        "name": str(run.config.get("name", "")),
        "algorithm": run.algorithm,
        "seed": str(run.config.get("seed", "")),
        "rounds": run.planned,
        "completed": len(run.rounds),
        "state": run.state,
        "problem": run.problem,
        "last": known[-1] if known else None,
        "best": _best_round(run, test, metric),
        "worst_client": _worst_client(run, test, metric),
        "up": last.up_bytes if last else 0,
        "down": last.down_bytes if last else 0,
        "seconds": _number(last.seconds) if last else 0,
        "epsilon": _number(last.epsilon) if last else None,
        "curves": [
            [
                r.number,
                _number(r.seconds),
                r.up_bytes,
                r.down_bytes,
                _number(r.train_loss),
                _number(r.epsilon),
            ]
            for r in _thin(run.rounds)
        ],
        "scores": [
            [
                r.number,
                _number(r.seconds),
                r.up_bytes + r.down_bytes,
                _number(s.get(metric)),
                _number(s.get(f"{metric}_std")),
                _number(s.get(f"{metric}_worst")),
            ]
            for r, s in _thin(scores)
        ],
    }


def _best_round(run: LiveRun, test: str, metric: str) -> Json | None:
    """Return the test score of the round that is best on validation rows.

    The first round is chosen in a tie. The result is None if no round has been validated: choosing
    a round by its test score would use the test rows.
    """
    candidates = []
    for r in run.rounds:
        score = _number(r.means.get(test, {}).get(metric))
        validation = _number(r.validation.get(test, {}).get(metric))
        if score is not None and validation is not None:
            candidates.append((validation, r.number, score))
    if not candidates:
        return None
    choose = min if metric in SMALLER_IS_BETTER else max
    _, number, score = choose(candidates, key=lambda candidate: candidate[0])
    return {"round": number, "score": score}


def _worst_client(run: LiveRun, test: str, metric: str) -> Json | None:
    """Return the client with the worst score in the last evaluation that has scores by client.

    The result is None if all clients have the same score.
    """
    rows = _client_rows(run, test, metric, last_only=True)
    if not rows or rows[0]["last"] == rows[-1]["last"]:
        return None
    return {"id": rows[0]["id"], "last": rows[0]["last"]}


def _client_rows(run: LiveRun, test: str, metric: str, last_only: bool = False) -> list[Json]:
    """Return one row for each client with a score, the worst client first."""
    evaluated = [r for r in run.rounds if r.clients]
    points: dict[str, list[tuple[int, float]]] = {}
    for r in evaluated[-1:] if last_only else _thin(evaluated):
        for client, tests in r.clients.items():
            value = _number((tests.get(test) or {}).get(metric))
            if value is not None:
                points.setdefault(client, []).append((r.number, value))
    failures = Counter(client for r in run.rounds for client in r.failed)
    rows = [
        {
            "id": client,
            "model": run.models.get(client, ""),
            "failures": failures[client],
            "first": found[0][1],
            "last": found[-1][1],
            "points": found,
        }
        for client, found in points.items()
    ]
    sign = -1 if metric in SMALLER_IS_BETTER else 1
    return sorted(rows, key=lambda row: sign * row["last"])


def _thin(items: Sequence[T]) -> list[T]:
    """Return at most about `MAX_POINTS` evenly spaced items, with the first and the last."""
    step = max(1, -(-len(items) // MAX_POINTS))
    return [*items[:-1:step], *items[-1:]]


def _number(value: Any) -> float | None:
    """Return a finite number, or None for any other value, which a damaged file may contain."""
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:
        return None
