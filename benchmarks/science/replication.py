#!/usr/bin/env python3
"""Replicate published tables.

    python -m benchmarks replication --data DIR [--tables fedgen,fedproto,…] [--seeds 0,1,2]
                                     [--out DIR]

The folder `--data` contains `mnist.npz` and `cifar10.npz` in the MedMNIST layout (train_images,
train_labels, test_images, test_labels). The command prints an estimate of the duration and executes
the missing runs one at a time. After each run, it writes `replication.md` to `--out` and the scores
to `--record`, a file of the repository. Recorded runs are not repeated, and runs that were killed
continue from their last round. `--only TEXT` selects rows whose method contains the text.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.common import seed_list
from benchmarks.science.published import TABLES
from benchmarks.science.replication_runs import (
    estimate,
    jobs_of,
    read_record,
    write_record,
)
from benchmarks.science.replication_tables import write

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "replication"


def arguments() -> argparse.Namespace:
    """Parse the command line, and exit with an error message if a value is invalid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with mnist.npz and cifar10.npz"
    )
    parser.add_argument(
        "--tables",
        default=",".join(TABLES),
        metavar="A,B,…",
        help=f"some of {', '.join(TABLES)} (all)",
    )
    parser.add_argument(
        "--seeds", type=seed_list, metavar="A,B,…", help="seeds (default 0,1,2; niid: 0)"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="rows whose method contains the text"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/replication"), help="folder of runs and tables"
    )
    parser.add_argument(
        "--record",
        type=Path,
        default=ROOT / "docs" / "results" / "replication.json",
        help="scores of finished runs, to which new ones are added",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="execute no runs, write the tables of finished ones",
    )
    parser.add_argument("--quick", action="store_true", help="two rounds of each run, for tests")
    options = parser.parse_args()
    options.tables = [name.strip() for name in options.tables.split(",")]
    for name in options.tables:
        if name not in TABLES:
            parser.error(f"--tables: found '{name}'; there are {', '.join(TABLES)}")
        if not (options.data / TABLES[name].file).exists():
            parser.error(f"--data: {options.data} has no {TABLES[name].file}")
    return options


def main() -> None:
    """Execute missing runs and write the tables."""
    from hetero_fl import run
    from hetero_fl.utils.errors import RunFailedError

    options = arguments()
    record = {} if options.quick else read_record(options.record)
    jobs = jobs_of(
        [TABLES[name] for name in options.tables], options.seeds, options.only, options.out, record
    )
    print(estimate(jobs), flush=True)
    left = [] if options.report else [job for job in jobs if not job.finished]
    for number, job in enumerate(left, 1):
        started = time.perf_counter()
        overrides = job.overrides(options.data) + (
            ["rounds=2", "evaluation.every=1"] if options.quick else []
        )
        try:
            run(
                CONFIGS / f"{job.table.config}.yaml", out=job.path, resume=True, overrides=overrides
            )
            text = f"{job.figures['last']:.2f} in {time.perf_counter() - started:.0f} s"
        except RunFailedError as error:
            text = f"failed: {error}"
        print(
            f"{number}/{len(left)} {job.table.name}: {job.row.method}, seed {job.seed}: {text}",
            flush=True,
        )
        write(jobs, options.out)
        if not options.quick:
            write_record(options.record, jobs)
    print("\n" + write(jobs, options.out))


if __name__ == "__main__":
    main()
