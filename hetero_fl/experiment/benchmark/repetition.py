"""Repeat archived runs of a benchmark, and compare the scores."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from hetero_fl.config.load import read_config_file
from hetero_fl.experiment.benchmark.archive import PUBLISHED, RunArchive, archive_folder
from hetero_fl.experiment.benchmark.protocol import Benchmark
from hetero_fl.experiment.benchmark.results import METRICS
from hetero_fl.experiment.comparison.jobs import ComparisonJob, run_folder, run_jobs
from hetero_fl.reporting.benchmark.tables import score_cell
from hetero_fl.reporting.comparison.report import comparison_row
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.rendering import markdown_table
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import lock_folder
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.environment import available_cores
from hetero_fl.utils.errors import RunFailedError, UserError, check_names
from hetero_fl.utils.processes import exit_if_importing
from hetero_fl.utils.text import pluralize, split_top_level

RepeatedScores = dict[str, dict[int, tuple[float, float]]]
"""The archived and the repeated score of each seed, keyed by column of the archive and seed."""


def repeat_row(
    federation: str,
    row: str,
    folder: str | Path = PUBLISHED,
    *,
    archive: str | Path | None = None,
    out: str | Path = "runs/benchmark",
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    quiet: bool | None = None,
    allow_code: bool | CodePermission = False,
) -> RepeatedScores:
    """Repeat the archived runs of a row with their tuned settings.

    On the machine of the archive, scores are equal. On other processors, sums are rounded
    differently, and scores of single runs differ.

    Args:
        federation: Name of the federation.
        row: Name of the row, such as `fedavg/all`.
        folder: Folder of the benchmark, with `protocol.yaml`.
        archive: Folder of the archive, which is only optional for the published benchmark
            (`docs/benchmark`).
        out: Output folder. The run directories are written to its subfolder `repeated`.
        seeds: Seeds of the runs. If None, all seeds of the protocol.
        overrides: Further changes to the configuration, as `key.path=value`, whose effect is then
            the difference of the scores.
        jobs: Number of runs at a time. If None, one run per core, with one thread each.
        quiet: Whether to hide the progress display. If None, progress is shown in notebooks only.
        allow_code: Whether code that a file refers to may be executed (see
            `hetero_fl.load_config`).

    Returns:
        The archived and the repeated scores.

    Raises:
        UserError: If the federation or the row is unknown, or if the archive lacks a run.
        RunFailedError: If runs have no result.
    """
    exit_if_importing()
    benchmark = Benchmark.load(Path(folder))
    archive = archive_folder(folder, archive)
    benchmark.select([federation])
    rows = {each.name: each for each in benchmark.rows_of(federation)}
    check_names([row], rows, f"{federation}: unknown row")
    method = rows[row]
    archived = {
        int(found["seed"]): found
        for found in RunArchive(archive / f"{federation}.csv").rows.values()
        if (found["method"], found["components"]) == (method.method, method.components)
    }
    chosen = benchmark.protocol.seeds if seeds is None else seeds
    for seed in chosen:
        if seed not in archived:
            raise UserError(f"{federation}: {row}: {archive} has no run with seed {seed}")

    out = Path(out) / "repeated"
    permission = CodePermission.from_argument(allow_code)
    work = []
    for seed in chosen:
        point = (*split_top_level(archived[seed]["settings"], ":"), *overrides)
        run_dir = out / federation / run_folder(method.variant, point, seed)
        work.append(ComparisonJob(method.variant, point, seed, run_dir))
    with lock_folder(out) as lock_notes, Progress(out / "log.txt", quiet) as progress:
        for line in lock_notes:
            progress.log(line)
        failed = run_jobs(
            read_config_file(benchmark.federations[federation].config),
            benchmark.federation_overrides(federation),
            work,
            jobs or available_cores(),
            progress,
            allow_code=permission,
        )
    if failed:
        lines = [f"{job}: {' '.join(error.split())}" for job, error in failed.items()]
        raise RunFailedError("\n".join([f"{pluralize(len(lines), 'run')} failed", *lines]))

    scores: RepeatedScores = {metric: {} for metric in METRICS}
    for job in work:
        repeated = comparison_row(Run(job.out, permission).summary)
        for metric, values in scores.items():
            before, after = archived[job.seed].get(metric), repeated.get(metric)
            if before and after is not None:
                values[job.seed] = float(before), after
    return {metric: values for metric, values in scores.items() if values}


def repetition_table(scores: RepeatedScores) -> str:
    """Format means of archived and repeated scores, and the differences of single runs."""
    lines = []
    for metric, values in scores.items():
        archived, repeated = (
            score_cell({seed: pair[index] for seed, pair in values.items()}, metric)
            for index in (0, 1)
        )
        factor, decimals = (1, 2) if metric.endswith("_loss") else (100, 1)
        differences = [factor * abs(new - old) for old, new in values.values()]
        lines.append(
            [
                METRICS[metric],
                archived,
                repeated,
                f"{statistics.mean(differences):.{decimals}f}",
                f"{max(differences):.{decimals}f}",
            ]
        )
    header = ["Metric", "Archived", "Repeated", "Mean difference of a run", "Largest difference"]
    return markdown_table(header, lines, ("left", *["right"] * 4))
