"""Load the configuration, data and method of a run, and check that they fit together."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hetero_fl.algorithms import Algorithm, register_algorithm
from hetero_fl.algorithms.base import shared_part_of
from hetero_fl.config import Config, expand_population
from hetero_fl.config.errors import describe_error
from hetero_fl.config.load import (
    Overrides,
    Source,
    apply_overrides,
    is_tutorial,
    override_list,
    plain,
    read_config_file,
    translate_tutorial,
)
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import ClientDirectory
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset, FederatedData, federate, load_source
from hetero_fl.data.client_files import has_common_source, pool_client_files
from hetero_fl.engine.driver import translate_user_errors
from hetero_fl.experiment.compatibility import (
    RULES_ON_LOADING,
    CompatibilityRule,
    ConfigFacts,
    RunFacts,
    check_compatibility,
    check_rules,
    check_user_code,
)
from hetero_fl.experiment.privacy_budget import PrivacyBudget
from hetero_fl.experiment.starting_models import StartingTensors, starting_tensors
from hetero_fl.federation.asynchronous import AsynchronousTrainer
from hetero_fl.federation.channel import idle_stages
from hetero_fl.federation.dry_run import ExpectedUploads
from hetero_fl.federation.executors.base import RemoteExecutor
from hetero_fl.federation.executors.choose import ExecutorChoice, choose_executor, make_executor
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.real_time import RemoteAsynchronousTrainer, RemoteSynchronousTrainer
from hetero_fl.federation.simulation.rounds import ScheduledTrainer, SimulatedTrainer
from hetero_fl.federation.simulation.schedule import SimulationEnvironment
from hetero_fl.federation.state_store import StateStore
from hetero_fl.federation.synchronous import SynchronousTrainer
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.privacy.accounting import opacus_accountants
from hetero_fl.privacy.server_side import ServerPrivacy
from hetero_fl.utils.code_permission import ALLOW_CODE, CODE_PREFIX, CodePermission, find_references
from hetero_fl.utils.environment import choose_device
from hetero_fl.utils.errors import UserError, closest
from hetero_fl.utils.objects import OBJECT_PREFIX, iterate_objects
from hetero_fl.utils.text import pluralize
from model_zoo import ModelError

ExecutorFactory = Callable[["PreparedRun", ExecutorChoice, StateStore], RemoteExecutor]
"""Function that creates an executor for clients that train on other machines."""


@dataclass
class PreparedRun:
    """A run that is ready to train. No files have been written.

    Args:
        config: The configuration, including the settings that were derived from the data.
        method: The algorithm, configured for these clients.
        federation: Clients, models and settings of the federation.
        data: The data of all clients.
        notes: Lines for the log.
        start: Initial tensors of the clients and the server that replace the random ones.
        budget: The privacy budget; None for a run without privacy.
        headline: Data, task, method and number of clients in one line.
        kept: Objects that the configuration names, which must exist as long as the run.
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

    def __repr__(self) -> str:
        clients = pluralize(len(self.federation.client_infos), "client")
        rounds = pluralize(self.config.rounds, "round")
        return f"PreparedRun({self.config.name!r}: {self.name}, {clients}, {rounds}; {self.data!r})"

    @property
    def name(self) -> str:
        """The name of the algorithm."""
        return str(self.config.algorithm["name"])

    def make_trainer(
        self,
        choice: ExecutorChoice | None = None,
        store: StateStore | None = None,
        log: Callable[[str], None] = lambda _line: None,
        executor_factory: ExecutorFactory | None = None,
    ) -> FederatedTrainer:
        """Create the trainer that runs the rounds. Its executor must be closed after use.

        Args:
            choice: Executor, device and threads to use. None: chosen automatically.
            store: Storage of the clients' state. None: in memory.
            log: Function called with each log line.
            executor_factory: Function that creates the executor if the clients train on other
                machines. None: the clients train on this machine.

        Returns:
            The trainer for the mode of the run and the location of the clients.
        """
        choice = choice or choose_executor(self.config, self.federation)
        clients = self.config.clients
        remote = (
            executor_factory(self, choice, store or StateStore())
            if executor_factory is not None
            else None
        )
        executor = remote or make_executor(choice, self.method, self.federation, store, log)
        stop = self.config.runtime.divergence == "stop"
        try:
            connected = remote.connected_clients if remote is not None else None
            environment = SimulationEnvironment.from_config(self.federation, self.config, connected)
            runtime = self.config.runtime
            arguments = (self.method, self.federation, executor, clients.per_round, stop)
            if runtime.mode == "async":
                trainer_type = AsynchronousTrainer if remote is None else RemoteAsynchronousTrainer
                return trainer_type(
                    *arguments,
                    environment=environment,
                    buffer=runtime.buffer,
                    staleness=runtime.staleness,
                )
            if remote is not None:
                return RemoteSynchronousTrainer(*arguments, environment=environment)
            if environment.simulated:
                return SimulatedTrainer(*arguments, environment=environment)
            policy = environment.policy
            if policy.sampling == "uniform" and policy.too_few != "repeat":
                return SynchronousTrainer(*arguments, policy=policy)
            return ScheduledTrainer(*arguments, environment=environment)
        except BaseException:
            executor.close()
            raise


def load_federated_data(
    config: Config, dataset: Dataset | None = None, absent: Collection[str] = ()
) -> FederatedData:
    """Load the configured data, split off the public rows and partition the rest among the clients.

    Args:
        config: The configuration.
        dataset: Examples in memory that replace `data.name`.
        absent: Ids of clients whose rows are on other machines.

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
    # If missing values are allowed here, `federate` checks the columns of each client.
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
    dataset = dataset or load_source(
        config.data, Path(config.data.root).expanduser(), missing=allows_missing
    )
    return federate(
        dataset, config.data, clients, config.seed, server=server_preprocess, absent=absent
    )


def make_algorithm(config: Config) -> Algorithm:
    """Return the configured algorithm."""
    settings = {k: v for k, v in config.algorithm.items() if k != "name"}
    method: Algorithm = register_algorithm[config.algorithm["name"]].model_validate(settings)
    return method


def prepare(
    source: str | Path | Mapping[str, Any] | Config,
    overrides: Overrides = (),
    dataset: Dataset | None = None,
    data: FederatedData | None = None,
    allow_code: bool | CodePermission = False,
) -> PreparedRun:
    """Load and check everything that a run needs, without training or writing files.

    Args:
        source: A configuration file, a dictionary or a configuration.
        overrides: Changes to the configuration, `key.path=value`, or a dictionary of them.
        dataset: Examples in memory that replace `data.name`.
        data: Data that has already been loaded from the same configuration, for all clients or
            only for the clients on this machine.
        allow_code: Whether code that a file refers to may be executed (see `load_config`).

    Returns:
        The run, ready to train.

    Raises:
        UserError: If configuration, data, models and method do not fit together.

    Example:
        >>> import hetero_fl
        >>> config = {"data": {"name": "digits"}, "algorithm": {"name": "fedavg"}, "rounds": 1}
        >>> prepared = hetero_fl.prepare(config, overrides=["clients.count=3"])
        >>> prepared.name
        'fedavg'
        >>> list(prepared.federation.client_infos.clients.ids)
        ['client_1', 'client_2', 'client_3']
    """
    config = load_config(source, overrides, allow_code)
    permission = CodePermission.from_argument(allow_code).with_granted(
        find_references(config.model_dump())
    )
    clients = expand_population(config.clients)
    method = make_algorithm(config)
    check_rules(RULES_ON_LOADING, ConfigFacts(config, clients, method))
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
    facts = RunFacts(config, method, federation)
    check_compatibility(facts)
    notes = [*data.notes, *derived, *compatibility_notes(NOTES, facts)]
    notes += _describe_user_models(federation.client_infos)
    if facts.is_async:
        config, federation = _set_asynchronous(facts)
    config, federation, budget = _solve_privacy(config, method, federation)
    if budget is not None:
        notes.append(budget.description())
    notes += compatibility_notes(LATER_NOTES, facts)
    check_user_code(federation)
    choose_device(config.runtime.device)
    notes += SimulationEnvironment.from_config(federation, config).notes()
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
    )


def _describe_user_models(client_infos: ClientDirectory) -> list[str]:
    """Return a line with the head of each model that is the user's own."""
    own = {
        profile.arch: None
        for profile in client_infos.profiles
        if profile.arch.name.startswith((CODE_PREFIX, OBJECT_PREFIX))
    }
    return [
        f"model {arch.display_name}: the head is '{arch.head_path}', "
        f"on {pluralize(arch.feature_width, 'feature')}"
        for arch in own
    ]


def _models_of_clients(
    method: Algorithm, client_infos: ClientDirectory
) -> list[Mapping[str, ModelSpec]] | dict[str, Mapping[str, ModelSpec]]:
    """Return the models by slot, for each client profile or for each client id."""
    try:
        if method.needs.models_per_client:
            return {client_id: method.models(info) for client_id, info in client_infos.items()}
        return [method.models(client_infos[p.first]) for p in client_infos.profiles]
    except ModelError as error:
        raise UserError(f"algorithm.{shared_part_of(method).slot}: {error}") from None


def _headline(config: Config, dataset: Dataset | None, task: Task, clients: int) -> str:
    """Return data, task, method and number of clients in one line, with defaults marked."""
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
    """Return the configuration and the federation of an asynchronous run.

    The number of rounds in the federation, which learning rate schedules use, is set to the number
    of server versions.
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
        The configuration and the federation with the noise multiplier, and the budget; None
        without privacy.
    """
    if config.privacy is None:
        return config, federation, None
    privacy = config.privacy
    if privacy.unit == "record" or privacy.accountant == "rdp" or privacy.poisson_cohorts:
        opacus_accountants()
    budget = PrivacyBudget.for_run(
        config.privacy,
        method,
        federation,
        rounds=config.rounds,
        per_round=config.clients.per_round,
    )
    privacy = budget.solved_privacy()
    federation = replace(federation, privacy=privacy)
    expectations = ExpectedUploads(method, federation)
    server = ServerPrivacy.from_federation(
        expectations.privacy, federation, expectations.expected_items, config.clients.per_round
    )
    if server is not None:
        server.check_count_noise()
    return (
        config.model_copy(update={"privacy": privacy}),
        federation,
        replace(budget, privacy=privacy),
    )


NOTES: tuple[CompatibilityRule[RunFacts], ...] = (
    CompatibilityRule(
        ("channel", "algorithm.name"),
        lambda run: idle_stages(run.name, run.algorithm, run.federation),
        "{found}",
    ),
    # Secure aggregation
    CompatibilityRule(
        ("channel.secure_sum.neighbours", "clients.per_round"),
        lambda run: run.needed_neighbors(),
        "channel.secure_sum.neighbours: {run.secure_sum.neighbours} may reveal uploads if a fifth "
        "of all clients collude with the server; use {found} or more",
    ),
    CompatibilityRule(
        ("channel.compress", "channel.secure_sum"),
        lambda run: run.secure_sum is not None and bool(run.config.channel.compress),
        "channel.compress rounds the values that clients upload; with channel.secure_sum it does "
        "not make messages smaller",
    ),
    CompatibilityRule(
        ("channel.secure_sum", "model"),
        lambda run: run.secure_sum and run.clients_alone_in_sum(),
        "channel.secure_sum does not hide some items of {found}: no other client uploads these "
        "tensors, so their sum equals the client's upload",
    ),
    # Methods
    CompatibilityRule(
        ("algorithm.initial_phase", "data.proxy.labels"),
        lambda run: run.algorithm.needs.proxy_set == "labeled",
        "{run.name} trains on the labels of the proxy set before a client's first round "
        "(algorithm.initial_phase)",
    ),
    CompatibilityRule(
        ("algorithm.name", "model"),
        lambda run: run.architectures_alone(),
        "{run.name} averages clients with the same architecture: {groups} {verb} only one client",
    ),
    CompatibilityRule(
        ("algorithm.align", "data set"),
        lambda run: run.idle_class_settings(),
        "{found}, because the data set has a {run.task.kind} task",
    ),
    CompatibilityRule(
        ("recalibrate", "data.proxy.size"),
        lambda run: run.idle_recalibration(),
        "{found} has no effect without a proxy set (data.proxy.size is 0)",
    ),
    # Robust aggregation and attacks
    CompatibilityRule(
        ("aggregation.rule", "algorithm.name"),
        lambda run: run.rules and run.unprotected_items(),
        "aggregation.{key}=mean: {items} of malicious clients are averaged without protection",
    ),
    CompatibilityRule(
        ("aggregation.rule", "algorithm.name"),
        lambda run: run.rules and sorted({n for n, how in run.dry_round[1] if how == "counts"}),
        "{found} are summed without protection from malicious clients",
    ),
    CompatibilityRule(
        ("attacks.name", "clients"),
        lambda run: run.named_malicious(),
        "{count:,} of {run.num_clients:,} clients are malicious ({run.config.attacks.name}, from "
        "round {run.config.attacks.from_round}): {ids}; scores are means over the other clients",
    ),
    # Asynchronous runs
    CompatibilityRule(
        ("runtime.mode", "algorithm.name"),
        lambda run: run.is_async and run.config.runtime.mode == "sync",
        "runtime.mode=async: {run.name} aggregates uploads as they arrive",
    ),
    CompatibilityRule(
        ("runtime.staleness", "runtime.mode"),
        lambda run: run.is_async and run.staleness.unused_keys,
        "{run.staleness_key}.{found} is ignored because the staleness kind is {run.staleness.kind}",
    ),
    CompatibilityRule(
        ("runtime.staleness", "runtime.buffer"),
        lambda run: (
            run.is_async
            and run.buffer_size == 1
            and run.policy.staleness is None
            and run.staleness.kind != "constant"
        ),
        "runtime.staleness has no effect with runtime.buffer=1: the weighted mean of one upload is "
        "that upload; consider algorithm.name=fedasync, whose server steps shrink with staleness",
    ),
    CompatibilityRule(
        ("devices", "runtime.mode"),
        lambda run: (
            run.is_async and run.config.devices is None and not run.federation.data.is_distributed
        ),
        "devices: not set, so tasks take no time and tasks that start together end together",
    ),
)
"""Notes on combinations of settings that work but may not be intended."""

LATER_NOTES: tuple[CompatibilityRule[RunFacts], ...] = (
    CompatibilityRule(
        ("privacy.delta", "clients"),
        lambda run: run.weakly_protected(),
        "privacy.delta: {run.privacy.delta:g} allows a mechanism that reveals one of {found}; "
        "choose less than one over their number",
    ),
    CompatibilityRule(
        ("server.model", "data.proxy.size"),
        lambda run: run.config.server.model and run.federation.student is None,
        "server.model is ignored: a server model is distilled from a consensus on a proxy set, "
        "which this run does not have",
    ),
    CompatibilityRule(
        ("evaluation.clients", "clients"),
        lambda run: run.num_evaluated(),
        "evaluation.clients: every evaluation uses the same {found:,} of {run.num_clients:,} "
        "clients",
    ),
)
"""Notes that are shown after the privacy budget."""


def compatibility_notes(notes: Iterable[CompatibilityRule[RunFacts]], run: RunFacts) -> list[str]:
    """Return a line for each note that applies to a run."""
    return [line for note in notes for line in note.lines(run)]


@dataclass(frozen=True)
class DraftConfig:
    """A configuration that was checked without importing the code that it refers to.

    Args:
        config: The configuration. The settings of the algorithm have not been checked.
        raw: The configuration as plain values, with overrides.
        overrides: The overrides, `key.path=value`.
        source: Name of the configuration file, for error messages.
        written: The configuration as plain values, without overrides.
    """

    config: Config
    raw: dict[str, Any]
    overrides: list[str]
    source: str
    written: dict[str, Any]

    @property
    def code_references(self) -> dict[str, str]:
        """References to code, each with the key that contains it."""
        written = find_references(self.raw)
        return {
            name: written.get(name, key)
            for name, key in find_references(self.config.model_dump()).items()
        }

    def key_source(self, key: str) -> str:
        """Return where a key was set: the last override that contains the key, or else the file."""
        where = self.source
        for override in self.overrides:
            named = override.partition("=")[0]
            where = override if key == named or key.startswith(f"{named}.") else where
        return where

    def error(self, line: str) -> UserError:
        """Return an error whose message is prefixed with the origin of the key.

        If the key is a whole section, the origin is the last override within the section without
        which the error disappears, or the last of several overrides that cause the error.

        Args:
            line: Error message that begins with a key.
        """
        key = line.partition(": ")[0]
        where = self.key_source(key)
        # The search tries other combinations of overrides and must not import code.
        names_code = bool(find_references([self.raw, self.written])) or any(
            CODE_PREFIX in o for o in self.overrides
        )
        if where == self.source and not names_code:
            where = self._override_in(key, line) or where
        return UserError(f"{where}: {line}")

    def _override_in(self, section: str, line: str) -> str | None:
        inside = [o for o in self.overrides if section == "here" or o.startswith(f"{section}.")]
        if not inside or _find_error(self.written, []) == line:
            return None
        for override in reversed(inside):
            if _find_error(self.written, [o for o in self.overrides if o != override]) != line:
                return override
        outside = [o for o in self.overrides if o not in inside]
        return inside[-1] if _find_error(self.written, outside) != line else None


def load_config(
    source: Source, overrides: Overrides = (), allow_code: bool | CodePermission = False
) -> Config:
    """Load and check a configuration.

    If an override selects a different algorithm than the file, the algorithm settings in the file
    are ignored. JSON files in the format of a well-known tutorial (see `hetero_fl.config.load`) are
    translated.

    Args:
        source: A YAML or JSON file, a dictionary, or another configuration.
        overrides: Changes to the configuration, `key.path=value`, or a dictionary of them.
        allow_code: Whether code that a file refers to (`python:package.module:Name`) may be
            executed. References in a dictionary or in `overrides` are always allowed.

    Returns:
        The validated configuration, with all defaults.

    Raises:
        UserError: If the configuration is invalid; the message names the key.

    Example:
        >>> import hetero_fl
        >>> config = hetero_fl.load_config({"rounds": 5}, overrides=["algorithm.name=fedprox"])
        >>> config.rounds
        5
        >>> config.algorithm["mu"]
        0.01
        >>> hetero_fl.load_config({"round": 5})
        Traceback (most recent call last):
        hetero_fl.utils.errors.UserError: configuration: round: unknown key; did you mean 'rounds'?
    """
    overrides = override_list(overrides)
    draft = draft_config(source, overrides)
    permission = CodePermission.from_argument(allow_code).with_caller_references(source, overrides)
    permission.check(draft.code_references, draft.key_source)
    if isinstance(source, str | Path):
        for key, value in iterate_objects(draft.raw):
            raise draft.error(
                f"{key}: '{value}' is an object of a Python program, which a file cannot name"
            )
    config = draft.config
    if draft.code_references:
        try:
            config = Config.model_validate(draft.raw, context={ALLOW_CODE: True})
        except ValidationError as error:
            raise draft.error(describe_error(error, draft.raw)) from None
    loaded = config.model_copy(update={"algorithm": _load_algorithm_config(draft, permission)})
    if "algorithm" not in config.model_fields_set:
        # `model_copy` marks it as set explicitly.
        loaded.model_fields_set.discard("algorithm")
    return loaded


def draft_config(source: Source, overrides: Overrides = ()) -> DraftConfig:
    """Read and check a configuration without importing the code that it refers to.

    Args:
        source: A YAML or JSON file, a dictionary, or another configuration.
        overrides: Changes to the configuration, `key.path=value`, or a dictionary of them.

    Raises:
        UserError: If the configuration is invalid.
    """
    where = str(source) if isinstance(source, str | Path) else "configuration"
    raw = read_config_file(Path(source)) if isinstance(source, str | Path) else plain(source)
    if not raw and isinstance(source, str | Path):
        raise UserError(f"{where}: has no keys; expected at least data, clients and algorithm")
    overrides = override_list(overrides)
    if is_tutorial(raw):
        raw, overrides = translate_tutorial(raw, overrides, where)
    values = apply_overrides(raw, overrides)
    try:
        return DraftConfig(Config.model_validate(values), values, overrides, where, raw)
    except ValidationError as error:
        draft = DraftConfig(Config(), values, overrides, where, raw)
        raise draft.error(describe_error(error, values, own=_method_keys(values))) from None


def _find_error(raw: dict[str, Any], overrides: Sequence[str]) -> str | None:
    """Return the first error in a configuration without references to code, or None."""
    try:
        values = apply_overrides(raw, overrides)
        _validate_algorithm(Config.model_validate(values).algorithm)
    except ValidationError as error:
        return describe_error(error, values, own=_method_keys(values))
    except UserError as error:
        return str(error)
    return None


def _load_algorithm_config(draft: DraftConfig, permission: CodePermission) -> dict[str, Any]:
    """Return the settings of the algorithm with all defaults.

    Raises:
        UserError: If a setting is invalid. The message contains where it was set.
    """
    try:
        settings = _validate_algorithm(draft.config.algorithm)
    except UserError as error:
        raise draft.error(str(error)) from None
    found = {name: f"algorithm.{key}" for name, key in find_references(settings).items()}
    permission.check(found, draft.key_source)
    try:
        return (
            _validate_algorithm(draft.config.algorithm, {ALLOW_CODE: True}) if found else settings
        )
    except UserError as error:
        raise draft.error(str(error)) from None


def _validate_algorithm(
    section: Mapping[str, Any], context: Mapping[str, bool] | None = None
) -> dict[str, Any]:
    if "name" not in section and (misspelled := closest("name", section)) is not None:
        raise UserError(f"algorithm.{misspelled}: unknown key; did you mean 'name'?")
    name = section.get("name")
    if not isinstance(name, str):
        raise UserError(
            f"algorithm.name: expected the name of a method, got {name!r}; "
            f"choose from {', '.join(register_algorithm)}"
        )
    try:
        algorithm_type = register_algorithm[name]
    except UserError as error:
        raise UserError(f"algorithm.name: {str(error).removeprefix('algorithm: ')}") from None
    settings = {key: value for key, value in section.items() if key != "name"}
    try:
        validated = algorithm_type.model_validate(settings, context=context)
    except ValidationError as error:
        problem = describe_error(error, settings, algorithm_type, ["algorithm"])
        raise UserError(f"{problem} (algorithm.name={name})") from None
    return {"name": name, **validated.model_dump()}


def _method_keys(raw: Mapping[str, Any]) -> list[str]:
    """Return the names of the algorithm's settings; empty if the algorithm is unknown."""
    section = raw.get("algorithm")
    name = section.get("name") if isinstance(section, dict) else None
    return (
        list(register_algorithm[name].model_fields)
        if isinstance(name, str) and name in register_algorithm
        else []
    )
