#!/usr/bin/env python3
"""Published tables, repeated: what the papers say, and what comes out here.

    python benchmarks/replication.py --data DIR [--tables fedgen,fedproto,niid,ordering] [--seeds 0,1,2] [--out DIR]

DIR holds `mnist.npz` and `cifar10.npz` in the MedMNIST layout (train_images, train_labels, test_images, test_labels). Prints how
long it will take, carries out what has not finished, one run at a time, and writes `replication.md` in --out after each. A run
that was killed goes on from its last round when the command is given again. `--only TEXT` keeps rows whose method contains it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from published import FILE, TABLES, Row, Table

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "replication"


@dataclass(frozen=True)
class Job:
    """One run: a row of a table with a seed."""

    table: Table
    row: Row
    seed: int
    out: Path

    @property
    def path(self) -> Path:
        """Its run directory."""
        name = "".join(c if c.isalnum() or c == "." else "_" for c in self.row.method)
        return self.out / self.table.name / f"{name}-seed{self.seed}"

    @property
    def finished(self) -> bool:
        """Whether its figures are there."""
        return (self.path / "summary.json").exists()

    def overrides(self, data: Path) -> list[str]:
        """What it changes in the table's configuration."""
        file = str(data / self.table.file)
        return [f"data.path={file}", f"seed={self.seed}", *(c.replace(FILE, file) for c in self.row.changes)]

    def read(self, name: str) -> Any:
        """One of the run's JSON files."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))


def jobs_of(tables: Sequence[Table], seeds: Sequence[int] | None, only: str, out: Path) -> list[Job]:
    """All runs, every row with one seed before the next seed."""
    jobs = []
    for table in tables:
        chosen = table.seeds if seeds is None else seeds
        rows = [row for row in table.rows if only.lower() in row.method.lower()]
        jobs += [Job(table, row, s, out) for i, s in enumerate(chosen) for row in rows if i < (row.seeds or i + 1)]
    return jobs


def estimate(jobs: Sequence[Job]) -> str:
    """Lines on how long each table takes: as long as the row took before, where one of its runs has finished."""
    lines = []
    for table in dict.fromkeys(job.table for job in jobs):
        mine = [job for job in jobs if job.table is table]
        took = {j.row: j.read("summary.json")["seconds"]["total"] / 60 for j in mine if j.finished}
        left = [job for job in mine if not job.finished]
        minutes = sum(took.get(job.row, job.row.minutes) for job in left)
        lines.append(f"{table.name}: {len(left)} of {len(mine)} runs to do, about {minutes:.0f} minutes")
    return "\n".join(lines)


# The figures of finished runs, in percent ------------------------------------------------------------------------
def accuracy(job: Job, which: str) -> float:
    """`last` or `best_by_validation`."""
    value = job.read("summary.json")[job.table.accuracy][which]["accuracy"]
    return 100 * float(value)


def accuracy_held(job: Job) -> float:
    """Of all clients' models after the last round, each on the common test images of the classes that its client has."""
    details = job.read("details.json")
    right = total = 0
    for client, counts in details["label_counts"].items():
        for label, count in enumerate(counts):
            if count:
                taken = details["confusion"][client]["global"][label]
                right, total = right + taken[label], total + sum(taken)
    return 100 * right / total


def best_test_round(job: Job) -> float:
    """The best round on test data, as some papers have it; for comparison with those alone."""
    lines = (job.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    read = [
        record[job.table.accuracy]["accuracy"] for record in map(json.loads, lines) if record.get(job.table.accuracy)
    ]
    return 100 * max(read)


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "not run"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def difference(row: Row, ours: Sequence[float]) -> str:
    """Ours minus theirs, and whether that is within two standard deviations: the paper's, or ours where it gives none."""
    if row.mean is None or not ours:
        return ""
    apart = statistics.mean(ours) - row.mean
    deviation = row.deviation or (statistics.stdev(ours) if len(ours) > 1 else None)
    if deviation is None:
        return f"{apart:+.2f}"
    return f"{apart:+.2f} ({'within' if abs(apart) <= 2 * deviation else 'outside'} 2σ)"


def given(mean: float | None, deviation: float | None) -> str:
    """A paper's figure."""
    return "" if mean is None else f"{mean:.2f}" + (f" ± {deviation:.2f}" if deviation else "")


def against(row: Row, held: Sequence[float]) -> list[str]:
    """The reading of the authors' code against what was published, and against what the authors had from mended code."""
    mean, deviation = row.mended or (None, None)
    again = replace(row, mean=mean, deviation=deviation)
    return [difference(row, held), given(mean, deviation), difference(again, held)]


def table_text(table: Table, jobs: Sequence[Job]) -> str:
    """A table in Markdown, with what differs below it."""
    extra = "classes held, last" if table.held else "best test round"
    head = ["method", "published", "last", "selected", "last − published", extra]
    head += ["held − published", "mended", "held − mended", "seeds"] if table.held else ["seeds"]
    lines = [f"## {table.title}", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in dict.fromkeys(job.row for job in jobs):
        done = [job for job in jobs if job.row == row and job.finished]
        last = [accuracy(job, "last") for job in done]
        published = given(row.mean, row.deviation)
        other = [(accuracy_held if table.held else best_test_round)(job) for job in done]
        cells = [
            row.method,
            published,
            spread(last),
            spread([accuracy(job, "best_by_validation") for job in done]) if done else "",
            difference(row, last),
            spread(other) if done else "",
            *(against(row, other) if table.held else []),
            ", ".join(str(job.seed) for job in done),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "What differs:", "", *(f"- {line}" for line in table.differs), ""])


def write(jobs: Sequence[Job], out: Path) -> str:
    """All tables, to `replication.md` and as text."""
    tables = dict.fromkeys(job.table for job in jobs)
    text = "\n".join(table_text(table, [job for job in jobs if job.table is table]) for table in tables)
    out.mkdir(parents=True, exist_ok=True)
    (out / "replication.md").write_text("# Replication\n\nAccuracy in percent.\n\n" + text, encoding="utf-8")
    return text


def arguments() -> argparse.Namespace:
    """The command line; ends with a line for a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of mnist.npz and cifar10.npz")
    parser.add_argument("--tables", default=",".join(TABLES), metavar="A,B,…", help=f"of {', '.join(TABLES)} (all)")
    parser.add_argument("--seeds", metavar="A,B,…", help="in place of the tables' own (0,1,2; niid: 0)")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose method contains this")
    parser.add_argument("--out", type=Path, default=Path("runs/replication"), help="where runs and tables go")
    parser.add_argument(
        "--report", action="store_true", help="carry out nothing, write the tables of what has finished"
    )
    parser.add_argument("--quick", action="store_true", help="two rounds of each run: to see that it works")
    options = parser.parse_args()
    options.tables = [name.strip() for name in options.tables.split(",")]
    for name in options.tables:
        if name not in TABLES:
            parser.error(f"--tables: found '{name}'; there are {', '.join(TABLES)}")
        if not (options.data / TABLES[name].file).exists():
            parser.error(f"--data: {options.data} has no {TABLES[name].file}")
    try:
        options.seeds = None if options.seeds is None else [int(s) for s in options.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds: found '{options.seeds}'; write whole numbers with commas")
    return options


def main() -> None:
    """Carry out what is left, and write the tables."""
    from hetero_fl import run
    from hetero_fl.errors import RunFailed

    options = arguments()
    jobs = jobs_of([TABLES[name] for name in options.tables], options.seeds, options.only, options.out)
    print(estimate(jobs), flush=True)
    left = [] if options.report else [job for job in jobs if not job.finished]
    for number, job in enumerate(left, 1):
        begun = time.perf_counter()
        overrides = job.overrides(options.data) + (["rounds=2", "evaluation.every=1"] if options.quick else [])
        try:
            run(CONFIGS / f"{job.table.config}.yaml", out=job.path, resume=True, overrides=overrides)
            told = f"{accuracy(job, 'last'):.2f} in {time.perf_counter() - begun:.0f} s"
        except RunFailed as error:
            told = f"failed: {error}"
        print(f"{number}/{len(left)} {job.table.name}: {job.row.method}, seed {job.seed}: {told}", flush=True)
        write(jobs, options.out)
    print("\n" + write(jobs, options.out))


if __name__ == "__main__":
    main()
