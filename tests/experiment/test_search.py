"""Search of settings with Optuna: spaces, budgets, early stopping and continuation."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import hetero_fl
from hetero_fl.core.task import Task
from hetero_fl.experiment.comparison import search as search_module
from hetero_fl.experiment.comparison.jobs import KILLED, Variant
from hetero_fl.experiment.comparison.search import SearchSettings, SearchTask, Trial
from hetero_fl.experiment.comparison.search_space import Budget, Choices, Range, parse_space
from hetero_fl.utils import extras
from hetero_fl.utils.errors import RunFailedError, UserError

CONFIG = {
    "name": "searched",
    "data": {"name": "digits", "train_limit": 300, "test_limit": 100},
    "clients": {"count": 2, "defaults": {"model": "mlp"}},
    "rounds": 3,
    "runtime": {"threads": 1},
}
LR = "clients.defaults.optimizer.lr"
FEDAVG = Variant.parse("fedavg")


def _search_task(out: Path, space: dict[str, str]) -> SearchTask:
    return SearchTask(
        source=CONFIG,
        base=[],
        task=Task("multiclass", 10),
        space=parse_space(space),
        budget=Budget(max_runs=2),
        seed=1,
        num_rounds=3,
        out=out,
        permission=search_module.CodePermission.from_argument(False),
        settings=SearchSettings(1, space, {}),
    )


def test_space_has_ranges_and_choices() -> None:
    space = parse_space(
        {"a": "0.001..1:log", "b": "1..5", "c": "x,[1,2]", "d": [1, 2], "e": (True, "x")}
    )

    assert space == {
        "a": Range(0.001, 1.0, is_log=True, is_integer=False),
        "b": Range(1.0, 5.0, is_log=False, is_integer=True),
        "c": Choices(("x", "[1,2]")),
        "d": Choices(("1", "2")),
        "e": Choices(("true", "x")),
    }
    assert space["b"].ends == ("1", "5")


def test_budgets_are_runs_or_hours() -> None:
    assert Budget.parse("20") == Budget(max_runs=20)
    assert Budget.parse("1.5h") == Budget(max_hours=1.5)
    assert Budget(max_runs=2).allows(1, 99.0) and not Budget(max_runs=2).allows(2, 0.0)
    assert Budget(max_hours=1).allows(99, 0.9) and not Budget(max_hours=1).allows(1, 1.0)


def test_missing_optuna_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "optuna" else find(name))

    with pytest.raises(UserError, match=r"^search needs optuna, which is not installed; run pip"):
        hetero_fl.compare(CONFIG, "fedavg", out=tmp_path / "out", space={LR: "0.1..1"})


@pytest.mark.slow
def test_search_stops_bad_trials_and_compares_the_best_settings(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = {LR: "1e-6..0.1:log"}

    comparison = hetero_fl.compare(
        CONFIG, "fedavg", [0, 1], out=tmp_path, space=space, budget=8, jobs=1
    )

    with (tmp_path / "search.csv").open(encoding="utf-8") as file:
        trials = list(csv.DictReader(file))
    assert len(trials) == 8
    complete = [trial for trial in trials if trial["state"] == "complete"]
    stopped = [trial for trial in trials if trial["state"] == "stopped"]
    assert stopped and all(int(trial["rounds"]) < 3 for trial in stopped)
    assert {trial["rounds"] for trial in complete} == {"3"}
    best = max(complete, key=lambda trial: float(trial["validation"]))
    rates = [
        run.directory.config()["clients"]["defaults"]["optimizer"]["lr"] for run in comparison.runs
    ]
    assert rates == [float(best[LR])] * 2
    assert {run.summary["seed"] for run in comparison.runs} == {0, 1}
    trial_runs = {path.name for path in (tmp_path / "search").iterdir() if path.is_dir()}
    assert trial_runs and all(name.endswith("seed2") for name in trial_runs)


@pytest.mark.slow
def test_search_continues_and_repeats_interrupted_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optuna = pytest.importorskip("optuna")
    space = {LR: "0.001..0.1:log"}
    hetero_fl.compare(CONFIG, "fedavg", out=tmp_path, space=space, budget=2, jobs=1)
    plan = _search_task(tmp_path / "search", space)
    variant = Variant.parse("fedavg")
    study = search_module._open_study(plan, variant)
    interrupted = study.ask()
    point = search_module._point(plan, interrupted)
    before = search_module.Search(plan, [variant]).trials(variant)

    hetero_fl.compare(CONFIG, "fedavg", out=tmp_path, space=space, budget=3, jobs=1)

    after = search_module.Search(plan, [variant]).trials(variant)
    assert after[:2] == before
    assert [trial.point for trial in after[2:]] == [point]
    states = [
        trial.state
        for trial in optuna.load_study(study_name="fedavg", storage=study._storage).trials
    ]
    assert optuna.trial.TrialState.RUNNING not in states


def test_best_trial_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    def best_of(*trials: tuple[str, float]) -> Trial:
        found = [
            Trial(FEDAVG, number, (f"a={number}",), state, score, 1, 1.0, "")
            for number, (state, score) in enumerate(trials)
        ]
        monkeypatch.setattr(search_module.Search, "trials", lambda self, variant: found)
        return search_module.Search.__new__(search_module.Search).best(FEDAVG)

    assert best_of(("stopped", 0.9), ("complete", 0.5), ("complete", 0.5)).number == 1
    assert best_of(("complete", -1.0), ("complete", 0.0)).number == 1
    with pytest.raises(RunFailedError, match="no trial of fedavg is complete"):
        best_of(("stopped", 0.9))


def test_drawn_numbers_stay_in_a_narrow_range() -> None:
    optuna = pytest.importorskip("optuna")
    space = parse_space({"momentum": "0.9..0.9999"})["momentum"]

    drawn = {
        space.suggest(optuna.trial.FixedTrial({"momentum": value}), "momentum")
        for value in (0.9, 0.99234, 0.99989)
    }

    assert space.ends == ("0.9", "0.9999")
    assert drawn == {"0.9", "0.9923", "0.9999"}


class RecordedRuns:
    """A replacement for `run` whose runs have the score 0.5, or raise an error."""

    def __init__(self) -> None:
        self.folders: list[str] = []
        self.error: BaseException | None = None

    def __call__(self, source: object, *, out: Path, **arguments: object) -> None:
        self.folders.append(out.name)
        if self.error is not None:
            raise self.error


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> RecordedRuns:
    """Replace the runs of trials."""
    pytest.importorskip("optuna")
    recorded = RecordedRuns()
    monkeypatch.setattr(search_module, "run", recorded)
    monkeypatch.setattr(search_module, "final_validation_score", lambda run, task: 0.5)
    return recorded


def _interrupt_trial(task: SearchTask, runs: RecordedRuns, index: int = 0) -> None:
    """Run a trial of FedAvg whose run is interrupted, after earlier ones were requeued."""
    search_module._requeue_interrupted(search_module._open_study(task, FEDAVG))
    runs.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        search_module.run_trial(task, FEDAVG, index)
    runs.error = None


def test_repeated_settings_are_not_run_again(tmp_path: Path, runs: RecordedRuns) -> None:
    task = _search_task(tmp_path, {LR: "0.1,0.2"})

    for index in range(5):
        search_module.run_trial(task, FEDAVG, index)

    trials = search_module.Search(task, [FEDAVG]).trials(FEDAVG)
    assert [(trial.state, trial.score) for trial in trials] == [("complete", 0.5)] * 5
    assert len(runs.folders) == len({trial.point for trial in trials}) <= 2


def test_simultaneous_trials_have_different_folders(tmp_path: Path, runs: RecordedRuns) -> None:
    task = _search_task(tmp_path, {LR: "0.1,0.2"})
    runs.error = KeyboardInterrupt()

    for index in range(3):
        with pytest.raises(KeyboardInterrupt):
            search_module.run_trial(task, FEDAVG, index)

    assert len(set(runs.folders)) == 3


def test_interrupted_trial_keeps_its_number_and_folder(tmp_path: Path, runs: RecordedRuns) -> None:
    task = _search_task(tmp_path, {LR: "0.1..0.2"})
    search_module.run_trial(task, FEDAVG, 0)
    for _ in range(2):
        _interrupt_trial(task, runs, 1)

    search_module._requeue_interrupted(search_module._open_study(task, FEDAVG))
    search_module.run_trial(task, FEDAVG, 1)
    search_module.run_trial(task, FEDAVG, 2)

    search_module.Search(task, [FEDAVG]).write(tmp_path / "search.csv")
    with (tmp_path / "search.csv").open(encoding="utf-8") as file:
        assert [row["trial"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    numbers = [re.search(r"trial(\d)", name)[1] for name in runs.folders]  # type: ignore[index]  # matches
    assert numbers == ["0", "1", "1", "1", "2"]
    assert len(set(runs.folders)) == 3


def test_first_trials_of_all_methods_have_the_same_values(
    tmp_path: Path, runs: RecordedRuns
) -> None:
    task = _search_task(tmp_path, {LR: "0.001..0.2:log"})
    variants = [FEDAVG, Variant.parse("fedprox")]

    for variant in variants:
        for index in range(4):
            search_module.run_trial(task, variant, index)

    search = search_module.Search(task, variants)
    points = [[trial.point for trial in search.trials(variant)] for variant in variants]
    assert points[0] == points[1]
    assert len(set(points[0])) == 4


def test_invalid_or_killed_trial_fails_alone(tmp_path: Path, runs: RecordedRuns) -> None:
    task = _search_task(tmp_path, {LR: "0.1..0.2"})
    search = search_module.Search(task, [FEDAVG])
    with pytest.raises(RunFailedError, match=r"^search: fedavg: its process was killed"):
        search._fail(FEDAVG, 0, KILLED)
    _interrupt_trial(task, runs)

    killed = search._fail(FEDAVG, 0, KILLED)
    runs.error = UserError("lr: too large")
    search_module.run_trial(task, FEDAVG, 1)

    first, second = search.trials(FEDAVG)
    assert (first.number, first.state) == (killed, "failed")
    assert first.error == "its process was killed, possibly for lack of memory"
    assert (second.state, second.error) == ("failed", "lr: too large")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_search_goes_on_after_a_killed_trial(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    method = "python:tests.support.failing_methods:Killed"
    space = {"algorithm.is_killed": "true,false"}

    comparison = hetero_fl.compare(CONFIG, method, out=tmp_path, space=space, budget=6, jobs=2)

    with (tmp_path / "search.csv").open(encoding="utf-8") as file:
        states = {(row["algorithm.is_killed"], row["state"]) for row in csv.DictReader(file)}
    assert states == {("true", "failed"), ("false", "complete")}
    (run,) = comparison.runs
    assert run.directory.config()["algorithm"]["is_killed"] is False
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "failed: its process was killed, possibly for lack of memory\n" in log


def test_resumed_trial_reports_the_recorded_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: RecordedRuns
) -> None:
    task = _search_task(tmp_path, {LR: "0.1..0.2"})
    monkeypatch.setattr(search_module, "mean_validation_score", lambda task, record: 0.3)
    _interrupt_trial(task, runs)
    folder = tmp_path / runs.folders[0]
    folder.mkdir()
    lines = [json.dumps({"round": number, "validation": {"a": 1}}) for number in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, ""]))

    study = search_module._open_study(task, FEDAVG)
    search_module._requeue_interrupted(study)
    number = search_module.run_trial(task, FEDAVG, 0)

    assert study.trials[number].intermediate_values == {1: 0.3, 2: 0.3}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": {**CONFIG, "rounds": 4}}, r"\(rounds: was 3, is now 4\)"),
        (
            {"space": {LR: "0.1..0.3"}},
            r"\(space.*: was '?0\.1\.\.0\.2'?, is now '?0\.1\.\.0\.3'?\)",
        ),
        ({"space": {LR: "0.1,0.3"}}, "has other settings"),
        (
            {"seeds": [0, 1]},
            "seeds: 1 is the seed of the search in .*; remove it or choose another",
        ),
    ],
)
def test_search_is_not_continued_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str
) -> None:
    pytest.importorskip("optuna")

    monkeypatch.setattr(search_module.Search, "_next", Mock(side_effect=RunFailedError("stopped")))
    arguments = {"config": CONFIG, "seeds": [0], "space": {LR: "0.1..0.2"}}
    for given in (arguments, {**arguments, "seeds": [0, 2]}):
        with pytest.raises(RunFailedError, match="stopped"):
            _compare_with(tmp_path, given)

    with pytest.raises(UserError, match=message):
        _compare_with(tmp_path, {**arguments, **changed})


def _compare_with(out: Path, arguments: dict[str, Any]) -> None:
    given = dict(arguments)
    hetero_fl.compare(given.pop("config"), "fedavg", given.pop("seeds"), out=out, jobs=1, **given)


def test_methods_without_a_complete_trial_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")

    def best(self: object, variant: Variant) -> Trial:
        if variant.label == "local":
            raise RunFailedError("search: no trial of local is complete: diverged")
        return Trial(variant, 0, (f"{LR}=0.1",), "complete", 0.5, 3, 1.0, "")

    monkeypatch.setattr(search_module.Search, "run", lambda *arguments: None)
    monkeypatch.setattr(search_module.Search, "best", best)

    with pytest.raises(RunFailedError, match=r"^search: no trial of local is complete: diverged$"):
        hetero_fl.compare(
            {**CONFIG, "rounds": 1},
            "local,fedavg",
            out=tmp_path,
            space={LR: "0.1..0.2"},
            jobs=1,
        )

    text = (tmp_path / "comparison.md").read_text()
    assert "FedAvg" in text and "no trial of local is complete: diverged" in text
