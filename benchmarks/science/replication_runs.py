"""The runs of the benchmark `replication`, and the record of their scores.

Runs take hours and remain on the machine that executed them. The scores are recorded in a file of
the repository, so that the replication can be continued on another machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.science.published import FILE, Row, Table
from hetero_fl.reporting.run_directory import RunDirectory

# Scores of runs, keyed by `Job.key`.
Record = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Job:
    """A run, which is given by a row of a table and a seed.

    Attributes:
        table: The table.
        row: The row of the table.
        seed: Seed of the run.
        out: Folder that contains the run directories of all tables.
        record: Scores of earlier runs.
    """

    table: Table
    row: Row
    seed: int
    out: Path
    record: Record = field(default_factory=dict, compare=False, repr=False)

    @property
    def path(self) -> Path:
        """The run directory."""
        name = "".join(c if c.isalnum() or c == "." else "_" for c in self.row.method)
        return self.out / self.table.name / f"{name}-seed{self.seed}"

    @property
    def finished(self) -> bool:
        """Whether the scores exist in the record or in the run directory."""
        return self.key in self.record or RunDirectory(self.path).finished

    @property
    def key(self) -> str:
        """Key of the run in the record."""
        return f"{self.table.name}: {self.row.method}, seed {self.seed}"

    @property
    def figures(self) -> dict[str, float]:
        """Scores in percent, and duration in minutes.

        If the run is not in the record, the scores are read from the run directory and added to the
        record.
        """
        if self.key not in self.record:
            run = RunDirectory(self.path)
            summary = run.summary()
            scores = summary[self.table.accuracy]
            shares = {
                "last": scores["last"]["accuracy"],
                "selected": scores["best_by_validation"]["accuracy"],
                self.table.third_figure: (
                    accuracy_held(run.details())
                    if self.table.held
                    else best_test_round(run.metrics(), self.table.accuracy)
                ),
            }
            self.record[self.key] = {
                "seed": self.seed,
                **{name: round(100 * share, 2) for name, share in shares.items()},
                "minutes": round(summary["seconds"]["total"] / 60, 1),
            }
        return self.record[self.key]

    def overrides(self, data: Path) -> list[str]:
        """Return the overrides of the table's configuration for this run.

        Args:
            data: Folder of the data files.
        """
        file = str(data / self.table.file)
        return [
            f"data.path={file}",
            f"seed={self.seed}",
            *(c.replace(FILE, file) for c in self.row.changes),
        ]


def jobs_of(
    tables: Sequence[Table],
    seeds: Sequence[int] | None,
    only: str,
    out: Path,
    record: Record | None = None,
) -> list[Job]:
    """Return the runs of tables, ordered by table and seed.

    Args:
        tables: The tables.
        seeds: Seeds. If None, the default seeds of each table are used.
        only: Text that the method of a row must contain, regardless of case.
        out: Folder of the run directories.
        record: Scores of earlier runs. If None, there are none.
    """
    jobs, known = [], {} if record is None else record
    for table in tables:
        chosen = table.seeds if seeds is None else seeds
        rows = [row for row in table.rows if only.lower() in row.method.lower()]
        jobs += [
            Job(table, row, s, out, known)
            for i, s in enumerate(chosen)
            for row in rows
            if i < (row.seeds or i + 1)
        ]
    return jobs


def read_record(path: Path) -> Record:
    """Read the scores of earlier runs. The result is empty if the file does not exist."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def write_record(path: Path, jobs: Sequence[Job]) -> None:
    """Add the scores of finished runs to a record file."""
    known = read_record(path) | {job.key: job.figures for job in jobs if job.finished}
    path.write_text(
        json.dumps(dict(sorted(known.items())), indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )


def estimate(jobs: Sequence[Job]) -> str:
    """Describe the number of missing runs and the estimated duration for each table.

    The estimate is based on finished runs of the same row, or else on `Row.minutes`.
    """
    lines = []
    for table in dict.fromkeys(job.table for job in jobs):
        mine = [job for job in jobs if job.table is table]
        took = {j.row: j.figures.get("minutes") for j in mine if j.finished}
        left = [job for job in mine if not job.finished]
        minutes = sum(took.get(job.row) or job.row.minutes for job in left)
        lines.append(
            f"{table.name}: {len(left)} of {len(mine)} runs to do, about {minutes:.0f} minutes"
        )
    return "\n".join(lines)


def accuracy_held(details: Mapping[str, Any]) -> float:
    """Return the accuracy of client models on global test images of their classes.

    Args:
        details: The file `details.json` of a run.
    """
    rows = [
        (label, details["confusion"][client]["global"][label])
        for client, counts in details["label_counts"].items()
        for label, count in enumerate(counts)
        if count
    ]
    return float(sum(row[label] for label, row in rows) / sum(sum(row) for _, row in rows))


def best_test_round(records: Sequence[Mapping[str, Any]], test: str) -> float:
    """Return the best test accuracy over all rounds, as reported in some papers.

    Args:
        records: The lines of `metrics.jsonl`.
        test: "personal", "global" or "server".
    """
    return float(max(record[test]["accuracy"] for record in records if record.get(test)))
