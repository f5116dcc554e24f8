"""Tune and compare methods in several federations, and archive each run (docs/benchmark)."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import seed_list
from benchmarks.league.archive import ConfigArchive, RunArchive
from benchmarks.league.protocol import Benchmark, BenchmarkRow
from benchmarks.league.results import METRICS, BenchmarkResults, repetition_table
from benchmarks.league.tuning import choices_of
from hetero_fl.config.load import read_config_file
from hetero_fl.core.task import Task
from hetero_fl.experiment.comparison.jobs import KILLED, Job, Point, run_jobs
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import prepare
from hetero_fl.federation.cost import expected_cost
from hetero_fl.reporting.comparison.report import comparison_row
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import lock_folder
from hetero_fl.reporting.summary import mean_validation_score, validation_score
from hetero_fl.utils.environment import available_cores, processor_name
from hetero_fl.utils.errors import RunFailedError, UserError, check_names
from hetero_fl.utils.text import pluralize, split_top_level
from hetero_fl.utils.version import __version__

FOLDER = Path("configs/benchmark")
"""Folder of the published benchmark, relative to the repository."""
ARCHIVE = Path("docs/benchmark")
"""Folder of its archive."""
VALIDATION_COLUMNS = ("validation_score", "validation_local", "validation_global")
"""Columns with the validation scores after the last round, the first of which is the mean."""

Work = tuple[BenchmarkRow, Point, int]
"""A run: the row, its tuned settings and the seed."""
RepeatedScores = dict[str, dict[int, tuple[float, float]]]
"""The archived and the repeated score of each seed, keyed by column of the archive and seed."""


class League:
    """The runs of a benchmark. Archived runs are not repeated, and interrupted ones are resumed.

    Args:
        folder: Folder with `protocol.yaml` and one file for each federation.
        archive: Folder of the archive: for each federation, `<name>.csv` with the reported runs,
            `<name>_tuning.csv` with the tuning runs and `<name>_configs.json` with the
            configuration of each row; `results.md` with tables and plots of all federations.
        out: Folder of the run directories, which are deleted when their results are archived.
        jobs: Number of runs at a time.
        progress: Progress display.

    Attributes:
        failed: A line for each run without a result.
    """

    def __init__(
        self, folder: Path, archive: Path, out: Path, jobs: int, progress: Progress
    ) -> None:
        self.plan = Benchmark.load(folder)
        self.archive = archive
        self.out = out
        self.jobs = jobs
        self.progress = progress
        self.failed: list[str] = []
        self.commit = _current_commit()

    def run_federation(self, name: str) -> None:
        """Tune the rows of a federation, unless another federation is tuned for it, and run them.

        Raises:
            UserError: If the settings of a row are invalid in this federation.
            RunFailedError: If the process of a trial was killed.
        """
        federation = self.plan.federations[name]
        source = read_config_file(federation.config)
        base = self.plan.federation_overrides(name)
        rows = self.plan.rows_of(name)
        configs = ConfigArchive(self.archive / f"{name}_configs.json")
        current = {}
        for row in rows:
            with _name_row(name, row.name):
                current[row.name] = load_config(source, [*base, *row.variant.overrides])
        configs.update(current)
        if federation.tuned_as is not None:
            self._check_tuned(name, federation.tuned_as)
        if federation.tuned_as is None or federation.retuned:
            self._tune(name, source, configs)
        choices = choices_of(self.plan, name, self.archive)
        seeds = self.plan.protocol.seeds
        points = {row.name: row.overrides(choices[row.name].settings) for row in rows}
        work = [(row, points[row.name], seed) for seed in seeds for row in rows]
        reported = RunArchive(self.archive / f"{name}.csv")
        self._execute(name, source, work, configs, reported, is_tuning=False)
        reported.arrange([_key(*run) for run in work])

    def _check_tuned(self, name: str, tuned_as: str) -> None:
        """Raise UserError if another federation has no tuned settings for a row of this one."""
        others = choices_of(self.plan, tuned_as, self.archive)
        for row in self.plan.rows_of(name):
            if row.name not in others or others[row.name].remaining:
                raise UserError(
                    f"{name}: {row.name} has no tuned settings; "
                    f"run `python -m benchmarks league {tuned_as}`"
                )

    def _tune(self, name: str, source: dict[str, Any], configs: ConfigArchive) -> None:
        """Run trials until the settings of all rows are chosen."""
        trials = RunArchive(self.archive / f"{name}_tuning.csv")
        rows = self.plan.rows_of(name)
        seeds = self.plan.protocol.tuning.seeds
        while True:
            for row in rows:
                _drop_outdated(row, configs, trials)
            choices = choices_of(self.plan, name, self.archive)
            work = [
                (row, point, seed)
                for row in rows
                for seed in seeds
                for point in choices[row.name].remaining
            ]
            if not work:
                return
            self._execute(name, source, work, configs, trials, is_tuning=True)
            if self.failed:
                raise RunFailedError("\n".join(self.failed))

    def _execute(
        self,
        name: str,
        source: dict[str, Any],
        work: Iterable[Work],
        configs: ConfigArchive,
        archive: RunArchive,
        *,
        is_tuning: bool,
    ) -> None:
        """Execute and archive the runs that are not in the archive yet.

        Raises:
            UserError: If the settings of a run are invalid. In this case, no run is started.
        """
        pending: dict[Job, BenchmarkRow] = {}
        for row, point, seed in work:
            found = archive.rows.get(_key(row, point, seed))
            if not found or found["config_hash"] != configs.hash_of(row.name, ":".join(point)):
                pending[Job.in_folder(self.out / name, row.variant, point, seed)] = row
        if not pending:
            return
        base = self.plan.federation_overrides(name)
        # The last override is the seed.
        different = {(row.name, *job.overrides[:-1]) for job, row in pending.items()}
        for row_name, *overrides in sorted(different):
            with _name_row(name, row_name):
                task = prepare(source, [*base, *overrides]).federation.task
        kind = "tuning run" if is_tuning else "reported run"
        self.progress.log(f"{name}: {pluralize(len(pending), kind)}")
        for job, error in run_jobs(source, base, list(pending), self.jobs, self.progress):
            # A trial that fails, usually because training diverges, is archived without a score and
            # not repeated. Killed trials are repeated.
            if error is not None and (error == KILLED or not is_tuning):
                self.failed.append(f"{name}: {job}: {' '.join(error.split())}")
                continue
            row = pending[job]
            settings = ":".join(job.point)
            results: Mapping[str, Any] = dict.fromkeys(VALIDATION_COLUMNS)
            if error is None:
                results = _validation_scores(Run(job.out), task)
            if not is_tuning:
                results = {**results, **_results(job, source, base, self.jobs)}
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


def _results(
    job: Job, source: dict[str, Any], base: list[str], parallel_runs: int
) -> dict[str, Any]:
    """Return the archived columns of a finished run: scores and costs."""
    run = Run(job.out)
    row = comparison_row(run.summary)
    prepared = prepare(source, [*base, *job.overrides])
    cost = expected_cost(
        prepared.method,
        prepared.federation,
        prepared.config.rounds,
        prepared.config.clients.per_round,
        prepared.config.evaluation.every,
    )
    scores = {k: v for k, v in row.items() if "_best_" not in k and k not in ("algorithm", "seed")}
    return scores | {
        "client_operations": cost.client_operations.total(),
        "server_operations": cost.server_operations,
        "parallel_runs": parallel_runs,
        "failed_updates": sum(len(record["failed"]) for record in run.metrics),
        "clients": _client_scores(run.summary),
        "torch": torch.__version__,
        "processor": processor_name(),
    }


def _validation_scores(run: Run, task: Task) -> dict[str, float | None]:
    """Return the validation scores of the last evaluation, and their mean."""
    last = next(record for record in reversed(run.metrics) if record.get("validation"))
    values = (
        mean_validation_score(task, last),
        validation_score(task, last, "personal"),
        validation_score(task, last, "global"),
    )
    return dict(zip(VALIDATION_COLUMNS, values, strict=True))


def _client_scores(summary: Mapping[str, Any]) -> str:
    """Return the number of training rows and the local test scores of each client as JSON."""
    scores = {}
    for client in summary["clients"]:
        known = {k: round(v, 4) for k, v in (client["personal"] or {}).items() if v is not None}
        scores[client["id"]] = {"n_train": client["n_train"], **known}
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


def run_league(
    folder: str | Path,
    names: Sequence[str] = (),
    *,
    archive: str | Path,
    out: str | Path = "runs/benchmark",
    jobs: int | None = None,
    quiet: bool | None = None,
) -> None:
    """Tune and run the rows of a benchmark, archive each run, and write the results.

    Args:
        folder: Folder with `protocol.yaml` and one file for each federation.
        names: Names of the federations to run. If empty, all federations are run.
        archive: Folder of the archive (see `League`).
        out: Folder of the run directories and the log.
        jobs: Number of runs at a time. If None, one run per core, with one thread each.
        quiet: Whether to hide the progress display.

    Raises:
        UserError: If a file or a name is invalid, or if the benchmark is already running.
        RunFailedError: If runs have no result. Raised after all other runs have ended.
    """
    out = Path(out)
    with lock_folder(out) as lock_notes, Progress(out / "log.txt", quiet) as progress:
        league = League(Path(folder), Path(archive), out, jobs or available_cores(), progress)
        for line in lock_notes:
            progress.log(line)
        for name in league.plan.select(names):
            league.run_federation(name)
        BenchmarkResults(folder, archive).write()
    if league.failed:
        count = pluralize(len(league.failed), "run")
        raise RunFailedError("\n".join([f"{count} failed", *league.failed]))


def repeat_row(
    federation: str,
    row: str,
    folder: str | Path = FOLDER,
    *,
    archive: str | Path = ARCHIVE,
    out: str | Path = "runs/benchmark",
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    quiet: bool | None = None,
) -> RepeatedScores:
    """Repeat the archived runs of a row with their tuned settings.

    On the machine of the archive, scores are equal. On other processors, sums are rounded
    differently, and scores of single runs differ.

    Args:
        federation: Name of the federation.
        row: Name of the row, such as `fedavg/all`.
        folder: Folder of the benchmark, with `protocol.yaml`.
        archive: Folder of the archive.
        out: Output folder. The run directories are written to its subfolder `repeated`.
        seeds: Seeds of the runs. If None, all seeds of the protocol.
        overrides: Further changes to the configuration, as `key.path=value`, whose effect is then
            the difference of the scores.
        jobs: Number of runs at a time. If None, one run per core, with one thread each.
        quiet: Whether to hide the progress display.

    Returns:
        The archived and the repeated scores.

    Raises:
        UserError: If the federation or the row is unknown, or if the archive lacks a run.
        RunFailedError: If runs have no result.
    """
    plan = Benchmark.load(Path(folder))
    plan.select([federation])
    rows = {each.name: each for each in plan.rows_of(federation)}
    check_names([row], rows, f"{federation}: unknown row")
    runs = RunArchive(Path(archive) / f"{federation}.csv").rows
    archived = {int(run["seed"]): run for key, run in runs.items() if "/".join(key[:2]) == row}
    out = Path(out) / "repeated"
    work = []
    for seed in plan.protocol.seeds if seeds is None else seeds:
        if seed not in archived:
            raise UserError(f"{federation}: {row}: {archive} has no run with seed {seed}")
        point = (*split_top_level(archived[seed]["settings"], ":"), *overrides)
        work.append(Job.in_folder(out / federation, rows[row].variant, point, seed))
    source = read_config_file(plan.federations[federation].config)
    base = plan.federation_overrides(federation)
    with lock_folder(out), Progress(out / "log.txt", quiet) as progress:
        ended = dict(run_jobs(source, base, work, jobs or available_cores(), progress))
    failed = [f"{job}: {' '.join(error.split())}" for job, error in ended.items() if error]
    if failed:
        raise RunFailedError("\n".join([f"{pluralize(len(failed), 'run')} failed", *failed]))
    scores: RepeatedScores = {}
    for job in work:
        repeated = comparison_row(Run(job.out).summary)
        for metric in METRICS:
            before = archived[job.seed].get(metric)
            after = repeated.get(metric)
            if before and after is not None:
                scores.setdefault(metric, {})[job.seed] = float(before), after
    return {metric: scores[metric] for metric in METRICS if metric in scores}


def main() -> None:
    """Run the benchmark, or write its results, or repeat a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="federations to run (all)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"protocol ({FOLDER})")
    parser.add_argument("--archive", type=Path, help=f"archived results ({ARCHIVE})")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="unfinished runs")
    parser.add_argument("--jobs", type=int, help="runs at a time (one per core)")
    parser.add_argument("--tables", action="store_true", help="only write results.md and its plots")
    parser.add_argument("--repeat", metavar="ROW", help="repeat a row of one federation")
    parser.add_argument("--seeds", type=seed_list, help="seeds to repeat (all)")
    options = parser.parse_args()
    if options.archive is None and options.folder != FOLDER:
        # The archive of the published benchmark must not be mixed with others.
        parser.error(f"--folder {options.folder}: requires --archive, a folder for its results")
    archive = options.archive or ARCHIVE
    places = {"archive": archive, "out": options.out, "jobs": options.jobs}
    try:
        if options.repeat:
            if len(options.names) != 1:
                parser.error(f"--repeat: expected one federation, got {len(options.names)}")
            name = options.names[0]
            seeds = options.seeds
            print(
                repetition_table(
                    repeat_row(name, options.repeat, options.folder, seeds=seeds, **places)
                )
            )
            return
        if options.tables:
            BenchmarkResults(options.folder, archive).write()
        else:
            run_league(options.folder, options.names, **places)
        print(archive / "results.md")
    except (UserError, RunFailedError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; repeat the command to continue")


def _current_commit() -> str:
    """Return the commit of the package's repository, or the version outside a repository.

    A plus sign marks changes since the commit.
    """
    root = Path(__file__).resolve().parents[2]
    # Without tags, the description is the commit.
    options = ["--always", "--abbrev=8", "--dirty=+", "--exclude=*"]
    command = ["git", "-C", str(root), "describe", *options]
    try:
        found = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return found.stdout.strip()
