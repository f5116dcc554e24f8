#!/usr/bin/env python3
"""Run a benchmark or a command and archive what it prints, for the pages of the documentation.

    python -m benchmarks record FILE NAME [options]
    python -m benchmarks record FILE hetero-fl COMMAND [options]

The output goes to `docs/results/measurements/FILE.txt`, below the command, the commit and the
machine. `scripts/result_tables.py` copies it to the pages. Changes must be committed first.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from hetero_fl.utils.environment import available_cores, processor_name

ROOT = Path(__file__).parents[1]
MEASUREMENTS = ROOT / "docs" / "results" / "measurements"
COMMAND_LINE = "hetero-fl"


def archivable_commit(name: str = "HEAD", root: Path = ROOT) -> str:
    """Return the abbreviated hash of a commit whose results may be archived.

    Args:
        name: Name or hash of the commit. HEAD stands for the files in the repository, which may
            differ from the commit in archived results only.
        root: Folder of the repository.

    Raises:
        SystemExit: If a file is not committed, or the commit is not in the history of the
            repository.
    """
    git = ["git", "-C", str(root)]
    if name == "HEAD":
        status = [*git, "status", "--porcelain", "--", ".", ":(exclude)docs/results"]
        changed = subprocess.run(status, check=False, capture_output=True, text=True).stdout
        if changed:
            sys.exit(f"{changed.splitlines()[0][3:]}: not committed; commit all changes first")
    if subprocess.run(
        [*git, "merge-base", "--is-ancestor", name, "HEAD"], check=False, capture_output=True
    ).returncode:
        sys.exit(f"commit '{name}' is not in the history of the repository; choose another")
    describe = [*git, "rev-parse", "--short=8", name]
    return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()


def header(command: list[str], commit: str) -> str:
    """Return the lines above an archived output: the command, the commit and the machine.

    Args:
        command: Name and options of the benchmark, or a command of hetero-fl. Of files and absolute
            paths, only the last part is shown.
        commit: Commit of the benchmark.
    """
    shown = [
        Path(part).name if Path(part).is_file() or Path(part).is_absolute() else part
        for part in command
    ]
    machine = f"{available_cores()} cores, {processor_name()}, Python {platform.python_version()}"
    prefix = [] if command[0] == COMMAND_LINE else ["python", "-m", "benchmarks"]
    call = f"$ {shlex.join([*prefix, *shown])}"
    return f"{call}\n# {commit}, {machine}, torch {torch.__version__}\n"


def main() -> None:
    """Run the command and write its output, unless it fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="name of the archived file, without .txt")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="NAME [options]")
    options = parser.parse_args()
    if not options.command:
        parser.error("the name of a benchmark is missing")
    commit = archivable_commit()
    name, *arguments = options.command
    program = ["hetero_fl"] if name == COMMAND_LINE else ["benchmarks", name]
    call = [sys.executable, "-m", *program, *arguments]
    lines = []
    # Tables of the command line are as wide as the pages of the documentation.
    environment = {**os.environ, "COLUMNS": "100"}
    with subprocess.Popen(
        call, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(f"{name} failed; nothing was archived")
    MEASUREMENTS.mkdir(parents=True, exist_ok=True)
    text = header(options.command, commit) + "".join(lines).strip("\n") + "\n"
    (MEASUREMENTS / f"{options.file}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
