#!/usr/bin/env python3
"""Check that a federation on Flower and a simulation have bit-identical results.

    python -m benchmarks federation_equal [--configs A B] [--methods hybrid fedavg …] [--secure]
                                          [--rounds 2] [key=value …]

For each configuration and method, the benchmark runs `scripts/train.py`, and `scripts/federate.py`
with a SuperLink and a node process for each client, with one thread each. All model files and the
scores and traffic in both summaries are compared. `--secure` enables secure aggregation, whose sums
do not depend on the random secrets. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import add_quick

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ("personal", "global", "server", "clients", "communication", "rounds_completed", "data")


def carried_out(script: str, config: Path, out: Path, overrides: list[str]) -> float:
    """Execute a script in a new process and return the seconds.

    Args:
        script: Name of the script.
        config: The configuration file.
        out: The run directory.
        overrides: Overrides of the configuration.

    Raises:
        SystemExit: If the script fails.
    """
    started = time.perf_counter()
    command = [
        sys.executable,
        str(ROOT / "scripts" / script),
        "--config",
        str(config),
        "--out",
        str(out),
        *overrides,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script} {config.stem}: {done.stderr.strip().splitlines()[-1]}")
    return time.perf_counter() - started


def differing(one: Path, other: Path) -> list[str]:
    """Return the summary entries and the model files that differ between two runs."""
    a, b = (json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in (one, other))
    found = [part for part in COMPARED if a[part] != b[part]]
    models = {file.name for run in (one, other) for file in (run / "models").glob("*.safetensors")}
    return found + [
        m for m in sorted(models) if content(one / "models" / m) != content(other / "models" / m)
    ]


def content(file: Path) -> bytes:
    """Return the content of a file, or no bytes if the file does not exist."""
    return file.read_bytes() if file.exists() else b""


def main() -> None:
    """Run all comparisons and print one line for each comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", default=["digits_quickstart", "medical_hetero"])
    parser.add_argument("--methods", nargs="+", default=["hybrid", "fedavg", "fedmd", "fedproto"])
    parser.add_argument("--secure", action="store_true", help="use secure aggregation")
    parser.add_argument("--rounds", type=int, default=2)
    add_quick(parser)
    options, overrides = parser.parse_known_args()
    if options.quick:
        options.configs = ["digits_quickstart"]
        options.methods = ["fedavg"]
    quick = [
        f"rounds={options.rounds}",
        "runtime.executor=serial",
        "runtime.threads=1",
        "output.plots=false",
    ]
    secure = ["channel.secure_sum={}"] if options.secure else []
    unequal = 0
    for name in options.configs:
        for method in options.methods:
            with tempfile.TemporaryDirectory() as folder:
                simulation_folder = Path(folder) / "simulation"
                deployed = Path(folder) / "federation"
                changes = [*quick, *secure, *overrides, f"algorithm.name={method}"]
                config = ROOT / "configs" / f"{name}.yaml"
                seconds = [
                    carried_out("train.py", config, simulation_folder, changes),
                    carried_out("federate.py", config, deployed, changes),
                ]
                found = differing(simulation_folder, deployed)
                models = len(list((deployed / "models").glob("*.safetensors")))
            unequal += bool(found)
            text = (
                f"differ: {', '.join(found)}" if found else f"equal, {models} models byte for byte"
            )
            print(f"{name} {method}: {text} ({seconds[0]:.0f} s, {seconds[1]:.0f} s)", flush=True)
    sys.exit(bool(unequal))


if __name__ == "__main__":
    main()
