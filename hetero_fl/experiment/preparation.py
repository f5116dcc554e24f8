"""Load the data, the method and the initial models of a run, and check that they fit together."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.algorithms import Algorithm, register_algorithm
from hetero_fl.algorithms.base import is_user_method
from hetero_fl.algorithms.round_parts import shared_parts
from hetero_fl.communication.homomorphic import SharedKey, check_tenseal
from hetero_fl.config import Config, expand_population
from hetero_fl.config.load import Overrides, override_list, override_values
from hetero_fl.config.population import Population, explicit_settings, key_without_effect
from hetero_fl.core.given_models import GivenModel
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.participant import ClientDirectory
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset, FederatedData, federate, load_source
from hetero_fl.data.client_sources import has_common_source, pool_client_files
from hetero_fl.data.overlap import row_hashes
from hetero_fl.data.registry import check_unread_keys
from hetero_fl.engine.driver import translate_user_errors
from hetero_fl.experiment.compatibility import rules, user_code
from hetero_fl.experiment.compatibility.facts import Facts
from hetero_fl.experiment.compatibility.run_facts import RunFacts
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.privacy_budget import PrivacyBudget
from hetero_fl.federation.asynchronous import AsynchronousTrainer
from hetero_fl.federation.executors.base import Executor, TimedExecutor
from hetero_fl.federation.executors.choose import ExecutorChoice, choose_executor, make_executor
from hetero_fl.federation.expected import ExpectedUploads
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.simulation.conditions import is_simulated, simulation_notes
from hetero_fl.federation.simulation.executor import SimulatedExecutor
from hetero_fl.federation.store import (
    EarlierVersionError,
    PrivateState,
    StateStore,
    checkpoint_files,
    read_checkpoint,
)
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.privacy.accounting import opacus_accountants
from hetero_fl.privacy.server_side import ServerPrivacy
from hetero_fl.reporting.run import Run
from hetero_fl.robustness.attacks import import_user_classes
from hetero_fl.utils.code_permission import AllowCode, also_allow, find_references, hash_modules
from hetero_fl.utils.environment import choose_device
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.objects import OBJECT_PREFIX, find_object
from hetero_fl.utils.recorded_warnings import issue_warnings, record_warnings
from hetero_fl.utils.serialization import CodecError
from hetero_fl.utils.text import pluralize
from model_zoo import ModelError
from model_zoo.generators import own_generators

ExecutorFactory = Callable[
    ["PreparedRun", ExecutorChoice, StateStore], tuple[TimedExecutor, FederationSpec]
]
"""Type of functions that create an executor for clients on other machines.

The functions also return the federation of the server, whose noise may have another source.
"""


# File in the folder of checkpoints with the key that simulated clients share.
SHARED_KEY_FILE = "shared.key"


@dataclass(frozen=True)
class GivenModels:
    """Modules whose weights are the initial weights of clients.

    Args:
        models: The modules, keyed by client id.
    """

    models: Mapping[str, GivenModel]


@dataclass(frozen=True)
class StartingTensors:
    """Initial tensors of clients and server.

    Args:
        clients: Tensors of the clients' models, keyed by client id.
        server: Tensors of the server's models, keyed by slot.
        notes: Lines for the log.
    """

    clients: Mapping[str, Tensors] = field(default_factory=dict)
    server: Mapping[str, Tensors] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def load_into(self, trainer: FederatedTrainer) -> None:
        """Set the models of clients and server to these tensors.

        Raises:
            UserError: If the method changed a model so that the tensors no longer fit.
        """
        states = {c: PrivateState({"model": tensors}) for c, tensors in self.clients.items()}
        trainer.executor.load_states(states)
        for slot, tensors in self.server.items():
            if slot in trainer.server.models:
                own = trainer.server.models[slot]
                if any(n not in own or own[n].shape != t.shape for n, t in tensors.items()):
                    raise UserError(
                        f"algorithm.name={trainer.algorithm.title.lower()} changes the models of "
                        "clients, so they cannot start with given weights; set init='seeded', or "
                        "pass the class of the module"
                    )
                moved = {n: t.to(own[n].device) for n, t in tensors.items()}
                trainer.server.models[slot] = {**own, **moved}


@dataclass
class PreparedRun:
    """A run that is ready to train. No files have been written.

    Args:
        config: The configuration, including the settings that were derived from the data.
        method: The algorithm, configured for these clients.
        federation: Clients, models and settings of the federation.
        data: The data of all clients.
        notes: Lines for the log.
        start: Initial tensors that replace randomly initialized tensors of the clients and the
            server.
        budget: The privacy budget, or None without differential privacy.
        headline: One line with the data, task, method and number of clients.
        kept: Objects that the configuration refers to, which must exist as long as the run.
        deprecations: Warnings about deprecated keys, which have been issued.
    """

    config: Config
    method: Algorithm
    federation: FederationSpec
    data: FederatedData
    notes: list[str]
    start: StartingTensors
    budget: PrivacyBudget | None = None
    headline: str = ""
    kept: tuple[object, ...] = ()
    deprecations: tuple[str, ...] = ()

    def __repr__(self) -> str:
        clients = pluralize(len(self.federation.client_infos), "client")
        rounds = pluralize(self.config.rounds, "round")
        return f"PreparedRun({self.config.name!r}: {self.name}, {clients}, {rounds}; {self.data!r})"

    @property
    def name(self) -> str:
        """Name of the algorithm."""
        return str(self.config.algorithm["name"])

    def inputs(self) -> dict[str, Any]:
        """Return hashes of the data and of the modules that the configuration refers to."""
        code = hash_modules(find_references(self.config.model_dump()))
        return {"data": self.data.content_hash(), "code": code}

    def make_trainer(
        self,
        choice: ExecutorChoice | None = None,
        store: StateStore | None = None,
        log: Callable[[str], None] = lambda _line: None,
        executor_factory: ExecutorFactory | None = None,
    ) -> FederatedTrainer:
        """Create the trainer that runs the rounds.

        The caller must close the trainer's executor after use.

        Args:
            choice: Executor, device and threads to use. If None, they are chosen automatically.
            store: Storage of the clients' state. If None, the state is kept in memory.
            log: Function that is called with each log line.
            executor_factory: Function that creates the executor for clients on other machines. If
                None, the clients train on this machine.

        Returns:
            A trainer for the mode of the run, synchronous or asynchronous, and for clients on this
            machine or on other machines.
        """
        choice = choice or choose_executor(self.config, self.federation)
        config = self.config
        federation = self.federation
        executor: Executor
        if executor_factory is not None:
            executor, federation = executor_factory(self, choice, store or StateStore())
        else:
            clients = self._client_federation(store)
            executor = make_executor(choice, self.method, clients, store, log)
        try:
            if is_simulated(federation, config):
                executor = SimulatedExecutor(executor, self.method, federation, config)
            stop = config.runtime.divergence == "stop"
            arguments = (self.method, federation, executor, config.clients.per_round, stop)
            if config.runtime.mode == "async":
                return AsynchronousTrainer(
                    *arguments,
                    policy=config.cohort,
                    buffer=config.runtime.buffer,
                    staleness=config.runtime.staleness,
                )
            return FederatedTrainer(*arguments, policy=config.cohort)
        except BaseException:
            executor.close()
            raise

    def _client_federation(self, store: StateStore | None) -> FederationSpec:
        """Return the federation of the clients on this machine, with their shared key if needed.

        The key is a file next to the checkpoints. Without checkpoints, it is in memory only.

        Raises:
            UserError: If the key of a resumed run is missing or invalid.
        """
        if self.config.channel.homomorphic is None:
            return self.federation
        if store is None or store.folder is None:
            return replace(self.federation, shared_key=SharedKey.generate())
        path = store.folder / SHARED_KEY_FILE
        if not checkpoint_files(store.folder) and not path.exists():
            SharedKey.generate().save(path)
        return replace(self.federation, shared_key=SharedKey.load(path))


def load_federated_data(
    config: Config, dataset: Dataset | None = None, absent: Collection[str] = ()
) -> FederatedData:
    """Load the configured data, hold out the proxy set and divide the other rows among the clients.

    Args:
        config: The configuration.
        dataset: Data set in memory that replaces the source `data.name`. If None, the configured
            source is loaded.
        absent: Ids of the clients whose rows are on other machines.

    Returns:
        The data of all clients and the server.

    Raises:
        UserError: If the data does not exist or does not fit the configuration.
    """
    clients = expand_population(config.clients)
    if (
        config.data.train_limit is not None
        and config.data.proxy.source is None
        and config.data.proxy.size >= config.data.train_limit
    ):
        raise UserError(
            f"data.proxy.size: must be smaller than data.train_limit={config.data.train_limit}, "
            f"got {config.data.proxy.size}"
        )
    preprocesses = [profile.settings.preprocess for profile in clients.profiles]
    # `federate` later checks, for each client, the columns in which values may be missing.
    allows_missing = any(p.missing or p.columns for p in preprocesses)
    server_preprocess = (
        config.server.preprocess
        if config.server.model and make_algorithm(config).needs.proxy_set != "unused"
        else None
    )
    if dataset is None and not has_common_source(config.data):
        if absent:
            raise UserError(
                "data.path: required if clients keep their files on their machines, because the "
                "test set cannot be drawn from them; name a file with test data"
            )
        dataset, pooled, members = pool_client_files(config.data, clients, allows_missing)
        return federate(dataset, pooled, members, config.seed, server=server_preprocess)
    if dataset is not None:
        check_unread_keys(config.data, "data")
    dataset = dataset or load_source(
        config.data, Path(config.data.root).expanduser(), missing=allows_missing
    )
    return federate(
        dataset, config.data, clients, config.seed, server=server_preprocess, absent=absent
    )


def make_algorithm(config: Config) -> Algorithm:
    """Create the algorithm from the section `algorithm` of a configuration."""
    settings = {k: v for k, v in config.algorithm.items() if k != "name"}
    method: Algorithm = register_algorithm[config.algorithm["name"]].model_validate(settings)
    return method


def check_method(config: Config) -> tuple[Algorithm, Population]:
    """Create the algorithm and the clients, and check what can be checked without the data.

    Raises:
        UserError: If the settings of the configuration cannot be combined.
    """
    method = make_algorithm(config)
    clients = expand_population(config.clients)
    rules.check(Facts(config, clients, method), "config")
    if config.channel.homomorphic is not None:
        check_tenseal()
    return method, clients


@own_generators()
def prepare(
    source: str | Path | Mapping[str, Any] | Config,
    overrides: Overrides = (),
    dataset: Dataset | None = None,
    data: FederatedData | None = None,
    allow_code: AllowCode = False,
) -> PreparedRun:
    """Load and check everything that a run needs, without training.

    No run directory is created. If necessary, the data set is downloaded to `data.root`.

    Args:
        source: A configuration file, a dictionary or a configuration.
        overrides: Changes to the configuration, as `key.path=value` or as a dictionary.
        dataset: Data set in memory that replaces the source `data.name`.
        data: Data that has already been loaded with the same configuration, for all clients or
            only for the clients on this machine. If None, the data is loaded.
        allow_code: Whether code that a file refers to may be executed (see `load_config`).

    Returns:
        The run, ready to train.

    Raises:
        UserError: If configuration, data, models and method do not fit together, or the data cannot
            be loaded.

    Example:
        >>> import hetero_fl
        >>> config = {"data": {"name": "digits"}, "algorithm": {"name": "fedavg"}, "rounds": 1}
        >>> prepared = hetero_fl.prepare(config, overrides=["clients.count=3"])
        >>> prepared.name
        'fedavg'
        >>> list(prepared.federation.client_infos.clients.ids)
        ['client_1', 'client_2', 'client_3']
    """
    with record_warnings() as recorded:
        config = load_config(source, overrides, allow_code)
    issue_warnings(recorded, set())
    deprecations = [each.text for each in recorded if each.category is FutureWarning]
    _check_defaults(config, override_list(overrides))
    permission = also_allow(allow_code, find_references(config.model_dump()))
    method, clients = check_method(config)
    data = data or load_federated_data(config, dataset)
    student = method.needs.proxy_set != "unused" and data.n_proxy > 0
    federation = FederationSpec.from_config(config, data, clients, student)
    headline = _headline(config, dataset, federation.task, len(clients))
    if config.privacy is not None:
        federation = replace(federation, privacy=config.privacy.with_placeholder_noise())
    with translate_user_errors():
        method, derived = method.configure(federation.client_infos)
        models = _models_of_clients(method, federation.client_infos)
    federation = federation.with_models(models)
    name = config.algorithm["name"]
    config = config.model_copy(
        update={"algorithm": {"name": name, **method.model_dump(mode="json")}}
    )
    import_user_classes(config.aggregation, config.attacks)
    facts = RunFacts(config, method, federation)
    rules.check(facts, "run")
    if is_user_method(method):
        user_code.check_user_method(facts)
    rules.check(facts, "uploads")
    notes = [*data.notes, *derived, *rules.notes(facts)]
    notes += _describe_user_models(federation.client_infos)
    if facts.is_async:
        config, federation = _set_asynchronous(facts)
    config, federation, budget = _solve_privacy(config, method, federation)
    if budget is not None:
        notes.append(budget.description())
    notes += user_code.check_user_code(federation)
    choose_device(config.runtime.device)
    notes += simulation_notes(federation, config)
    start = starting_tensors(config.init_from, federation, permission)
    return PreparedRun(
        config,
        method,
        federation,
        data,
        [*notes, *start.notes],
        start,
        budget,
        headline,
        deprecations=tuple(dict.fromkeys(deprecations)),
    )


def _check_defaults(config: Config, overrides: Sequence[str]) -> None:
    """Raise UserError if an override sets a default that all groups of clients replace.

    In a file, such a default may be meant for clients that join later.
    """
    layers = [explicit_settings(group) for group in config.clients.groups]
    for override in overrides:
        clients = override_values(override).get("clients")
        given = clients.get("defaults") if isinstance(clients, dict) else None
        if isinstance(given, dict) and (key := key_without_effect(given, layers)):
            raise UserError(
                f"clients.defaults.{key}: has no effect, because every client sets "
                f"{key.partition('.')[0]} itself; remove it"
            )


def _describe_user_models(client_infos: ClientDirectory) -> list[str]:
    """Return one line for each user-defined model, which names its head."""
    user_models = {
        profile.arch: None for profile in client_infos.profiles if profile.arch.is_user_defined
    }
    return [
        f"model {arch.display_name}: the head is "
        f"{repr(arch.head_path) if arch.head_path else 'the model'}, "
        f"on {pluralize(arch.feature_width, 'feature')}"
        for arch in user_models
    ]


def _models_of_clients(
    method: Algorithm, client_infos: ClientDirectory
) -> list[Mapping[str, ModelSpec]] | dict[str, Mapping[str, ModelSpec]]:
    """Return the models of each client, keyed by the client's model slots.

    Returns:
        A dictionary keyed by client id if the models of the method differ between clients, or else
        a list with an entry for each client profile, which is a set of equally configured clients.

    Raises:
        UserError: If the method cannot create a model.
    """
    try:
        if method.needs.models_per_client:
            return {client_id: method.models(info) for client_id, info in client_infos.items()}
        return [method.models(client_infos[p.first]) for p in client_infos.profiles]
    except ModelError as error:
        slot = next(iter(shared_parts(method)), "model")
        raise UserError(f"algorithm.{slot}: {error}") from None


def _headline(config: Config, dataset: Dataset | None, task: Task, clients: int) -> str:
    """Describe data, task, method and number of clients in one line, and mark defaults."""
    explicit_keys = {"name", "count", "groups"}
    data = f"data: {config.data.name if dataset is None else dataset.name}"
    if dataset is None and not explicit_keys & config.data.model_fields_set:
        data += " (default)"
    data += f", {task.describe()}"
    method = f"method: {config.algorithm['name']}"
    if "algorithm" not in config.model_fields_set:
        method += " (default)"
    population = pluralize(clients, "client")
    if not explicit_keys & config.clients.model_fields_set:
        population += " (default)"
    return f"{data}; {method}; {population}"


def _set_asynchronous(run: RunFacts) -> tuple[Config, FederationSpec]:
    """Return the configuration and the federation for asynchronous training.

    The number of rounds of the federation, which learning rate schedules use, is set to the
    expected number of server updates.
    """
    runtime = run.config.runtime.model_copy(update={"mode": "async"})
    versions = max(1, math.ceil(run.num_uploads / run.buffer_size))
    config = run.config.model_copy(update={"runtime": runtime})
    return config, replace(run.federation, num_rounds=versions)


def _solve_privacy(
    config: Config, method: Algorithm, federation: FederationSpec
) -> tuple[Config, FederationSpec, PrivacyBudget | None]:
    """Compute the noise multiplier and the privacy budget of a run.

    Returns:
        The configuration and the federation, both with the noise multiplier, and the privacy
        budget. Without differential privacy, the first two are unchanged and the budget is None.
    """
    privacy = config.privacy
    if privacy is None:
        return config, federation, None
    if privacy.unit == "record" or privacy.accountant == "rdp" or privacy.poisson_cohorts:
        opacus_accountants()
    budget = PrivacyBudget.for_run(
        privacy,
        method,
        federation,
        rounds=config.rounds,
        per_round=config.clients.per_round,
    )
    federation = replace(federation, privacy=budget.privacy)
    expectations = ExpectedUploads(method, federation)
    server = ServerPrivacy.from_federation(
        expectations.privacy, federation, expectations.expected_items, config.clients.per_round
    )
    if server is not None:
        server.update_noise_multiplier()
    return config.model_copy(update={"privacy": budget.privacy}), federation, budget


def starting_tensors(
    init_from: str | None, federation: FederationSpec, permission: AllowCode
) -> StartingTensors:
    """Return the initial tensors for the setting `init_from`.

    Args:
        init_from: A run directory, or `object:NAME`, the name of a `GivenModels` object. If None,
            the result contains no tensors.
        federation: The federation.
        permission: The code that may be executed while models of a run are loaded.

    Raises:
        UserError: If no model of the run fits a client, or if a module does not fit the data of its
            client.
    """
    if init_from is None:
        return StartingTensors()
    if init_from.startswith(OBJECT_PREFIX):
        given: GivenModels = find_object(init_from, "init_from")
        return _from_modules(given.models, federation)
    return _from_run(init_from, federation, permission)


def _from_modules(given: Mapping[str, GivenModel], federation: FederationSpec) -> StartingTensors:
    """Return each client's own weights, and for each family the weights of its first client."""
    own: dict[str, Tensors] = {}
    families: dict[str, Tensors] = {}
    differing: list[str] = []
    for client, model in given.items():
        arch = federation.client_infos[client].arch
        try:
            own[client] = arch.build_given(model)
        except ModelError as error:
            raise UserError(f"clients: '{client}': model: {error}") from None
        first = families.setdefault(arch.family_id, own[client])
        if any(not torch.equal(first[name], tensor) for name, tensor in own[client].items()):
            differing.append(client)
    notes: tuple[str, ...] = ()
    if differing:
        notes = (
            f"modules of {', '.join(differing)} start with other weights than the first client "
            "with the same architecture, whose weights the server starts with",
        )
    return StartingTensors(own, families, notes)


def _from_run(path: str, federation: FederationSpec, permission: AllowCode) -> StartingTensors:
    """Return the tensors of the models in a run that match a client in id and architecture.

    The server's model of a group is the mean over these models.

    Raises:
        UserError: If no model matches.
    """
    try:
        models = Run(path, permission).models
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    known = sorted(
        (position, client_id)
        for client_id in models
        if (position := federation.client_infos.clients.position(client_id)) is not None
    )
    members: dict[str, list[SavedModel]] = {}
    clients: dict[str, Tensors] = {}
    for _, client_id in known:
        model = models[client_id]
        if model.arch == federation.client_infos[client_id].arch:
            # The tensors of a file may not fit the model.
            model.module()
            clients[client_id] = model.tensors
            members.setdefault(model.arch.spec_id, []).append(model)
    if not clients:
        raise UserError(
            f"init_from: no model in {path} fits a client of this run; "
            "client id and model must be the same"
        )
    groups = {
        group: {
            name: torch.stack([model.tensors[name] for model in found]).mean(0)
            for name, tensor in found[0].tensors.items()
            if tensor.is_floating_point()
        }
        for group, found in members.items()
    }
    return StartingTensors(clients, groups)


def prepare_again(run: Run, dataset: Dataset | None = None) -> PreparedRun:
    """Prepare a finished run with its data.

    The data is compared by the hash in the last checkpoint and by the numbers of rows, or without a
    readable checkpoint, such as one of an earlier version, by the numbers of rows only.

    Args:
        run: The finished run.
        dataset: The data set in memory that the run was trained on. If None, the configured data is
            loaded.

    Raises:
        UserError: If the data cannot be loaded, or differs from the data of the run.
    """
    prepared = prepare(run.config(), dataset=dataset, allow_code=run.permission)
    data = prepared.data
    known = run.summary["data"]
    sizes = {"n_train": data.n_train, "n_proxy": data.n_proxy, "n_test": data.n_test}
    content_hash = _content_hash(run)
    if any(known[key] != size for key, size in sizes.items()) or (
        content_hash is not None and content_hash != data.content_hash()
    ):
        raise UserError(
            f"{run.path}: the data differs from the data that this run was trained on; restore "
            "it, or pass it as dataset="
        )
    return prepared


def _content_hash(run: Run) -> str | None:
    """Return the hash of the data in the last checkpoint, or None if no checkpoint is readable."""
    checkpoints = checkpoint_files(run.path / "checkpoint")
    if not checkpoints:
        return None
    try:
        return read_checkpoint(checkpoints[-1])[0].get("data")
    except (CodecError, EarlierVersionError, OSError):
        return None


def num_training_rows(prepared: PreparedRun, x: Tensor) -> int:
    """Return the number of raw rows that are training rows of a run.

    Args:
        prepared: The run. The result is 0 if its rows have another shape.
        x: Raw rows, `[N, ...]`.
    """
    if tuple(x.shape[1:]) != prepared.data.input_shape:
        return 0
    given = row_hashes(x)
    seen = np.zeros(len(given), dtype=bool)
    for rows in prepared.data.private_rows():
        seen |= np.isin(given, row_hashes(rows))
    return int(seen.sum())


def note_on_training_rows(
    prepared: PreparedRun, x: Tensor, rows: str, models: str = "the models"
) -> list[str]:
    """Return a note if raw rows are training rows of a run, or an empty list.

    Args:
        prepared: The run.
        x: Raw rows, `[N, ...]`.
        rows: Description of the rows.
        models: Description of the models whose scores are too optimistic.
    """
    count = num_training_rows(prepared, x)
    if not count:
        return []
    verb = "is also in the run's" if count == 1 else "are also in the run's"
    return [f"{count} of {rows} {verb} training rows: scores are too optimistic for {models}"]
