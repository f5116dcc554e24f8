"""Readers for the files of loggers, and a stand-in for the client of MLflow."""

from __future__ import annotations

import struct
import time
import types
from pathlib import Path
from typing import Any

BLOCK = 32768
HEADER = struct.Struct("<IHB")
FULL = 1
LAST = 4


def read_finished_wandb_run(path: Path, seconds: float = 30) -> list[Any]:
    """Return the records in a `.wandb` file when the file is complete.

    The process that writes the file may end a little later than the run.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        records = read_wandb_records(path)
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} is not complete")


def read_wandb_records(path: Path) -> list[Any]:
    """Return the records in a `.wandb` file, which has the format of a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    if not content:
        return []
    assert content[:4] == b":W&B"
    records = []
    position = 7
    parts: list[bytes] = []
    while position + HEADER.size <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER.size:
            position += left
            continue
        _checksum, length, kind = HEADER.unpack_from(content, position)
        position += HEADER.size
        parts.append(content[position : position + length])
        position += length
        # A record that is being written is incomplete.
        if kind in (FULL, LAST) and position <= len(content):
            record = Record()
            record.ParseFromString(b"".join(parts))
            records.append(record)
            parts = []
    return records


class MlflowStandIn(types.ModuleType):
    """A stand-in for the module `mlflow` with the parts of its client that the logger uses."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: dict[str, dict[str, Any]] = {}
        self.experiments: dict[str, str] = {}
        self.uris: list[str | None] = []
        self.is_reachable = True
        self.entities = types.ModuleType("mlflow.entities")
        self.exceptions = types.ModuleType("mlflow.exceptions")
        self.entities.Metric = self.entities.Param = lambda *fields: fields
        self.exceptions.MlflowException = type("MlflowException", (Exception,), {})

    def modules(self) -> dict[str, types.ModuleType]:
        """Return the modules to place in `sys.modules`."""
        return {
            "mlflow": self,
            "mlflow.entities": self.entities,
            "mlflow.exceptions": self.exceptions,
        }

    def MlflowClient(self, tracking_uri: str | None) -> MlflowStandIn:  # noqa: N802
        self.uris.append(tracking_uri)
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        found = self.experiments.get(name)
        return None if found is None else types.SimpleNamespace(experiment_id=found)

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def create_run(self, experiment_id: str, run_name: str, tags: dict[str, str]) -> Any:
        run_id = f"run{len(self.runs)}"
        self.runs[run_id] = {
            "experiment": experiment_id,
            "name": run_name,
            "tags": tags,
            "status": "RUNNING",
            "metrics": [],
            "params": {},
            "artifacts": [],
        }
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status

    def set_terminated(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        if not self.is_reachable:
            raise self.exceptions.MlflowException("connection refused")
        assert len(params) <= 100
        self.runs[run_id]["metrics"] += metrics
        self.runs[run_id]["params"] |= dict(params)

    def log_artifact(self, run_id: str, path: str) -> None:
        assert Path(path).exists()
        self.runs[run_id]["artifacts"].append(Path(path).name)
