"""Compare what the working tree computes with what a given commit computes, bit for bit.

    python -m tests.frozen_bits COMMIT [--only PATTERN]

Models, metrics and byte counts of all cases (`cases.py`) are compared. The commit is checked out in
a temporary worktree; its results are cached outside the repository by commit, cases and machine,
because bits differ between machines. The exit status is 0 if nothing differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hetero_fl.utils.environment import processor_name
from tests.frozen_bits.cases import Config, cases
from tests.support.commits import ROOT, checked_out, resolve_commit

RECORD = Path(__file__).with_name("record.py")

Outcomes = dict[str, dict[str, Any]]

# Key in the files of earlier commits, and its name in the working tree.
FORMER_KEY = "/attacks/liars/"  # style: ok (former name)
CURRENT_KEY = "/attacks/malicious/"


def main() -> int:
    """Parse the command line, compare and print; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.frozen_bits", description=__doc__)
    parser.add_argument("commit", help="the commit to compare the working tree with")
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="compare matching cases only"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    options = parser.parse_args()

    selected = {name: config for name, config in cases().items() if fnmatch(name, options.only)}
    commit = resolve_commit(options.commit)
    expected = _outcomes_of_commit(commit, selected, options.jobs)
    actual = _record(ROOT, selected, options.jobs)

    differences = compare(expected, actual)
    for line in differences:
        print(line)
    print(f"{len(selected)} cases, {len(differences)} differ from {commit[:12]}")
    return 1 if differences else 0


def compare(expected: Outcomes, actual: Outcomes) -> list[str]:
    """Return one line per differing case, naming the first place that differs."""
    lines = []
    for name, outcome in actual.items():
        before = {
            place.replace(FORMER_KEY, CURRENT_KEY): value for place, value in expected[name].items()
        }
        if "error" in outcome or "error" in before:
            lines.append(f"{name}: {outcome.get('error') or before['error']}")
        elif outcome != before:
            place = next(p for p in [*before, *outcome] if before.get(p) != outcome.get(p))
            lines.append(f"{name}: {place}: {before.get(place)} became {outcome.get(place)}")
    return lines


def _outcomes_of_commit(commit: str, selected: dict[str, Config], jobs: int) -> Outcomes:
    """Return the commit's outcomes, from the cache where it has them."""
    cache = _cache_file(commit)
    known: Outcomes = json.loads(cache.read_text()) if cache.exists() else {}
    missing = {name: config for name, config in selected.items() if name not in known}
    if missing:
        print(f"recording {len(missing)} cases of {commit[:12]}", flush=True)
        with checked_out(commit) as tree:
            known.update(_record(tree, missing, jobs))
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(known))
    return known


def _cache_file(commit: str) -> Path:
    import torch

    machine = [
        platform.node(),
        platform.python_version(),
        torch.__config__.show(),
        processor_name(),
    ]
    contents = [RECORD.read_text(), RECORD.with_name("cases.py").read_text()]
    key = hashlib.sha256("\n".join([commit, *machine, *contents]).encode()).hexdigest()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "hetero_fl" / "frozen_bits" / f"{key[:32]}.json"


def _record(tree: Path, selected: dict[str, Config], jobs: int) -> Outcomes:
    """Run the cases with the package in `tree`, spread over `jobs` processes."""
    names = list(selected)
    shards = [names[start::jobs] for start in range(jobs) if names[start::jobs]]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(shards)) as pool:
        done = [
            pool.submit(_record_shard, tree, {n: selected[n] for n in shard}, Path(folder) / str(i))
            for i, shard in enumerate(shards)
        ]
        merged = {name: outcome for future in done for name, outcome in future.result().items()}
    return {name: merged[name] for name in names}


def _record_shard(tree: Path, configs: dict[str, Config], folder: Path) -> Outcomes:
    folder.mkdir()
    source = folder / "cases.json"
    target = folder / "outcomes.json"
    source.write_text(json.dumps(configs))
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(RECORD), str(source), str(target)]
    subprocess.run(command, cwd=tree, env=environment, check=True)
    return json.loads(target.read_text())


if __name__ == "__main__":
    sys.exit(main())
