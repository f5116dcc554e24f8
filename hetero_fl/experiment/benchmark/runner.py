"""Tune, run and archive a benchmark."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hetero_fl.config.load import read_config_file
from hetero_fl.core.task import Task
from hetero_fl.experiment.benchmark.archive import (
    PUBLISHED,
    ConfigArchive,
    RunArchive,
    archive_folder,
)
from hetero_fl.experiment.benchmark.protocol import Benchmark, BenchmarkRow
from hetero_fl.experiment.benchmark.results import BenchmarkResults
from hetero_fl.experiment.benchmark.tuning import Trial, choices_of
from hetero_fl.experiment.comparison.jobs import (
    KILLED,
    ComparisonJob,
    last_evaluation,
    run_folder,
    run_jobs,
)
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import prepare
from hetero_fl.federation.cost import expected_cost
from hetero_fl.reporting.comparison.report import comparison_row
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import lock_folder
from hetero_fl.reporting.summary import mean_validation_score, validation_score
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.environment import available_cores, current_commit, processor_name
from hetero_fl.utils.errors import Interrupted, RunFailedError, UserError
from hetero_fl.utils.extras import check_extra
from hetero_fl.utils.processes import exit_if_importing
from hetero_fl.utils.text import pluralize

PAUSE = "pause"
"""Name of the file in the output folder that ends a benchmark after its current runs."""
VALIDATION_COLUMNS = ("validation_score", "validation_local", "validation_global")
"""Columns with the validation scores after the last round, the first of which is the mean."""


def benchmark(
    folder: str | Path = PUBLISHED,
    names: Sequence[str] = (),
    *,
    out: str | Path = "runs/benchmark",
    archive: str | Path | None = None,
    jobs: int | None = None,
    quiet: bool | None = None,
    allow_code: bool | CodePermission = False,
) -> None:
    """Tune and run the rows of a benchmark, and archive each run.

    Archived runs are not repeated, so that a benchmark can be interrupted at any time. The
    directory of a run is deleted when its results have been archived.

    Args:
        folder: Folder with `protocol.yaml` and one file for each federation.
        names: Names of the federations to run. If empty, all federations are run.
        out: Folder of the run directories and the log.
        archive: Folder of the archive, which is only optional for the published benchmark
            (`docs/benchmark`): for each federation, `<name>.csv` with the reported runs,
            `<name>_tuning.csv` with the tuning runs and `<name>_configs.json` with the
            configuration of each row; `results.md` with tables and plots of all federations.
        jobs: Number of runs at a time. If None, one run per core, with one thread each.
        quiet: Whether to hide the progress display. If None, progress is shown in notebooks only.
        allow_code: Whether code that a file refers to may be executed (see
            `hetero_fl.load_config`).

    Raises:
        UserError: If a file or a name is invalid, or if the benchmark is already running.
        RunFailedError: If runs have no result. Raised after all other runs have ended.
        Interrupted: After a `KeyboardInterrupt` or `pause_benchmark`. The benchmark can be
            continued.
    """
    exit_if_importing()
    check_extra("tables", ["pandas", "scipy"], "benchmark")
    plan = Benchmark.load(Path(folder))
    archive = archive_folder(folder, archive)
    out = Path(out)
    with lock_folder(out) as lock_notes, Progress(out / "log.txt", quiet) as progress:
        (out / PAUSE).unlink(missing_ok=True)
        for line in lock_notes:
            progress.log(line)
        runner = _Runner(
            plan,
            out,
            archive,
            jobs=jobs or available_cores(),
            progress=progress,
            permission=CodePermission.from_argument(allow_code),
        )
        try:
            for name in plan.select(names):
                runner.run_federation(name)
        except KeyboardInterrupt as stop:
            raise Interrupted(out) from stop
        BenchmarkResults(folder, archive).write()
    if runner.failed:
        count = len(runner.failed)
        raise RunFailedError("\n".join([f"{pluralize(count, 'run')} failed", *runner.failed]))


def pause_benchmark(out: str | Path = "runs/benchmark") -> None:
    """Make a running benchmark end after its current runs, and wait until it has ended.

    Args:
        out: Output folder of the benchmark.

    Raises:
        UserError: If the folder does not exist.
    """
    out = Path(out)
    if not out.is_dir():
        raise UserError(f"{out}: folder not found; choose the output folder of a benchmark")
    (out / PAUSE).touch()
    while True:
        try:
            with lock_folder(out):
                return
        except UserError:
            time.sleep(0.2)


@dataclass(frozen=True)
class _Source:
    """A federation and its configuration.

    Attributes:
        name: Name of the federation.
        config: Content of the configuration file.
        overrides: Overrides for all runs.
        rows: The rows that are run.
        task: Task of the federation.
    """

    name: str
    config: dict[str, Any]
    overrides: list[str]
    rows: list[BenchmarkRow]
    task: Task


class _Runner:
    """The runs of a benchmark.

    Args:
        plan: The benchmark.
        out: Folder of the run directories.
        archive: Folder of the archive.
        jobs: Number of runs at a time.
        progress: Progress display.
        permission: The code that may be executed.

    Attributes:
        failed: A line for each run without a result.
    """

    def __init__(
        self,
        plan: Benchmark,
        out: Path,
        archive: Path,
        *,
        jobs: int,
        progress: Progress,
        permission: CodePermission,
    ) -> None:
        self.plan = plan
        self.out = out
        self.archive = archive
        self.jobs = jobs
        self.progress = progress
        self.permission = permission
        self.failed: list[str] = []
        self.commit = current_commit()

    def run_federation(self, name: str) -> None:
        """Tune the rows of a federation, unless another federation is tuned for it, and run them.

        Raises:
            UserError: If the settings of a row are invalid in this federation.
            KeyboardInterrupt: If the benchmark is paused.
        """
        source = self._source(name)
        configs = ConfigArchive(self.archive / f"{name}_configs.json")
        current = {}
        for row in source.rows:
            with _name_row(name, row.name):
                overrides = [*source.overrides, *row.variant.overrides]
                current[row.name] = load_config(source.config, overrides, self.permission)
        configs.update(current)
        federation = self.plan.federations[name]
        if federation.tuned_as is not None:
            self._check_tuned(name, federation.tuned_as)
        if federation.tuned_as is None or federation.retuned:
            self._tune(source, configs)
        choices = choices_of(self.plan, name, self.archive)
        work = [
            (row, choices[row.name].settings, seed)
            for seed in self.plan.protocol.seeds
            for row in source.rows
        ]
        reported = RunArchive(self.archive / f"{name}.csv")
        self._execute(source, work, configs, reported, is_tuning=False)
        reported.arrange([_key(row, row.overrides(s), seed) for row, s, seed in work])

    def _source(self, name: str) -> _Source:
        config = read_config_file(self.plan.federations[name].config)
        overrides = self.plan.federation_overrides(name)
        task = prepare(config, overrides, allow_code=self.permission).federation.task
        return _Source(name, config, overrides, self.plan.rows_of(name), task)

    def _check_tuned(self, name: str, tuned_as: str) -> None:
        """Raise UserError if another federation has no tuned settings for a row of this one."""
        others = choices_of(self.plan, tuned_as, self.archive)
        for row in self.plan.rows_of(name):
            if row.name not in others or others[row.name].remaining:
                raise UserError(
                    f"{name}: {row.name} has no tuned settings; "
                    f"run `hetero-fl benchmark {tuned_as}`"
                )

    def _tune(self, source: _Source, configs: ConfigArchive) -> None:
        """Run trials until the settings of all rows are chosen.

        Raises:
            RunFailedError: If the process of a trial was killed.
        """
        trials = RunArchive(self.archive / f"{source.name}_tuning.csv")
        seeds = self.plan.protocol.tuning.seeds
        while True:
            for row in source.rows:
                _drop_outdated(row, configs, trials)
            choices = choices_of(self.plan, source.name, self.archive)
            work = [
                (row, trial, seed)
                for row in source.rows
                for seed in seeds
                for trial in choices[row.name].remaining
            ]
            if not work:
                return
            self._execute(source, work, configs, trials, is_tuning=True)
            if self.failed:
                raise RunFailedError("\n".join(self.failed))

    def _execute(
        self,
        source: _Source,
        work: Iterable[tuple[BenchmarkRow, Trial, int]],
        configs: ConfigArchive,
        archive: RunArchive,
        *,
        is_tuning: bool,
    ) -> None:
        """Execute and archive the runs that are not in the archive yet.

        Raises:
            UserError: If the settings of a run are invalid. In this case, no run is started.
            KeyboardInterrupt: If the benchmark is paused.
        """
        pending: dict[ComparisonJob, BenchmarkRow] = {}
        for row, trial, seed in work:
            point = row.overrides(trial)
            found = archive.rows.get(_key(row, point, seed))
            if found and found["config_hash"] == configs.hash_of(row.name, ":".join(point)):
                continue
            run_dir = self.out / source.name / run_folder(row.variant, point, seed)
            pending[ComparisonJob(row.variant, point, seed, run_dir)] = row
        if not pending:
            return
        self._check(source, pending)
        kind = "tuning run" if is_tuning else "reported run"
        self.progress.log(f"{source.name}: {pluralize(len(pending), kind)}")

        def archive_run(job: ComparisonJob, error: str | None) -> None:
            # A trial that fails, usually because training diverges, is archived without a score and
            # not repeated. Killed trials are repeated.
            if error is not None and (error == KILLED or not is_tuning):
                self.failed.append(f"{source.name}: {job}: {' '.join(error.split())}")
                return
            row = pending[job]
            settings = ":".join(job.point)
            if error is not None:
                results = dict.fromkeys(VALIDATION_COLUMNS)
            else:
                results = _validation_scores(Run(job.out, self.permission), source.task)
            if not is_tuning:
                results |= self._results(source, job)
            archive.add(
                {
                    "method": row.method,
                    "components": row.components,
                    "settings": settings,
                    "seed": job.seed,
                    **results,
                    "commit": self.commit,
                    "config_hash": configs.hash_of(row.name, settings),
                }
            )
            shutil.rmtree(job.out, ignore_errors=True)

        run_jobs(
            source.config,
            source.overrides,
            list(pending),
            self.jobs,
            self.progress,
            allow_code=self.permission,
            on_end=archive_run,
            should_stop=(self.out / PAUSE).exists,
        )
        if (self.out / PAUSE).exists():
            raise KeyboardInterrupt

    def _check(self, source: _Source, pending: Mapping[ComparisonJob, BenchmarkRow]) -> None:
        """Raise UserError if the settings of a run are invalid."""
        # The last override is the seed.
        settings = {(row.name, *job.overrides[:-1]) for job, row in pending.items()}
        for row, *overrides in sorted(settings):
            with _name_row(source.name, row):
                prepare(source.config, [*source.overrides, *overrides], allow_code=self.permission)

    def _results(self, source: _Source, job: ComparisonJob) -> dict[str, Any]:
        """Return the archived columns of a finished run: scores and costs."""
        run = Run(job.out, self.permission)
        row = comparison_row(run.summary)
        scores = {k: v for k, v in row.items() if "_best_" not in k}
        for key in ("algorithm", "seed"):
            del scores[key]
        prepared = prepare(
            source.config, [*source.overrides, *job.overrides], allow_code=self.permission
        )
        cost = expected_cost(
            prepared.method,
            prepared.federation,
            prepared.config.rounds,
            prepared.config.clients.per_round,
            prepared.config.evaluation.every,
        )
        return scores | {
            "client_operations": cost.client_operations.total(),
            "server_operations": cost.server_operations,
            "parallel_runs": self.jobs,
            "failed_updates": sum(len(record["failed"]) for record in run.metrics),
            "clients": _client_scores(run.summary),
            "torch": torch.__version__,
            "processor": processor_name(),
        }


def _validation_scores(run: Run, task: Task) -> dict[str, float | None]:
    """Return the validation scores of the last evaluation, and their mean."""
    last = last_evaluation(run)
    values = (
        mean_validation_score(task, last),
        validation_score(task, last, "personal"),
        validation_score(task, last, "global"),
    )
    return dict(zip(VALIDATION_COLUMNS, values, strict=True))


def _client_scores(summary: Mapping[str, Any]) -> str:
    """Return the number of training rows and the local test scores of each client as JSON."""
    scores = {
        client["id"]: {
            "n_train": client["n_train"],
            **{
                metric: round(value, 4)
                for metric, value in (client["personal"] or {}).items()
                if value is not None
            },
        }
        for client in summary["clients"]
    }
    return json.dumps(scores, separators=(",", ":"))


@contextmanager
def _name_row(federation: str, row: str) -> Iterator[None]:
    """Add the names of a federation and a row to the message of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{federation}: {row}: {error}") from None


def _drop_outdated(row: BenchmarkRow, configs: ConfigArchive, trials: RunArchive) -> None:
    """Remove the trials of a row that had another configuration."""
    outdated = {
        key
        for key, found in trials.rows.items()
        if key[:2] == (row.method, row.components)
        and found["config_hash"] != configs.hash_of(row.name, found["settings"])
    }
    if outdated:
        trials.arrange([key for key in trials.rows if key not in outdated])


def _key(row: BenchmarkRow, point: Sequence[str], seed: int) -> tuple[str, ...]:
    return row.method, row.components, ":".join(point), str(seed)
