"""A federation that is created in Python from clients, and trained by a method."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
import yaml
from typing_extensions import Unpack

from hetero_fl.algorithms import Algorithm, register_algorithm
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.communication import ChannelConfig
from hetero_fl.config.data import DataConfig, PartitionConfig
from hetero_fl.config.load import Overrides, Source, plain
from hetero_fl.config.population import expand_population
from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.config.robustness import AggregationConfig, AttacksConfig
from hetero_fl.config.schema import (
    Config,
    EvaluationConfig,
    OutputConfig,
    RuntimeConfig,
    ServerConfig,
)
from hetero_fl.config.simulation import CohortConfig, DevicesConfig, FaultsConfig
from hetero_fl.data import Dataset
from hetero_fl.data.client_files import OWN_DATA
from hetero_fl.data.sources.objects import is_source, to_dataset, to_examples, to_pair
from hetero_fl.experiment.client import Client, plain_value
from hetero_fl.experiment.comparison import compare
from hetero_fl.experiment.preparation import PreparedRun, load_config, prepare
from hetero_fl.experiment.runner import Callback, default_out, run_prepared
from hetero_fl.experiment.starting_models import GivenModels
from hetero_fl.reporting.comparison.result import Comparison
from hetero_fl.reporting.notebook import html_items, html_table
from hetero_fl.reporting.run import Run
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.objects import OBJECT_PREFIX, iterate_objects, name_object
from hetero_fl.utils.registry import reference_to
from hetero_fl.utils.text import pluralize

DEFAULT_NAME = "federation"
MethodLike = Algorithm | type[Algorithm] | str | None
"""A method, its class or its name; None for that of the configuration."""


class Sections(TypedDict, total=False):
    """Sections of the configuration, which `Federation.train` accepts as arguments."""

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
    """Participants with their own data and models, who train together.

    Args:
        clients: The clients.
        data: Examples that are divided among the clients without data of their own: of any type
            that `Client.data` accepts, or the name of a source such as "digits".
        partition: How `data` is divided, such as `Dirichlet(alpha=0.5)`; by default at random.
        test: Examples of the global test set. By default they are held out of `data`, or of the
            clients' rows.
        validation: Examples of the global validation set.
        proxy: Public examples on which predictions are compared: an array or tensor, or labeled
            data of any type; or their number, which is then held out of `data` or, without `test`,
            of the clients' rows.
        label: Column of the labels in data frames of this federation and of clients without
            `label`.
        num_classes: Number of classes. By default, integer labels range from 0 to the largest label
            of all clients and sets.
        defaults: Settings of all clients that do not set them, such as `ClientSettings(epochs=2)`.
        per_round: Number of clients sampled in each round; None: all.
        common: Prefixes of tensor names that are averaged across models of different architectures.
        seed: Seed of the data splits, initial weights, sampling and batches.
        name: Name of the federation; the prefix of run directories.

    Raises:
        TypeError: If data or a model is of an unsupported type.
        UserError: If clients, data and settings do not fit together.

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

    def __init__(
        self,
        clients: Sequence[Client],
        *,
        data: Any = None,
        partition: PartitionConfig | None = None,
        test: Any = None,
        validation: Any = None,
        proxy: Any = None,
        label: str | None = None,
        num_classes: int | None = None,
        defaults: ClientSettings | None = None,
        per_round: int | None = None,
        common: Sequence[str] = (),
        seed: int = 0,
        name: str = DEFAULT_NAME,
    ) -> None:
        self.clients = list(clients)
        _check_names(self.clients)
        given_sets = {"data": data, "test": test, "validation": validation, "proxy": proxy}
        sets = {name: found for name, found in given_sets.items() if found is not None}
        parts = _Parts(self.clients, sets, label, num_classes)
        self._objects: list[object] = [parts.datasets, defaults, *self.clients]
        groups = [
            {"name": client.name, **_model_of(client), **_data_of(client, parts), **client.settings}
            for client in self.clients
        ]
        section: dict[str, Any] = {"groups": groups}
        if defaults is not None:
            section["defaults"] = plain_value(defaults)
        if per_round is not None:
            section["per_round"] = per_round
        if common:
            section["common"] = list(common)
        self._config: dict[str, Any] = {
            "name": name,
            "seed": seed,
            "data": parts.config(),
            "clients": section,
        }
        if partition is not None:
            self._config["data"]["partition"] = plain_value(partition)
        self._allow_code: bool | CodePermission = True
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
        allow_code: bool | CodePermission = False,
    ) -> Federation:
        """Create a federation from a configuration file or a dictionary.

        Args:
            source: A YAML or JSON file, or a dictionary.
            overrides: Changes to the configuration, `key.path=value`, or a dictionary of them.
            allow_code: Whether code that a file names (`python:package.module:Name`) may run.

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
        return federation

    @property
    def config(self) -> dict[str, Any]:
        """The federation as a dictionary with the keys of a configuration file."""
        return self._config

    def __repr__(self) -> str:
        if not self.clients:
            source = self._config.get("data", {}).get("name", DataConfig().name)
            clients = pluralize(len(self), "client")
            return f"Federation({self._config.get('name', 'run')!r}, data={source}, {clients})"
        shown = "\n".join(f"    {client!r}," for client in self.clients)
        return f"Federation([\n{shown}\n])"

    def _repr_html_(self) -> str:
        name = self._config.get("name", "run")
        title = "Federation" if name == DEFAULT_NAME else f"Federation {name}"
        if not self.clients:
            return html_items(title, {key: str(value) for key, value in self._config.items()})
        described = [client.describe() for client in self.clients]
        columns = list(dict.fromkeys(key for each in described for key in each))
        rows = [
            [client.name, *(each.get(key, "") for key in columns)]
            for client, each in zip(self.clients, described, strict=True)
        ]
        return f"<b>{escape(title)}</b>{html_table(['client', *columns], rows)}"

    def __len__(self) -> int:
        if self.clients:
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
        """Check everything that a run needs, without training or writing files.

        Args:
            method: See `train`.
            rounds: See `train`.
            overrides: See `train`.
            **sections: Sections of the configuration, see `train`.

        Raises:
            UserError: If the federation, the method and the settings do not fit together.
        """
        config = self._configuration(method, rounds, sections)
        prepared = prepare(config, overrides, allow_code=self._allow_code)
        return replace(prepared, kept=(*self._objects, method, sections))

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
        aggregation: AggregationConfig | None = None,
        attacks: AttacksConfig | None = None,
        channel: ChannelConfig | None = None,
        cohort: CohortConfig | None = None,
        devices: DevicesConfig | None = None,
        evaluation: EvaluationConfig | None = None,
        faults: FaultsConfig | None = None,
        output: OutputConfig | None = None,
        privacy: PrivacyConfig | None = None,
        runtime: RuntimeConfig | None = None,
        server: ServerConfig | None = None,
    ) -> Run:
        """Train the federation with a method.

        Args:
            method: A method such as `FedMD(digest_epochs=2)`, its class or its name. None is the
                method of the configuration file, or `FedAvg()`.
            rounds: Number of rounds. None is that of the configuration file, or 10.
            out: The run directory. None is `runs/<name>-<time>` for a federation from a file, else
                a temporary directory, which is deleted with the run; `Run.save` keeps it.
            resume: Whether to continue from the newest checkpoint in `out`.
            callbacks: Called with the record of each round.
            quiet: Whether to hide the progress display. None shows it in notebooks only.
            overrides: Changes to the configuration, such as `["evaluation.every=5"]`.
            aggregation: Aggregation of uploads, such as `Aggregation(rule="median")`.
            attacks: Simulated attacks.
            channel: Compression and secure aggregation.
            cohort: Sampling of the clients of a round.
            devices: Simulated devices.
            evaluation: Evaluation schedule and further metrics.
            faults: Simulated faults.
            output: Optional output files.
            privacy: Differential privacy.
            runtime: Execution: synchronous or asynchronous, executor, device.
            server: Training at the server.

        Raises:
            UserError: If the federation, the method and the settings do not fit together.
            RunFailedError: If the run cannot continue.
        """
        sections: Sections = {
            "aggregation": aggregation,
            "attacks": attacks,
            "channel": channel,
            "cohort": cohort,
            "devices": devices,
            "evaluation": evaluation,
            "faults": faults,
            "output": output,
            "privacy": privacy,
            "runtime": runtime,
            "server": server,
        }
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
        quiet: bool | None = None,
        overrides: Overrides = (),
        aggregation: AggregationConfig | None = None,
        attacks: AttacksConfig | None = None,
        channel: ChannelConfig | None = None,
        cohort: CohortConfig | None = None,
        devices: DevicesConfig | None = None,
        evaluation: EvaluationConfig | None = None,
        faults: FaultsConfig | None = None,
        output: OutputConfig | None = None,
        privacy: PrivacyConfig | None = None,
        runtime: RuntimeConfig | None = None,
        server: ServerConfig | None = None,
    ) -> Comparison:
        """Train the federation with several methods and seeds.

        Each run is a process of its own. In a script, call this under the `__main__` guard.

        Args:
            methods: Methods, their classes, or names with settings such as
                `fedavg:logit_adjustment=true`.
            rounds: Number of rounds, see `train`.
            seeds: Seeds of the runs of each method.
            out: The folder of the comparison. None is a temporary directory.
            jobs: Number of runs at a time. None: one per core, with one thread each.
            quiet: Whether to hide the progress display. None shows it in notebooks only.
            overrides: Changes to the configuration.
            aggregation: Aggregation of uploads, such as `Aggregation(rule="median")`.
            attacks: Simulated attacks.
            channel: Compression and secure aggregation.
            cohort: Sampling of the clients of a round.
            devices: Simulated devices.
            evaluation: Evaluation schedule and further metrics.
            faults: Simulated faults.
            output: Optional output files.
            privacy: Differential privacy.
            runtime: Execution: synchronous or asynchronous, executor, device.
            server: Training at the server.

        Raises:
            UserError: If the federation, a method and the settings do not fit together.
            RunFailedError: If runs failed, after the others have ended.

        Example:
            >>> import hetero_fl as hfl
            >>> federation = hfl.Federation.from_config(
            ...     {"data": {"name": "digits"}, "clients": {"count": 2}}
            ... )
            >>> comparison = federation.compare([hfl.Local(), hfl.FedAvg()], rounds=1)
            >>> comparison.frame["algorithm"].tolist()
            ['local', 'fedavg']
        """
        sections: Sections = {
            "aggregation": aggregation,
            "attacks": attacks,
            "channel": channel,
            "cohort": cohort,
            "devices": devices,
            "evaluation": evaluation,
            "faults": faults,
            "output": output,
            "privacy": privacy,
            "runtime": runtime,
            "server": server,
        }
        temporary = None
        if out is None:
            temporary = TemporaryFolder()
            out = temporary.path
        comparison = compare(
            self._configuration(None, rounds, sections),
            [_variant(method) for method in methods],
            seeds,
            out=out,
            overrides=overrides,
            jobs=jobs,
            quiet=quiet,
            allow_code=self._allow_code,
        )
        comparison.keep(temporary, *self._objects, *methods, sections)
        return comparison

    def to_yaml(self, path: str | Path) -> None:
        """Write the federation as a configuration file.

        Raises:
            UserError: If a part has no name, such as an array or a class of a notebook.
        """
        for key, value in iterate_objects(self._config):
            raise UserError(
                f"{key}: {value.removeprefix(OBJECT_PREFIX)} is an object of this program, which a "
                "file cannot contain; use a file or python:package.module:Name instead"
            )
        if Path(path).exists():
            raise UserError(f"{path}: already exists; choose another name")
        text = yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")

    def _configuration(
        self,
        method: MethodLike,
        rounds: int | None,
        sections: Sections,
    ) -> dict[str, Any]:
        config = dict(self._config)
        for key, value in sections.items():
            if value is not None:
                config[key] = plain_value(value)
        if method is not None:
            config["algorithm"] = method_section(method)
        if rounds is not None:
            config["rounds"] = rounds
        return config


class TemporaryFolder:
    """A folder that is deleted with this object.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="hetero_fl_"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def run_directory(
    federation: Federation, prepared: PreparedRun, out: str | Path | None, resume: bool
) -> tuple[TemporaryFolder | None, Path]:
    """Return the directory of a run, and the temporary folder that contains it, if any.

    Args:
        federation: The federation. If it is made from objects, the default is temporary.
        prepared: The run.
        out: The directory, if it is given.
        resume: Whether a run is to be continued.

    Raises:
        UserError: If there is no directory to continue in.
    """
    if out is not None:
        return None, Path(out)
    if resume:
        raise UserError("resume: requires out, the directory of the run to continue")
    if not federation.clients:
        return None, default_out(prepared.config)
    temporary = TemporaryFolder()
    return temporary, temporary.path / prepared.config.name


def method_section(method: Algorithm | type[Algorithm] | str) -> dict[str, Any]:
    """Return a method as the section `algorithm` of a configuration.

    Raises:
        TypeError: If the argument is not a method.
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
    """Return a method as a name with settings, `fedmd:digest_epochs=2`."""
    if isinstance(method, str):
        return method
    section = method_section(method)
    settings = (f"{key}={json.dumps(value)}" for key, value in section.items() if key != "name")
    return ":".join([section["name"], *settings])


def _method_name(method_type: type[Algorithm]) -> str:
    for name in register_algorithm:
        if register_algorithm.get_loaded(name) is method_type:
            return name
    return reference_to(method_type)


class _Parts:
    """The data sets of a federation, which are converted together.

    Integer labels are class numbers from 0 to the largest one of all parts, as a client may lack
    classes.

    Args:
        clients: The clients.
        sets: Data of the global sets `test`, `validation` and `proxy`, by name.
        label: Column of the labels in data frames.
        num_classes: Number of classes, if it is given.

    Attributes:
        datasets: Data sets by the place of their data in error messages.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        sets: Mapping[str, Any],
        label: str | None,
        num_classes: int | None,
    ) -> None:
        labeled = {
            _place(client, part): (data, client.label or _column(data, label))
            for client in clients
            for part, data in client.parts().items()
            if not is_source(data)
        }
        for client in clients:
            _check_own_sets(client, has_test="test" in sets or "data" in sets)
        self._named = plain_source(sets.get("data"))
        labeled |= {
            name: (sets[name], _column(sets[name], label))
            for name in ("data", "test", "validation")
            if name in sets and not (name == "data" and self._named)
        }
        labeled = {
            place: (to_pair(data, place), column) for place, (data, column) in labeled.items()
        }
        options = _label_options({p: data for p, (data, _) in labeled.items()}, num_classes)
        self.datasets = {
            place: to_dataset(data, place, column, **options)
            for place, (data, column) in labeled.items()
        }
        for client in clients:
            self._add_own_sets(client)
        proxy = sets.get("proxy")
        self._proxy_size = proxy if isinstance(proxy, int) else None
        if self._proxy_size is not None and "test" in sets and "data" not in sets:
            raise UserError(
                f"proxy: {proxy} rows cannot be held out of the clients' data if `test` is given; "
                "pass public examples"
            )
        if proxy is not None and self._proxy_size is None:
            self.datasets["proxy"] = to_examples(proxy, "proxy", _column(proxy, label))
        if "data" in self.datasets or "test" in self.datasets:
            self.datasets["common"] = _common_set(self.datasets)

    def _add_own_sets(self, client: Client) -> None:
        """Add the validation and test examples of a client to its data set."""
        for part in ("validation", "test"):
            own = self.datasets.pop(_place(client, part), None)
            if own is None:
                continue
            dataset = self.datasets[_place(client)]
            if own.task != dataset.task:
                raise UserError(
                    f"{_place(client, part)}: expected {dataset.task.describe()} as in data, got "
                    f"{own.task.describe()}"
                )
            if part == "validation":
                dataset = replace(dataset, validation=own.train)
            else:
                dataset = replace(dataset, test=own.train)
            self.datasets[_place(client)] = dataset

    def config(self) -> dict[str, Any]:
        """Return the section `data`."""
        section: dict[str, Any] = dict(self._named or {"name": OBJECT_PREFIX})
        if "common" in self.datasets:
            section = self.source("common")
            common = self.datasets["common"]
            if common.validation is None and not len(common.train):
                section["validation"] = 0.0
        if self._proxy_size is not None:
            section["proxy"] = {"size": self._proxy_size}
        elif "proxy" in self.datasets:
            section["proxy"] = {"source": self.source("proxy")}
        return section

    def source(self, place: str) -> dict[str, Any]:
        """Return a data set as a source of the configuration."""
        title = place.removeprefix("clients: ").replace("'", "")
        return {"name": name_object(title, self.datasets[place])}


def _place(client: Client, part: str = "data") -> str:
    return f"clients: '{client.name}': {part}"


def _check_own_sets(client: Client, has_test: bool) -> None:
    """Check that the federation can use the validation and test examples of a client."""
    for part in client.parts():
        if part == "data":
            continue
        if client.data is None or is_source(client.data):
            raise UserError(
                f"{_place(client, part)}: requires data=... as arrays, a data frame or a data set"
            )
        if not has_test:
            raise UserError(
                f"{_place(client, part)}: requires a global test set; pass Federation(test=...)"
            )


def _column(data: Any, label: str | None) -> str | None:
    """Return the federation's label column if the data has it."""
    columns = getattr(data, "column_names", getattr(data, "columns", ()))
    return label if label in list(columns) else None


def _label_options(parts: Mapping[str, Any], num_classes: int | None) -> dict[str, Any]:
    """Return the number of classes if the labels of all parts are class numbers.

    Args:
        parts: Data by place.
        num_classes: Number of classes, if it is given.

    Raises:
        UserError: If a class number is negative.
    """
    if num_classes is not None:
        return {"num_classes": num_classes}
    _check_kinds(parts)
    largest = []
    for place, data in parts.items():
        if not isinstance(data, tuple | list) or len(data) != 2:
            return {}
        y = np.asarray(data[1])
        if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or not len(y):
            return {}
        if y.min() < 0:
            raise UserError(
                f"{place}: y: expected class numbers from 0, got {y.min()}; renumber the classes, "
                "or pass floats for a regression"
            )
        largest.append(int(y.max()))
    return {"num_classes": max(largest) + 1} if largest else {}


def _check_kinds(parts: Mapping[str, Any]) -> None:
    """Check that the labels of all pairs (x, y) are text, or that none are."""
    kinds = {
        place: np.asarray(data[1]).dtype.kind in "OSU"
        for place, data in parts.items()
        if isinstance(data, tuple | list) and len(data) == 2
    }
    text = [place for place, is_text in kinds.items() if is_text]
    numbers = [place for place, is_text in kinds.items() if not is_text]
    if text and numbers:
        raise UserError(f"{numbers[0]}: y: expected text as in {text[0]}, got numbers")


def plain_source(data: Any) -> dict[str, Any] | None:
    """Return a source by name or as a dictionary as in a configuration; None for other data."""
    if isinstance(data, str):
        return {"name": data}
    return dict(data) if is_source(data) else None


def _common_set(datasets: Mapping[str, Dataset]) -> Dataset:
    """Return the common data set: the rows to divide, if any, and the global sets."""
    given = datasets.get("data")
    if given is None:
        # All clients have data of their own.
        given = datasets["test"]
        given = replace(given, name=OWN_DATA, train=given.train.select_rows(torch.arange(0)))
    test, validation = datasets.get("test"), datasets.get("validation")
    return replace(
        given,
        test=given.test if test is None else test.train,
        validation=given.validation if validation is None else validation.train,
    )


def _check_names(clients: Sequence[Client]) -> None:
    if not clients:
        raise UserError("clients: expected at least one client, got none")
    names: set[str] = set()
    for client in clients:
        if not isinstance(client, Client):
            raise TypeError(f"clients: expected Client objects, got {type(client).__name__}")
        if client.name in names:
            raise UserError(f"clients: two clients have the name '{client.name}'; choose another")
        names.add(client.name)


def _model_of(client: Client) -> dict[str, Any]:
    return {} if client.model is None else {"model": client.model_config}


def _data_of(client: Client, parts: _Parts) -> dict[str, Any]:
    if client.data is None:
        return {}
    if is_source(client.data):
        return {"data": dict(client.data)}
    return {"data": parts.source(_place(client))}
