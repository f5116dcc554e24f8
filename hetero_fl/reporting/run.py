"""A finished run, from Python: its summary, its models, predictions and pictures."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetero_fl.core.saved_model import SavedModel
from hetero_fl.data.inference import preprocess_inputs
from hetero_fl.reporting.formatting import algorithm_name, format_final_evaluation, population
from hetero_fl.reporting.integrity import CHANGED, inspect
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.serialization import sha256_of
from hetero_fl.utils.text import pluralize


class Run:
    """The directory of a finished run.

    Opening it reads every file but models and checkpoints, of which a model is checked when it is first used.

    Args:
        path: The directory.
        allow_code: Whether code that its files name (`python:package.module:Name`) may run, such as a user's model.

    Raises:
        UserError: There is no run directory at the path, or something in it is missing or damaged.
    """

    def __init__(self, path: str | Path, allow_code: bool | CodePermission = False) -> None:
        self.directory = RunDirectory.open(path)
        inspect(path, thorough=False).require_whole()
        self.permission = CodePermission.from_argument(allow_code)

    @classmethod
    def open(cls, run: Run | str | Path, allow_code: bool | CodePermission = False) -> Run:
        """Return the run at a path; for a `Run`, itself, or with `allow_code` another one with that permission."""
        if isinstance(run, Run) and (not allow_code or run.permission is allow_code):
            return run
        return cls(run.path if isinstance(run, Run) else run, allow_code)

    def __repr__(self) -> str:
        if not (self.path / "summary.json").exists():
            return f"Run({str(self.path)!r}: not finished)"
        summary = self.summary
        details = self.directory.details()
        done = pluralize(summary["rounds_completed"], "round")
        about = f"{algorithm_name(summary['algorithm'])} on {summary['data']['name']}, {done}"
        return "\n".join(
            [
                f"Run({str(self.path)!r}: {about}, {pluralize(population(summary, details), 'client')}, seed {summary['seed']};",
                f"    {format_final_evaluation(summary, details.get('unit', ''))})",
            ]
        )

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.directory.path

    @cached_property
    def summary(self) -> dict[str, Any]:
        """`summary.json`."""
        return self.directory.summary()

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, one a round."""
        return self.directory.metrics()

    @cached_property
    def models(self) -> dict[str, SavedModel]:
        """The models by client id, and "server" if the server has one."""
        files = self.directory.model_files()
        if not files:
            over = (self.path / "summary.json").exists()
            why = (
                "no site tells its own (tells.model in a site's file)"
                if over
                else "the run has not finished"
            )
            raise UserError(f"{self.path}: holds no models; {why}")
        sums = self.directory.checksums()
        for name in (f"models/{f.name}" for f in files):
            if name in sums and sha256_of(self.path / name) != sums[name]:
                raise UserError(f"{self.path / name}: {CHANGED}")
        return {f.stem: SavedModel.load(f, self.permission) for f in files}

    def predict(self, client: str, x: Any, personal: bool = True, unit: Any = None) -> Tensor:
        """Probabilities `[N, outputs]` (regression: values) of a client's model for raw examples.

        `x`: images `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` as uint8 or as floats in 0..1 (0..255 where that is
        plain), tables `[N, F]`, series `[N, T, F]`; a data frame, whose columns are found by their names; a dictionary of
        blocks, from which one may be absent if the model knows what to do then. They are preprocessed as that client does.
        `personal`: read with the client's own label frequencies, as on its own patients. `unit`: of a regression whose targets are
        relative to something, what each row's are relative to (`[N]` or a number): values are then in the target's unit.
        Raises UserError for examples that the model cannot take.
        """
        if client not in self.models:
            raise UserError(
                f"{self.path}: found no model of '{client}'{suggest_or_list(client, self.models)}"
            )
        model = self.models[client]
        z = model.logits(preprocess_inputs(model, x), personal)
        if model.task.kind == "regression":
            return z if unit is None else z * torch.as_tensor(unit, dtype=z.dtype).reshape(-1, 1)
        return z.sigmoid() if model.task.kind == "multilabel" else z.softmax(-1)

    def plot(self) -> list[Path]:
        """Draw the pictures (again); returns their paths."""
        from hetero_fl.reporting.plots import write_plots

        return write_plots(self.path)
