"""Federations that are created in Python from `Client` objects and trained with a method."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any, TypedDict, get_args, get_type_hints

import yaml
from typing_extensions import Unpack

from hetero_fl.algorithms import Algorithm, register_algorithm
from hetero_fl.config.base import OptimizerConfig, Settings
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.communication import ChannelConfig
from hetero_fl.config.data import DataConfig, PartitionConfig
from hetero_fl.config.describe import to_yaml
from hetero_fl.config.load import Overrides, Source, apply_overrides, override_list, plain
from hetero_fl.config.population import expand_population, key_without_effect
from hetero_fl.config.protection import AggregationConfig, AttacksConfig, PrivacyConfig
from hetero_fl.config.schema import (
    Config,
    EvaluationConfig,
    OutputConfig,
    RuntimeConfig,
    ServerConfig,
)
from hetero_fl.config.simulation import CohortConfig, DevicesConfig, FaultsConfig
from hetero_fl.core.task import Task
from hetero_fl.data.labels import Kind
from hetero_fl.experiment.client import Client, column_name, plain_value
from hetero_fl.experiment.comparison.compare import compare
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.datasets import FederationDatasets, plain_source
from hetero_fl.experiment.preparation import GivenModels, PreparedRun, prepare
from hetero_fl.experiment.runner import Callback, default_out, run_prepared
from hetero_fl.experiment.wording import errors_with_arguments, with_arguments
from hetero_fl.reporting.comparison.result import Comparison
from hetero_fl.reporting.notebook import html_items, html_table
from hetero_fl.reporting.run import Run
from hetero_fl.utils.code_permission import AllowCode
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.objects import OBJECT_PREFIX, iterate_objects, name_object
from hetero_fl.utils.registry import reference_to
from hetero_fl.utils.text import pluralize
from model_zoo.generators import own_generators

DEFAULT_NAME = "federation"
MethodLike = Algorithm | type[Algorithm] | str | None
"""A method, a method class or a method name. If None, the configured method is used."""


class Sections(TypedDict, total=False):
    """Sections of the configuration, which are arguments of everything that trains a federation.

    Attributes:
        aggregation: Aggregation of uploads, such as `Aggregation(rule="median")`.
        attacks: Simulated attacks.
        channel: Compression and secure aggregation.
        cohort: Sampling of the clients that take part in a round.
        devices: Simulated devices.
        evaluation: Evaluation schedule and additional metrics.
        faults: Simulated faults.
        output: Optional output files.
        privacy: Differential privacy.
        runtime: Execution settings, such as the mode (synchronous or asynchronous), executor and
            device.
        server: Training of models at the server.
    """

    aggregation: AggregationConfig | None
    attacks: AttacksConfig | None
    channel: ChannelConfig | None
    cohort: CohortConfig | None
    devices: DevicesConfig | None
    evaluation: EvaluationConfig | None
    faults: FaultsConfig | None
    output: OutputConfig | None
    privacy: PrivacyConfig | None
    runtime: RuntimeConfig | None
    server: ServerConfig | None


class Federation:
    """A set of clients with their own data and models, which are trained together.

    Args:
        clients: The clients.
        data: Examples to divide among the clients that have no data of their own. The data has a
            type that `Client` accepts, or is the name of a source such as "digits".
        partition: How to divide `data`, such as `Dirichlet(alpha=0.5)`. If None, the rows are
            divided at random.
        test: Examples of the global test set. If None, test rows are held out of `data`, or of the
            clients' rows if `data` is None.
        validation: Examples of the global validation set.
        proxy: Public examples on which methods compare the predictions of models: an array, a
            tensor or labeled data. If an integer, that number of rows is held out of `data`, or of
            the clients' rows if both `data` and `test` are None. If None, there is no proxy set.
        label: Column of the labels in data frames that are passed to this federation, and in those
            of clients without `label`.
        patient: Column of the patients in all data frames that have this column, or the patient of
            each row of `data` as an array. The rows of a patient are never divided between clients,
            or between training, validation, test and proxy rows.
        task: Kind of the task, "multiclass", "multilabel" or "regression", or a `Task` with the
            names of the classes. If None, the labels determine the task, and the classes are the
            sorted distinct labels in all data sets of the federation.
        num_classes: Number of classes of labels that are class numbers from 0. If None, see `task`.
        defaults: Default settings of the clients, such as `ClientSettings(epochs=2)`.
        per_round: Number of clients that are sampled in each round. If None, all clients take part.
        common: Name prefixes of the tensors that are averaged across models of different
            architectures.
        seed: Seed of the data splits, initial weights, client sampling and batches.
        name: Name of the federation, which is the prefix of default run directories.

    Attributes:
        clients: The clients; an empty list for a federation from `from_config`.
        is_from_file: Whether the federation was created by `from_config`.

    Raises:
        TypeError: If data or a model is of an unsupported type.
        UserError: If `clients` is empty, two clients have the same name, or clients, data and
            settings do not fit together.

    Example:
        >>> import numpy as np
        >>> import hetero_fl as hfl
        >>> rng = np.random.default_rng(0)
        >>> def patients(n):
        ...     y = np.arange(n) % 2
        ...     return (rng.normal(size=(n, 8)) + y[:, None]).astype("float32"), y
        >>> federation = hfl.Federation(
        ...     [
        ...         hfl.Client("clinic", model="mlp", data=patients(60)),
        ...         hfl.Client("university", model="wide_deep", data=patients(90)),
        ...     ],
        ...     test=patients(40),
        ...     proxy=patients(50)[0],
        ... )
        >>> run = federation.train(hfl.FedMD(), rounds=2)
        >>> sorted(run.models)
        ['clinic', 'university']
    """

    @own_generators()
    def __init__(
        self,
        clients: Sequence[Client],
        *,
        data: Any = None,
        partition: PartitionConfig | None = None,
        test: Any = None,
        validation: Any = None,
        proxy: Any = None,
        label: str | int | None = None,
        patient: Any = None,
        task: Task | Kind | None = None,
        num_classes: int | None = None,
        defaults: ClientSettings | None = None,
        per_round: int | None = None,
        common: Sequence[str] = (),
        seed: int = 0,
        name: str = DEFAULT_NAME,
    ) -> None:
        if isinstance(clients, Client):
            raise TypeError("clients: expected a list of Client objects, got a Client")
        self.clients = list(clients)
        _check_names(self.clients)
        if partition is not None and not isinstance(partition, PartitionConfig):
            raise TypeError(
                f"partition: expected a partition such as Dirichlet(alpha=0.5), got {partition!r}"
            )
        if partition is not None and all(client.data is not None for client in self.clients):
            raise UserError("partition: has no effect, because all clients have their own data")
        given_sets = {"data": data, "test": test, "validation": validation, "proxy": proxy}
        sets = {name: found for name, found in given_sets.items() if found is not None}
        self._names_arguments = not any(
            plain_source(given) for given in (data, *(client.data for client in clients))
        )
        mains = (f"`{name}`" for name in ("data", "test") if name in sets)
        self._main = next(mains, "the data of the clients")
        with self._errors():
            datasets = FederationDatasets(
                self.clients,
                sets,
                column_name(label),
                patient=column_name(patient),
                task=task,
                num_classes=num_classes,
            )
        self._objects: list[object] = [datasets.datasets, defaults, *self.clients]
        groups = [
            {
                "name": client.name,
                **({} if client.model is None else {"model": client.model_config}),
                **datasets.client_config(client),
                **_client_settings(client, defaults),
            }
            for client in self.clients
        ]
        section = _clients_section(groups, defaults)
        if per_round is not None:
            section["per_round"] = per_round
        if common:
            section["common"] = list(common)
        self._config: dict[str, Any] = {
            "name": name,
            "seed": seed,
            "data": datasets.config(),
            "clients": section,
        }
        if partition is not None:
            self._config["data"]["partition"] = plain_value(partition)
        self._allow_code: AllowCode = True
        self.is_from_file = False
        modules = {c.name: c.given for c in self.clients if c.given and c.init == "given"}
        if modules:
            given = GivenModels(modules)
            self._objects.append(given)
            self._config["init_from"] = name_object(f"{name}: modules", given)

    @classmethod
    def from_config(
        cls,
        source: Source,
        overrides: Overrides = (),
        allow_code: AllowCode = False,
    ) -> Federation:
        """Create a federation from a configuration file or a dictionary.

        Args:
            source: A YAML or JSON file, or a dictionary.
            overrides: Changes to the configuration, as `key.path=value` or as a dictionary.
            allow_code: Whether code that a file refers to (`python:package.module:Name`) may be
                executed.

        Raises:
            UserError: If the configuration is invalid.

        Example:
            >>> import hetero_fl as hfl
            >>> config = {"data": {"name": "digits"}, "clients": {"count": 3}}
            >>> hfl.Federation.from_config(config)
            Federation('run', data=digits, 3 clients)
        """
        federation = cls.__new__(cls)
        config = load_config(source, overrides, allow_code)
        federation.clients = []
        federation._objects = []
        federation._config = plain(config)
        federation._allow_code = allow_code
        federation._names_arguments = False
        federation._main = "the main data set"
        federation.is_from_file = True
        return federation

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of this federation, with the keys of a configuration file."""
        return self._config

    def __repr__(self) -> str:
        if self.is_from_file:
            source = self._config.get("data", {}).get("name", DataConfig().name)
            clients = pluralize(len(self), "client")
            return f"Federation({self._config.get('name', 'run')!r}, data={source}, {clients})"
        shown = "\n".join(f"    {client!r}," for client in self.clients)
        return f"Federation([\n{shown}\n])"

    def _repr_html_(self) -> str:
        name = self._config.get("name", "run")
        title = "Federation" if name == DEFAULT_NAME else f"Federation {name}"
        if self.is_from_file:
            return html_items(title, {key: str(value) for key, value in self._config.items()})
        described = [client.describe() for client in self.clients]
        columns = list(dict.fromkeys(key for each in described for key in each))
        rows = [
            [client.name, *(each.get(key, "") for key in columns)]
            for client, each in zip(self.clients, described, strict=True)
        ]
        return f"<b>{escape(title)}</b>{html_table(['client', *columns], rows)}"

    def __len__(self) -> int:
        if not self.is_from_file:
            return len(self.clients)
        return len(expand_population(Config.model_validate(self._config).clients))

    def prepare(
        self,
        method: MethodLike = None,
        *,
        rounds: int | None = None,
        overrides: Overrides = (),
        **sections: Unpack[Sections],
    ) -> PreparedRun:
        """Create a run and check its settings, data and models, without training.

        No run directory is created. If necessary, the data set is downloaded to `data.root`.

        Args:
            method: See `train`.
            rounds: See `train`.
            overrides: See `train`.
            **sections: Sections of the configuration, such as `privacy=Privacy(unit="client")` (see
                `Sections`).

        Returns:
            The run, ready to train.

        Raises:
            TypeError: If a section is unknown.
            UserError: If the federation, the method and the settings do not fit together, or the
                data cannot be loaded.
        """
        given = override_list(overrides)
        config = self._configuration(method, rounds, sections, given)
        kept = (*self._objects, method, sections)
        with self._errors(given):
            prepared = prepare(config, given, allow_code=self._allow_code)
        notes = prepared.notes
        if self._names_arguments:
            notes = [with_arguments(note, given, self._main) for note in notes]
        return replace(prepared, kept=kept, notes=notes)

    def train(
        self,
        method: MethodLike = None,
        *,
        rounds: int | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        callbacks: Sequence[Callback] = (),
        quiet: bool | None = None,
        overrides: Overrides = (),
        **sections: Unpack[Sections],
    ) -> Run:
        """Train the clients with a method and return the finished run.

        Args:
            method: A method such as `FedMD(digest_epochs=2)`, a method class or a method name. If
                None, the method of the configuration file is used, or `FedAvg()` if there is none.
            rounds: Number of rounds. If None, the number in the configuration file is used, or 10
                if there is none.
            out: The run directory. If None, a federation from `from_config` writes to
                `runs/<name>-<time>`. Any other federation writes to a temporary directory, which is
                deleted together with the returned `Run`; `Run.save` copies its files.
            resume: Whether to continue from the newest checkpoint in `out`.
            callbacks: Functions that are called with the record of each round.
            quiet: Whether to hide the progress display. If None, progress is shown in notebooks
                only.
            overrides: Changes to the configuration, such as `["evaluation.every=5"]`.
            **sections: Sections of the configuration, such as `privacy=Privacy(unit="client")` (see
                `Sections`).

        Raises:
            UserError: If the federation, the method and the settings do not fit together.
            RunFailedError: If the run cannot continue.
        """
        prepared = self.prepare(method, rounds=rounds, overrides=overrides, **sections)
        temporary, out = run_directory(self, prepared, out, resume)
        run = run_prepared(prepared, out=out, resume=resume, callbacks=callbacks, quiet=quiet)
        # The run keeps the objects that its configuration names, and its directory.
        run.keep(temporary, *self._objects, method, sections)
        return run

    def compare(
        self,
        methods: Sequence[Algorithm | type[Algorithm] | str],
        *,
        rounds: int | None = None,
        seeds: Iterable[int] = (0,),
        out: str | Path | None = None,
        jobs: int | None = None,
        quiet: bool = False,
        overrides: Overrides = (),
        **sections: Unpack[Sections],
    ) -> Comparison:
        """Train the federation with several methods and seeds.

        The runs are executed in worker processes. In a script, call this method under
        `if __name__ == "__main__":`.

        Args:
            methods: Methods, method classes, or method names with optional settings, such as
                `fedavg:logit_adjustment=true`. `all` stands for all methods that the federation
                supports.
            rounds: Number of rounds, see `train`.
            seeds: Seeds. Each method is trained once with each seed.
            out: The folder of the comparison. If None, a temporary folder is used, which is deleted
                together with the returned `Comparison`.
            jobs: Number of runs at a time. If None, one run per core, with one thread each.
            quiet: Whether to hide the progress display.
            overrides: Changes to the configuration.
            **sections: Sections of the configuration, such as `privacy=Privacy(unit="client")` (see
                `Sections`).

        Raises:
            UserError: If the federation, a method and the settings do not fit together.
            RunFailedError: If runs failed. The error is raised after all other runs have ended.

        Example:
            >>> import hetero_fl as hfl
            >>> federation = hfl.Federation.from_config(
            ...     {"data": {"name": "digits"}, "clients": {"count": 2}}
            ... )
            >>> comparison = federation.compare([hfl.Local(), hfl.FedAvg()], rounds=1)
            >>> comparison.frame["algorithm"].tolist()
            ['local', 'fedavg']
        """
        if isinstance(methods, str | Algorithm) or not isinstance(methods, Iterable):
            raise TypeError(f"methods: expected a list of methods, got {methods!r}")
        if not isinstance(seeds, Iterable):
            raise TypeError(f"seeds: expected integers such as range({seeds}), got {seeds!r}")
        temporary = None
        if out is None:
            temporary = TemporaryFolder()
            out = temporary.path
        given = override_list(overrides)
        config = self._configuration(None, rounds, sections, given)
        with self._errors(given):
            comparison = compare(
                config,
                [_variant(method) for method in methods],
                seeds,
                out=out,
                overrides=given,
                jobs=jobs,
                quiet=quiet,
                allow_code=self._allow_code,
            )
        comparison.keep(temporary, *self._objects, *methods, sections)
        return comparison

    def to_yaml(self, path: str | Path) -> None:
        """Write the federation as a YAML configuration file.

        Raises:
            UserError: If the file exists, or if the federation contains an object that a file
                cannot name, such as an array or a class defined in a notebook.
        """
        for key, value in iterate_objects(self._config):
            raise UserError(
                f"{key}: {value.removeprefix(OBJECT_PREFIX)} is an object of this program, which a "
                "file cannot contain; use a file or python:package.module:Name instead"
            )
        if Path(path).exists():
            raise UserError(f"{path}: already exists; choose another name")
        Path(path).write_text(to_yaml(self._config), encoding="utf-8")

    def _errors(self, overrides: Sequence[str] = ()) -> AbstractContextManager[None]:
        """Name arguments in errors instead of keys, unless a source has keys."""
        if not self._names_arguments:
            return nullcontext()
        return errors_with_arguments(overrides, self._main)

    def _check_overrides(self, config: dict[str, Any], overrides: list[str]) -> None:
        """Raise UserError if overrides replace the clients or the data of this program."""
        if self.is_from_file or not overrides:
            return
        changed = apply_overrides(config, overrides)
        given = {"clients.count": None}
        if self._names_arguments:
            given["data.name"] = config["data"]["name"]
        for path, value in given.items():
            section, key = path.split(".")
            found = changed[section]
            if isinstance(found, dict) and found.get(key) != value:
                raise UserError(
                    f"{path}: cannot be overridden, because the program passes the {section}; "
                    "create another Federation"
                )

    def _configuration(
        self, method: MethodLike, rounds: int | None, sections: Sections, overrides: list[str]
    ) -> dict[str, Any]:
        """Return the configuration of a run without the overrides, which are checked (see `train`).

        Raises:
            TypeError: If a section is unknown.
            UserError: If overrides replace the clients or the data of this program.
        """
        config = dict(self._config)
        for name in sections.keys() - Sections.__annotations__.keys():
            hint = suggest_or_list(name, [*Sections.__annotations__, "rounds", "overrides"])
            raise TypeError(f"unexpected keyword argument '{name}'{hint}")
        for key, value in sections.items():
            if value is not None:
                config[key] = _plain_section(key, value)
        if method is not None:
            config["algorithm"] = method_section(method)
        if rounds is not None:
            config["rounds"] = rounds
        self._check_overrides(config, overrides)
        return config


class TemporaryFolder:
    """A temporary folder, which is deleted when this object is garbage-collected.

    Attributes:
        path: The path of the folder.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="hetero_fl_"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def run_directory(
    federation: Federation, prepared: PreparedRun, out: str | Path | None, resume: bool
) -> tuple[TemporaryFolder | None, Path]:
    """Choose the directory of a run.

    Args:
        federation: The federation to train.
        prepared: The run.
        out: The run directory. If None, the directory is `runs/<name>-<time>` for a federation
            from `Federation.from_config`, and a temporary folder for any other federation.
        resume: Whether a run is resumed.

    Returns:
        The temporary folder that contains the run directory, or None if the directory is not
        temporary; and the run directory.

    Raises:
        UserError: If `resume` is True and `out` is None.
    """
    if out is not None:
        return None, Path(out)
    if resume:
        raise UserError("resume: requires out, the directory of the run to continue")
    if federation.is_from_file:
        return None, default_out(prepared.config)
    temporary = TemporaryFolder()
    return temporary, temporary.path / prepared.config.name


def method_section(method: Algorithm | type[Algorithm] | str) -> dict[str, Any]:
    """Convert a method to the section `algorithm` of a configuration.

    Raises:
        TypeError: If the argument is neither a method, a method class nor a name.
    """
    if isinstance(method, str):
        return {"name": method}
    if isinstance(method, type) and issubclass(method, Algorithm):
        return {"name": _method_name(method)}
    if not isinstance(method, Algorithm):
        raise TypeError(
            f"method: expected a method such as FedAvg() or its name, got {type(method).__name__}"
        )
    return {"name": _method_name(type(method)), **plain_value(method)}


def _variant(method: Algorithm | type[Algorithm] | str) -> str:
    """Convert a method to a name with settings, such as `fedmd:digest_epochs=2`."""
    if isinstance(method, str):
        return method
    section = method_section(method)
    settings = (
        f"{key}={_format_setting(value)}" for key, value in section.items() if key != "name"
    )
    return ":".join([section["name"], *settings])


def _plain_section(key: str, value: Any) -> Any:
    """Return a section of the configuration as plain values.

    Args:
        key: Key of the section.
        value: The section, or its content as plain values.

    Raises:
        TypeError: If the value is a section with another key.
    """
    expected = get_args(get_type_hints(Sections)[key])[0]
    if isinstance(value, Settings) and not isinstance(value, expected):
        names = (cls.__name__.removesuffix("Config") for cls in (expected, type(value)))
        raise TypeError("{}: expected {}(...), got {}(...)".format(key, *names))
    return plain_value(value)


def _format_setting(value: Any) -> str:
    """Return a value of a setting as in a configuration file, without quotes where possible."""
    is_plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z]\w*", value)
    return value if is_plain and yaml.safe_load(value) == value else json.dumps(value)


def _method_name(method_type: type[Algorithm]) -> str:
    for name in register_algorithm:
        if register_algorithm.get_loaded(name) is method_type:
            return name
    return reference_to(method_type)


def _check_names(clients: Sequence[Client]) -> None:
    if not clients:
        raise UserError("clients: expected at least one client, got none")
    names: set[str] = set()
    for client in clients:
        if not isinstance(client, Client):
            raise TypeError(f"clients: expected Client objects, got {type(client).__name__}")
        if client.name.lower() in names:
            raise UserError(
                f"clients: two clients have the name '{client.name}' (some file systems ignore "
                "case); choose another"
            )
        names.add(client.name.lower())


def _clients_section(
    groups: list[dict[str, Any]], defaults: ClientSettings | None
) -> dict[str, Any]:
    """Return the section `clients`, or raise UserError if all clients replace a default."""
    if defaults is None:
        return {"groups": groups}
    shared = plain_value(defaults)
    if key := key_without_effect(shared, groups):
        raise UserError(
            f"defaults: {key} has no effect, because every client sets {key.partition('.')[0]}; "
            "remove it"
        )
    return {"groups": groups, "defaults": shared}


def _client_settings(client: Client, defaults: ClientSettings | None) -> dict[str, Any]:
    """Return the settings of a client, whose optimizer replaces that of `defaults`."""
    settings = dict(client.settings)
    given = defaults.model_fields_set if isinstance(defaults, ClientSettings) else set()
    if "optimizer" in given and "optimizer" in settings:
        # Layers of the configuration are merged, so the other settings are reset.
        unset = OptimizerConfig().model_dump(mode="json")
        settings["optimizer"] = {**unset, **settings["optimizer"]}
    return settings
