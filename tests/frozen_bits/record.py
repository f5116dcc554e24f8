"""Run configurations with the package on the import path and write what they computed as JSON.

    python record.py CASES.json RESULTS.json

The script is executed with `PYTHONPATH` set to the tree under test, so it imports nothing but the
public interface of `hetero_fl`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Outcome = dict[str, Any]


def record(config: dict[str, Any]) -> Outcome:
    """Run one configuration and return its results, flattened: place in the run to value or hash.

    Seconds are left out.
    """
    import hetero_fl

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        hetero_fl.run(config, out=out)
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = _models(out)
        found.update(_flat([json.loads(line) for line in lines], "metrics.jsonl"))
        found.update(_flat(json.loads((out / "summary.json").read_text()), "summary.json"))
        return found


def _models(out: Path) -> Outcome:
    from safetensors.torch import load_file

    hashes = {}
    for file in sorted((out / "models").glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            described = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
            content = tensor.contiguous().flatten().view(-1).numpy().tobytes()
            hashes[f"models/{file.stem}/{name}"] = hashlib.sha256(described + content).hexdigest()
    return hashes


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings and lists with their paths, without seconds."""
    if isinstance(value, Mapping):
        for key, nested in value.items():
            if not str(key).startswith("seconds"):
                yield from _flat(nested, f"{path}/{key}")
    elif isinstance(value, list):
        for index, nested in enumerate(value):
            yield from _flat(nested, f"{path}/{index}")
    else:
        yield path, repr(value)


def main(source: str, target: str) -> None:
    """Record the configurations in the file `source` and write `target` after each one."""
    configs = json.loads(Path(source).read_text(encoding="utf-8"))
    outcomes: dict[str, Outcome] = {}
    for name, config in configs.items():
        started = time.monotonic()
        try:
            outcomes[name] = record(config)
        except Exception:
            outcomes[name] = {"error": traceback.format_exc()}
        print(f"{time.monotonic() - started:6.1f} s  {name}", flush=True)
        Path(target).write_text(json.dumps(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
