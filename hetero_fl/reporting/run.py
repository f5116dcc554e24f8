"""Read a finished run from Python: summary, models, predictions and plots."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hetero_fl.core.saved_model import SavedModel
from hetero_fl.data.inference import preprocess_inputs
from hetero_fl.data.sources.objects import is_frame
from hetero_fl.reporting.formatting import (
    TEST_NAMES,
    algorithm_name,
    format_final_evaluation,
    format_metric,
    metric_name,
    population,
)
from hetero_fl.reporting.integrity import CHANGED, refuse_damaged, verify
from hetero_fl.reporting.notebook import Picture, html_table
from hetero_fl.reporting.run_directory import BEST_MODELS, RunDirectory, check_vacant
from hetero_fl.reporting.shown_metrics import is_metric
from hetero_fl.utils.code_permission import (
    AllowCode,
    also_allow,
    check_code,
    code_reference,
    find_references,
)
from hetero_fl.utils.errors import ArgumentError, UserError, suggest_or_list
from hetero_fl.utils.extras import check_extra
from hetero_fl.utils.objects import get_object
from hetero_fl.utils.serialization import sha256_of
from hetero_fl.utils.text import pluralize

if TYPE_CHECKING:
    import pandas as pd

TESTS = ("global", "personal")


class Run:
    """A run in a run directory.

    The constructor verifies the checksums of the text files. The models are read and verified on
    first use.

    Args:
        path: The run directory.
        allow_code: Whether code that the files reference (`python:package.module:Name`) may be
            executed, such as a user-defined model class.
        models: Modules, or classes or functions that create modules, keyed by client id. Required
            after a restart for models that were passed as modules. A module is used for all models
            of the run with its architecture.

    Attributes:
        directory: The files of the run.
        permission: The code that may run when models are loaded.
        selection: `personal` or `global` if the models are those of the round with the best local
            or global validation score (see `best`). Empty for the last models.

    Raises:
        UserError: If the path is not a run directory, or a file is missing or damaged.

    Example:
        >>> import hetero_fl
        >>> import numpy as np
        >>> config = {
        ...     "name": "digits",
        ...     "data": {"name": "digits"},
        ...     "algorithm": {"name": "fedavg"},
        ...     "clients": {"count": 2, "defaults": {"model": "mlp"}},
        ...     "rounds": 1,
        ...     "output": {"plots": False, "report": False},
        ... }
        >>> path = hetero_fl.run(config, out="runs/digits").path
        >>> run = hetero_fl.Run.open(path)
        >>> run.summary["rounds_completed"], run.metrics[-1]["round"]
        (1, 1)
        >>> list(run.models)
        ['client_1', 'client_2', 'server']
        >>> images = np.zeros((3, 8, 8), dtype=np.uint8)
        >>> run.predict("client_1", images).shape
        (3, 10)
        >>> [path.name for path in run.plot()][:3]
        ['curves.png', 'clients.png', 'labels.png']
    """

    def __init__(
        self,
        path: str | Path,
        allow_code: AllowCode = False,
        models: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = RunDirectory.open(path)
        refuse_damaged(path, verify(path, models=False))
        self.permission = allow_code
        self.selection = ""
        self._loaded: dict[str, SavedModel] = {}
        self._kept: list[object] = []
        if not isinstance(models, Mapping | None):
            found = type(models).__name__
            raise ArgumentError(f"models: expected modules keyed by client id, got {found}")
        if models:
            # The classes of these modules have been imported.
            self.permission = also_allow(allow_code, map(code_reference, models.values()))
        for name, model in (models or {}).items():
            self._restore_object(name, model)

    def keep(self, *objects: object) -> None:
        """Keep objects, such as user-defined model classes, alive as long as this instance."""
        self._kept.extend(objects)

    @classmethod
    def load(
        cls,
        path: str | Path,
        allow_code: AllowCode = False,
        models: Mapping[str, Any] | None = None,
    ) -> Run:
        """Return the run in a directory, as the constructor does."""
        return cls(path, allow_code, models)

    @classmethod
    def open(cls, run: Run | str | Path, allow_code: AllowCode = False) -> Run:
        """Return the run at a path.

        Args:
            run: Path of the run directory, or a `Run`. A `Run` is returned unchanged, unless
                `allow_code` permits more than the run does. The result is then a copy that shares
                the models, the directory and the objects of the run.
            allow_code: Whether code that the files reference may be executed.
        """
        if not isinstance(run, Run):
            return cls(run, allow_code)
        if not allow_code or run.permission is True:
            return run
        opened = copy.copy(run)
        opened.permission = True if allow_code is True else also_allow(run.permission, allow_code)
        return opened

    def best(self, test: str = "global") -> Run:
        """Return this run with the models of the round that is best on validation rows.

        The result can be passed to functions such as `evaluate` and `export`.

        Args:
            test: "global" for the round with the best mean score on the global validation set, or
                "personal" for the round with the best mean score on the clients' validation rows.

        Raises:
            UserError: If the run has no such models.

        Example:
            >>> import hetero_fl
            >>> config = {
            ...     "data": {"name": "digits"},
            ...     "clients": {"count": 2, "defaults": {"model": "linear"}},
            ...     "rounds": 2,
            ...     "output": {"plots": False, "report": False},
            ... }
            >>> run = hetero_fl.run(config, out="runs/selected")
            >>> round_idx = run.summary["global"]["best_by_validation"]["round"]
            >>> run.best("global").record_of("client_1")["round"] == round_idx
            True
        """
        if test not in BEST_MODELS:
            raise ArgumentError(f"test: expected 'personal' or 'global', got {test!r}")
        best = copy.copy(self)
        best.selection = test
        best._loaded = {}
        for name in ("models", "model_names"):
            best.__dict__.pop(name, None)
        return best

    def record_of(self, client: str) -> dict[str, Any]:
        """Return the record of the round in which the model of a client was evaluated.

        Args:
            client: Client id, or `server`.
        """
        if not self.selection:
            return next(record for record in reversed(self.metrics) if "clients" in record)
        # The server's model is selected by its own score.
        key = "server" if (client, self.selection) == ("server", "global") else self.selection
        return self.metrics[self.summary[key]["best_by_validation"]["round"] - 1]

    def __repr__(self) -> str:
        if not self.directory.finished:
            return f"Run({str(self.path)!r}: not finished)"
        summary = self.summary
        details = self.directory.details()
        done = pluralize(summary["rounds_completed"], "round")
        about = f"{algorithm_name(summary['algorithm'])} on {summary['data']['name']}, {done}"
        clients = pluralize(population(summary, details), "client")
        scores = format_final_evaluation(summary, details.get("unit", ""))
        return f"Run({str(self.path)!r}: {about}, {clients}, seed {summary['seed']};\n    {scores})"

    def _repr_html_(self) -> str:
        parts = [f"<pre>{escape(repr(self))}</pre>"]
        if self.directory.finished:
            tests = {test: self.summary[test]["last"] for test in TEST_NAMES if self.summary[test]}
            names = dict.fromkeys(name for last in tests.values() for name in last)
            metrics = list(filter(is_metric, names))
            rows = [
                [TEST_NAMES[test], *(format_metric(last.get(m), m) for m in metrics)]
                for test, last in tests.items()
            ]
            parts.append(html_table(["test", *map(metric_name, metrics)], rows))
        curves = self.path / "plots" / "curves.png"
        if curves.is_file():
            parts.append(Picture(curves)._repr_html_())
        return "".join(parts)

    @property
    def path(self) -> Path:
        """The path of the run directory."""
        return self.directory.path

    def config(self) -> dict[str, Any]:
        """Return the resolved configuration, from which the run can be prepared again.

        A file cannot name objects of a program, so the file itself cannot be loaded.

        Raises:
            UserError: If the configuration references code that may not be executed.
        """
        config = self.directory.config()
        check_code(find_references(config), str(self.path / "config.yaml"), self.permission)
        return config

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`.

        Raises:
            UserError: If the run has not finished.
        """
        return self.directory.summary()

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, one for each round."""
        return self.directory.metrics()

    @cached_property
    def model_names(self) -> list[str]:
        """The ids of the clients with a saved model, and `server` if the server has a model.

        The model files are not read.

        Raises:
            UserError: If the run has no saved models.
        """
        files = self.directory.model_files(self.selection)
        if not files:
            why = "the run has not finished"
            if self.selection:
                why = (
                    "those of the best rounds are saved by a run that has validation rows and "
                    "output.best_models=true"
                )
            elif self.directory.finished:
                why = "a site uploads its model only with tells.model=true in its site file"
            raise UserError(f"{self.path}: has no models; {why}")
        return [file.stem for file in files]

    @cached_property
    def models(self) -> dict[str, SavedModel]:
        """The models, keyed by client id, or `server` for the server's model.

        The tensors can be read without the modules that were passed for the models.

        Raises:
            UserError: If the run has no models, or a model is damaged or references code that may
                not be executed.
        """
        return {name: self._read_model(name) for name in self.model_names}

    def load_models(self, client: str | None = None) -> dict[str, SavedModel]:
        """Load the model of one client, or the models of all clients.

        Args:
            client: Client id, or `server`. If None, all models are loaded.

        Returns:
            The loaded models, keyed by client id.

        Raises:
            UserError: If there is no such client, or a model is damaged, references code that may
                not be executed, or was an object that this program does not have.
        """
        if client is not None:
            self._check_client("client", client)
        names = self.model_names if client is None else [client]
        models = {name: self._read_model(name) for name in names}
        for name, model in models.items():
            self._check_object(name, model)
        return models

    def _check_client(self, argument: str, client: str) -> None:
        if client not in self.model_names:
            hint = suggest_or_list(client, self.model_names)
            raise ArgumentError(f"{argument}: no model of '{client}'{hint}")

    def _check_object(self, client: str, model: SavedModel) -> None:
        """Check that this program has the module of a client, if the module was an object."""
        if model.is_object and get_object(model.arch.name) is None:
            title = model.arch.display_name.rpartition("-")[0]
            raise UserError(
                f"{self.path}: the model of '{client}' was an object of a Python program; pass it "
                f"again: Run.load({str(self.path)!r}, models={{{client!r}: {title}()}})"
            )

    def _restore_object(self, client: str, model: Any) -> None:
        self._check_client("models", client)
        saved = self._read_model(client)
        if saved.arch.name != code_reference(model):
            self.keep(saved.restore_object(model, f"models: '{client}'"))

    def model_file(self, name: str) -> Path:
        """Return the file of the model of a client, or `server`."""
        return self.directory.models_folder(self.selection) / f"{name}.safetensors"

    @cached_property
    def _checksums(self) -> dict[str, str]:
        return self.directory.checksums()

    def _read_model(self, name: str) -> SavedModel:
        """Return a model, whose file is verified and read once."""
        if name not in self._loaded:
            file = self.model_file(name)
            expected = self._checksums.get(self.directory.name_of(file))
            if expected is not None and sha256_of(file) != expected:
                raise UserError(f"{file}: {CHANGED}")
            self._loaded[name] = SavedModel.load(file, self.permission)
        return self._loaded[name]

    @property
    def history(self) -> pd.DataFrame:
        """Data frame with one row for each round, client and metric.

        The columns are `round`, `client`, `test`, `metric` and `value`. The test is `global`,
        `personal`, or `train` for the training loss. The client is "server" for the server's model
        and "mean" for the mean over the clients.
        """
        return history_frame(self.metrics)

    def model(self, client: str) -> torch.nn.Module:
        """Return the trained model of a client, in evaluation mode.

        Args:
            client: Client id, or `server`.

        Returns:
            An instance of the configured model class. For models of `model_zoo`, this is a
            `SplitModel`. The model returns logits.

        Raises:
            UserError: If there is no such client.
        """
        return self.load_models(client)[client].source_module()

    def save(self, path: str | Path) -> Run:
        """Copy the run directory and return the run in the copy.

        Args:
            path: A folder that does not exist or is empty.

        Raises:
            UserError: If the folder is not empty.
        """
        check_vacant(Path(path), alternatives="")
        shutil.copytree(self.path, path, dirs_exist_ok=True)
        saved = Run(path, self.permission)
        saved.keep(*self._kept)
        return saved

    def predict(self, client: str, x: Any, personal: bool = True, unit: Any = None) -> pd.DataFrame:
        """Predict raw examples with the model of a client.

        The examples are preprocessed as on that client.

        Args:
            client: Client id, or `server`.
            x: Raw examples. Images have shape `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` and are
                uint8 or floats in [0, 1]. Floats in [0, 255] are accepted if the range is
                unambiguous. Tables have shape `[N, F]`, or are a data frame whose columns are
                matched by name. Time series have shape `[N, T, F]`. Inputs with several blocks are
                a dictionary, keyed by block name. A block may be missing if the model supports it.
            personal: Whether the examples belong to the client, as in the local test. If True, the
                client's label frequencies and statistics are applied if the run used them.
            unit: Reference value of each row, shape `[N]` or a number, for a regression with
                relative targets. Predictions are multiplied by this value. If None, predictions
                are returned in the unit of the training targets.

        Returns:
            Class probabilities, or predicted values for a regression: a data frame with one row for
            each example and one column for each output. The columns are the names of the classes or
            targets if they have names, or else numbers from 0. If `x` is a data frame, the index is
            that of `x`.

        Raises:
            UserError: If there is no such client, or the model cannot process the examples.
        """
        check_extra("tables", ["pandas"], "Run.predict")
        # Imported here because loading pandas is slow.
        import pandas as pd

        model = self.load_models(client)[client]
        values = model.predict(preprocess_inputs(model, x), personal)
        if unit is not None and model.task.kind == "regression":
            values = values * torch.as_tensor(unit, dtype=values.dtype).reshape(-1, 1)
        index = x.index if is_frame(x) else None
        return pd.DataFrame(values.numpy(), index, model.task.names or None)

    def plot(self) -> list[Path]:
        """Draw the plots of the run, save the plots in `plots/` and return the paths."""
        from hetero_fl.reporting.plots import write_plots

        return write_plots(self.path)

    def picture(self, name: str = "curves") -> Picture:
        """Return a plot of the run, which a notebook displays.

        The plots are drawn first if the run has none.

        Args:
            name: Name of the plot, such as `curves`, `clients` or `labels`.

        Raises:
            UserError: If there is no such plot.
        """
        files = {path.stem: path for path in (self.path / "plots").glob("*.png")}
        if not files:
            files = {path.stem: path for path in self.plot()}
        if name not in files:
            raise ArgumentError(f"name: no plot '{name}'{suggest_or_list(name, sorted(files))}")
        return Picture(files[name])


def history_frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a data frame with one row for each round, client and metric.

    Args:
        records: The records of the rounds, as in `metrics.jsonl`.

    Returns:
        A data frame with the columns `round`, `client`, `test`, `metric` and `value`. The client is
        "server" for the server's model and "mean" for the mean over the clients. The training loss
        of a client has the test "train" and the metric "loss".
    """
    check_extra("tables", ["pandas"], "Run.history")
    # Imported here because loading pandas is slow.
    import pandas as pd

    rows: list[tuple[Any, ...]] = []
    for record in records:
        parts: list[tuple[str, str, Any]] = [
            (client, "train", {"loss": loss})
            for client, loss in record.get("train_loss", {}).items()
        ]
        for client, scores in (record.get("clients") or {}).items():
            parts += [(client, test, scores.get(test)) for test in TESTS]
        parts += [("mean", test, record.get(test)) for test in TESTS]
        parts.append(("server", "global", record.get("server")))
        for client, test, scores in parts:
            for metric, value in (scores or {}).items():
                if is_metric(metric):
                    rows.append((record["round"], client, test, metric, value))
    return pd.DataFrame(rows, columns=["round", "client", "test", "metric", "value"])
