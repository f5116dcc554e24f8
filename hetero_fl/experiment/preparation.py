"""Everything about a run before it computes: configuration, data and method, loaded and checked together."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hetero_fl.algorithms import Algorithm, register_algorithm
from hetero_fl.algorithms.base import shared_part_of
from hetero_fl.algorithms.local_training import load_objective
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
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset, FederatedData, federate, load_source
from hetero_fl.data.client_files import has_common_source, pool_client_files
from hetero_fl.engine.driver import translate_user_errors
from hetero_fl.experiment.compatibility import (
    RULES_ON_LOADING,
    CompatibilityRule,
    check_compatibility,
    check_rules,
)
from hetero_fl.experiment.facts import ConfigFacts, RunFacts
from hetero_fl.experiment.privacy_budget import PrivacyBudget
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
from hetero_fl.reporting.run import Run
from hetero_fl.utils.code_permission import CONTEXT, OWN, CodePermission, find_references
from hetero_fl.utils.environment import choose_device
from hetero_fl.utils.errors import UserError, closest
from hetero_fl.utils.text import pluralize
from model_zoo import ModelError

# has somebody else compute the clients
Engage = Callable[["PreparedRun", ExecutorChoice, StateStore], RemoteExecutor]


@dataclass
class PreparedRun:
    """Everything about a run that is known before it computes; nothing has been written."""

    config: Config
    method: Algorithm
    federation: FederationSpec
    data: FederatedData
    notes: list[str]
    inherited: dict[str, SavedModel]  # models of another run to start from, by client
    budget: PrivacyBudget | None = None  # of a private run
    headline: str = ""  # data, task, method and number of clients, with what is a default

    def __repr__(self) -> str:
        clients = pluralize(len(self.federation.client_infos), "client")
        rounds = pluralize(self.config.rounds, "round")
        return f"Prepared({self.config.name!r}: {self.name}, {clients}, {rounds}; {self.data!r})"

    @property
    def name(self) -> str:
        """The algorithm's name."""
        return str(self.config.algorithm["name"])

    def make_trainer(
        self,
        choice: ExecutorChoice | None = None,
        store: StateStore | None = None,
        say: Callable[[str], None] = lambda line: None,
        executor_factory: Engage | None = None,
    ) -> FederatedTrainer:
        """The run itself, to be held round by round; in memory unless a store is given, computed as chosen by the rule
        unless a choice is, and here unless somebody else is engaged for it. Close its executor afterwards.
        """
        choice = choice or choose_executor(self.config, self.federation)
        clients = self.config.clients
        apart = (
            executor_factory(self, choice, store or StateStore())
            if executor_factory is not None
            else None
        )
        executor = apart or make_executor(choice, self.method, self.federation, store, say)
        stop = self.config.runtime.divergence == "stop"
        try:
            environment = SimulationEnvironment.from_config(
                self.federation, self.config, apart.connected_clients if apart is not None else None
            )
            runtime = self.config.runtime
            about = (self.method, self.federation, executor, clients.per_round, stop)
            if runtime.mode == "async":
                kind = AsynchronousTrainer if apart is None else RemoteAsynchronousTrainer
                return kind(
                    *about,
                    environment=environment,
                    buffer=runtime.buffer,
                    staleness=runtime.staleness,
                )
            if apart is not None:
                return RemoteSynchronousTrainer(*about, environment=environment)
            if environment.simulated:
                return SimulatedTrainer(*about, environment=environment)
            policy = environment.policy
            if policy.sampling == "uniform" and policy.too_few != "repeat":
                return SynchronousTrainer(*about, policy=policy)
            return ScheduledTrainer(*about, environment=environment)
        except BaseException:
            executor.close()
            raise


def load_federated_data(
    config: Config, dataset: Dataset | None = None, absent: Collection[str] = ()
) -> FederatedData:
    """The data as the configuration has it: loaded, split into public and private, dealt out. `absent`: clients whose rows lie
    on machines of their own. Raises UserError for whatever is wrong with it."""
    clients = expand_population(config.clients)
    if (
        config.data.train_limit is not None
        and config.data.proxy.source is None
        and config.data.proxy.size >= config.data.train_limit
    ):
        raise UserError(
            f"data.proxy.size: found {config.data.proxy.size}, but data.train_limit leaves {config.data.train_limit} rows"
        )
    views = [kind.settings.preprocess for kind in clients.profiles]
    # then federate looks at what each of them sees
    known = any(view.missing or view.columns for view in views)
    own_view = (
        config.server.preprocess
        if config.server.model and make_algorithm(config).needs.proxy_set != "unused"
        else None
    )
    if dataset is None and not has_common_source(config.data):
        if absent:
            raise UserError(
                "data.path: missing; without a common file the test set is drawn from all clients' files, which real sites do "
                "not bring together; name a common file"
            )
        dataset, pooled, members = pool_client_files(config.data, clients, known)
        return federate(dataset, pooled, members, config.seed, server=own_view)
    dataset = dataset or load_source(
        config.data, Path(config.data.root).expanduser(), missing=known
    )
    return federate(dataset, config.data, clients, config.seed, server=own_view, absent=absent)


def make_algorithm(config: Config) -> Algorithm:
    """Return the method of a configuration, with its settings."""
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
    """Load, build and check everything; trains and writes nothing.

    Args:
        source: A file, a dictionary or a configuration.
        overrides: Changes, `key.path=value`, or a dictionary of them.
        dataset: examples in memory in place of `data.name`.
        data: what `load_federated_data` made of the same configuration, all of it or what one of several machines has.
        allow_code: Whether code that a file names may run (see `load_config`).

    Raises:
        UserError: whatever is wrong.
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
    if facts.is_async:
        config, federation = _set_asynchronous(facts)
    config, federation, budget = _solve_privacy(config, method, federation)
    if budget is not None:
        notes.append(budget.description())
    notes += compatibility_notes(LATER_NOTES, facts)
    for own in {kind.settings.objective for kind in clients.profiles}:
        load_objective(own, federation.task)
    choose_device(config.runtime.device)
    notes += SimulationEnvironment.from_config(federation, config).notes()
    return PreparedRun(
        config,
        method,
        federation,
        data,
        notes,
        _load_inherited_models(config.init_from, federation, permission),
        budget,
        headline,
    )


def _models_of_clients(
    method: Algorithm, client_infos: ClientDirectory
) -> list[Mapping[str, ModelSpec]] | dict[str, Mapping[str, ModelSpec]]:
    """Return the models by slot of each client profile, or of each client by id."""
    try:
        if method.needs.models_per_client:
            return {client_id: method.models(info) for client_id, info in client_infos.items()}
        return [method.models(client_infos[p.first]) for p in client_infos.profiles]
    except ModelError as error:
        raise UserError(f"algorithm.{shared_part_of(method).slot}: {error}") from None


def _headline(config: Config, dataset: Dataset | None, task: Task, clients: int) -> str:
    """Return which data, task, method and number of clients a run has, each marked if it was not written."""
    written = {"name", "count", "groups"}
    data = f"data: {config.data.name if dataset is None else dataset.name}"
    if dataset is None and not written & config.data.model_fields_set:
        data += " (default)"
    data += f", {task.describe()}"
    method = f"method: {config.algorithm['name']}"
    if "algorithm" not in config.model_fields_set:
        method += " (default)"
    who = pluralize(clients, "client")
    if not written & config.clients.model_fields_set:
        who += " (default)"
    return f"{data}; {method}; {who}"


def _set_asynchronous(run: RunFacts) -> tuple[Config, FederationSpec]:
    """Return configuration and federation of an asynchronous run.

    Such a run has as many versions as its uploads make: learning rates move along them.
    """
    runtime = run.config.runtime.model_copy(update={"mode": "async"})
    versions = max(1, math.ceil(run.num_uploads / run.buffer_size))
    config = run.config.model_copy(update={"runtime": runtime})
    return config, replace(run.federation, num_rounds=versions)


def _solve_privacy(
    config: Config, method: Algorithm, federation: FederationSpec
) -> tuple[Config, FederationSpec, PrivacyBudget | None]:
    """The same with privacy's noise solved for, and what each round will have spent; None without privacy."""
    if config.privacy is None:
        return config, federation, None
    privacy = config.privacy
    if privacy.unit == "record" or privacy.accountant == "rdp" or privacy.poisson_cohorts:
        opacus_accountants()
    budget = PrivacyBudget.for_run(
        config.privacy, method, federation, config.rounds, config.clients.per_round
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


def _load_inherited_models(
    path: str | None, federation: FederationSpec, permission: CodePermission
) -> dict[str, SavedModel]:
    """The models of another run that fit clients of this one: same id, same architecture."""
    if path is None:
        return {}
    try:
        models = Run(path, permission).models
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    known = sorted(
        (place, id)
        for id in models
        if (place := federation.client_infos.clients.position(id)) is not None
    )
    fitting = {
        id: models[id] for _, id in known if models[id].arch == federation.client_infos[id].arch
    }
    if not fitting:
        raise UserError(
            f"init_from: none of the models in {path} fits a client of this run (same id, same model)"
        )
    return fitting


# What works but may not be meant.

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
        "channel.secure_sum.neighbours: {run.secure_sum.neighbours} are fewer than the {found} "
        "that keep an upload hidden though a fifth of all clients tell the server what they know",
    ),
    CompatibilityRule(
        ("channel.compress", "channel.secure_sum"),
        lambda run: run.secure_sum is not None and bool(run.config.channel.compress),
        "channel.compress rounds what clients add up; under channel.secure_sum it makes no "
        "message shorter",
    ),
    CompatibilityRule(
        ("channel.secure_sum", "model"),
        lambda run: run.secure_sum and run.clients_alone_in_sum(),
        "channel.secure_sum hides nothing of some items for {found}: no other client sends such "
        "tensors, and their sum is what the client has",
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
        "{run.name} averages within an architecture: {groups} {verb} alone",
    ),
    # Robust aggregation and attacks
    CompatibilityRule(
        ("aggregation.rule", "algorithm.name"),
        lambda run: run.rules and run.unprotected_items(),
        "aggregation.{key} is mean: a malicious client among the senders of {items} is not held "
        "back",
    ),
    CompatibilityRule(
        ("aggregation.rule", "algorithm.name"),
        lambda run: run.rules and sorted({n for n, how in run.dry_round[1] if how == "counts"}),
        "{found} are summed as sent: a malicious client's are not held back",
    ),
    CompatibilityRule(
        ("attacks.name", "clients"),
        lambda run: run.named_malicious(),
        "{count:,} of {run.num_clients:,} clients are malicious ({run.config.attacks.name}, from "
        "round {run.config.attacks.from_round}): {ids}; all figures are means over the others",
    ),
    # Asynchronous runs
    CompatibilityRule(
        ("runtime.mode", "algorithm.name"),
        lambda run: run.is_async and run.config.runtime.mode == "sync",
        "runtime.mode is async: {run.name} aggregates uploads as they come",
    ),
    CompatibilityRule(
        ("runtime.staleness", "runtime.mode"),
        lambda run: run.is_async and run.staleness.unused_keys,
        "{run.staleness_key}.{found} is not used: staleness is {run.staleness.kind}",
    ),
    CompatibilityRule(
        ("runtime.staleness", "runtime.buffer"),
        lambda run: (
            run.is_async
            and run.buffer_size == 1
            and run.policy.staleness is None
            and run.staleness.kind != "constant"
        ),
        "runtime.staleness has no effect: a version is one upload here (runtime.buffer), and the "
        "mean of one is that one whatever its weight; fedasync moves the server less the staler "
        "an upload is",
    ),
    CompatibilityRule(
        ("devices", "runtime.mode"),
        lambda run: (
            run.is_async and run.config.devices is None and not run.federation.data.is_distributed
        ),
        "without `devices` no task takes any time: all that are given out together end together",
    ),
)
"""Lines on combinations that work."""

LATER_NOTES: tuple[CompatibilityRule[RunFacts], ...] = (
    CompatibilityRule(
        ("privacy.delta", "clients"),
        lambda run: run.weakly_protected(),
        "privacy.delta: {run.privacy.delta:g} is not below one over {found}: one of them may be "
        "given away whole",
    ),
    CompatibilityRule(
        ("server.model", "data.proxy.size"),
        lambda run: run.config.server.model and run.federation.student is None,
        "server.model is not used: without a consensus on a proxy set there is nothing to distill "
        "a student from",
    ),
    CompatibilityRule(
        ("evaluation.clients", "clients"),
        lambda run: run.num_evaluated(),
        "the models of {found:,} of {run.num_clients:,} clients are read, each time the same "
        "(evaluation.clients)",
    ),
)
"""Lines that follow the one on the privacy budget."""


def compatibility_notes(notes: Iterable[CompatibilityRule[RunFacts]], run: RunFacts) -> list[str]:
    """Return a line for each combination that works but may not be meant."""
    return [line for note in notes for line in note.lines(run)]


# A configuration is loaded and checked before anything that it names is imported.


@dataclass(frozen=True)
class DraftConfig:
    """A configuration of the right form whose algorithm has not been looked up; nothing that it names is imported.

    Args:
        config: The configuration.
        raw: The same as plain values, as they were written.
        overrides: Overrides that are part of it.
        source: The file, for error messages.
        written: What the file has, without overrides.
    """

    config: Config
    raw: dict[str, Any]
    overrides: list[str]
    source: str
    written: dict[str, Any]

    @property
    def code_references(self) -> dict[str, str]:
        """References to code, each with the key that names it."""
        written = find_references(self.raw)
        return {
            name: written.get(name, key)
            for name, key in find_references(self.config.model_dump()).items()
        }

    def key_source(self, key: str) -> str:
        """Return where a key was set: the last override that names it, else the file."""
        where = self.source
        for override in self.overrides:
            named = override.partition("=")[0]
            where = override if key == named or key.startswith(f"{named}.") else where
        return where

    def error(self, line: str) -> UserError:
        """Return the error for a line that begins with a key, after the place where the key was set.

        If the error is one of a section as a whole, this is the last override within it without which the error is not made,
        or the last one within it if each of several makes the error.
        """
        key = line.partition(": ")[0]
        where = self.key_source(key)
        # The search applies other combinations of overrides, and must not import what one of them names.
        names_code = bool(find_references([self.raw, self.written])) or any(
            OWN in o for o in self.overrides
        )
        if where == self.source and not names_code:
            where = self._override_in(key, line) or where
        return UserError(f"{where}: {line}")

    def _override_in(self, section: str, line: str) -> str | None:
        inside = [o for o in self.overrides if section == "here" or o.startswith(f"{section}.")]
        if not inside or _find_mistake(self.written, []) == line:
            return None
        for override in reversed(inside):
            if _find_mistake(self.written, [o for o in self.overrides if o != override]) != line:
                return override
        outside = [o for o in self.overrides if o not in inside]
        return inside[-1] if _find_mistake(self.written, outside) != line else None


def load_config(
    source: Source, overrides: Overrides = (), allow_code: bool | CodePermission = False
) -> Config:
    """Load and check a configuration.

    A file with the keys of the classic tutorial (see `hetero_fl.config.load`) is translated. When an override names
    another algorithm than the file, the file's settings of its own algorithm are dropped.

    Args:
        source: A YAML or JSON file, a dictionary, or another configuration.
        overrides: Changes, `key.path=value`, or a dictionary of them.
        allow_code: Whether code that a file names (`python:package.module:Name`) may run. Names in a dictionary or in
            `overrides` are the caller's own and always allowed.

    Raises:
        UserError: In one line that names the place, for everything that is wrong with the configuration.
    """
    overrides = override_list(overrides)
    draft = draft_config(source, overrides)
    permission = CodePermission.from_argument(allow_code).with_written(source, overrides)
    permission.check(draft.code_references, draft.key_source)
    config = draft.config
    if draft.code_references:
        try:
            config = Config.model_validate(draft.raw, context={CONTEXT: True})
        except ValidationError as error:
            raise draft.error(describe_error(error, draft.raw)) from None
    made = config.model_copy(update={"algorithm": _load_algorithm_config(draft, permission)})
    if "algorithm" not in config.model_fields_set:
        # the copy has it among the keys that were written
        made.model_fields_set.discard("algorithm")
    return made


def draft_config(source: Source, overrides: Overrides = ()) -> DraftConfig:
    """Read a configuration and check its form, without importing anything that it names. Raises UserError."""
    where = str(source) if isinstance(source, str | Path) else "configuration"
    raw = read_config_file(Path(source)) if isinstance(source, str | Path) else plain(source)
    if not raw and isinstance(source, str | Path):
        raise UserError(f"{where}: has no keys; name at least data, clients and algorithm")
    overrides = override_list(overrides)
    if is_tutorial(raw):
        raw, overrides = translate_tutorial(raw, overrides, where)
    made = apply_overrides(raw, overrides)
    try:
        return DraftConfig(Config.model_validate(made), made, overrides, where, raw)
    except ValidationError as error:
        unread = DraftConfig(Config(), made, overrides, where, raw)
        raise unread.error(describe_error(error, made, own=_method_keys(made))) from None


def _find_mistake(raw: dict[str, Any], overrides: Sequence[str]) -> str | None:
    """Return what is wrong with a configuration that names no code, None if nothing is."""
    try:
        made = apply_overrides(raw, overrides)
        _settings(Config.model_validate(made).algorithm)
    except ValidationError as error:
        return describe_error(error, made, own=_method_keys(made))
    except UserError as error:
        return str(error)
    return None


def _load_algorithm_config(draft: DraftConfig, permission: CodePermission) -> dict[str, Any]:
    """Return the algorithm's settings, complete with its defaults. Raises UserError with the key's place."""
    try:
        settings = _settings(draft.config.algorithm)
    except UserError as error:
        raise draft.error(str(error)) from None
    found = {name: f"algorithm.{key}" for name, key in find_references(settings).items()}
    permission.check(found, draft.key_source)
    try:
        return _settings(draft.config.algorithm, {CONTEXT: True}) if found else settings
    except UserError as error:
        raise draft.error(str(error)) from None


def _settings(
    given: Mapping[str, Any], context: Mapping[str, bool] | None = None
) -> dict[str, Any]:
    if "name" not in given and (meant := closest("name", given)) is not None:
        raise UserError(f"algorithm.{meant}: unknown key; did you mean 'name'?")
    if not isinstance(given.get("name"), str):
        raise UserError(
            f"algorithm.name: found {given.get('name')!r}; choose from {', '.join(register_algorithm)}"
        )
    try:
        kind = register_algorithm[given["name"]]
    except UserError as error:
        raise UserError(f"algorithm.name: {error}") from None
    own = {k: v for k, v in given.items() if k != "name"}
    try:
        return {"name": given["name"], **kind.model_validate(own, context=context).model_dump()}
    except ValidationError as error:
        raise UserError(
            f"{describe_error(error, own, kind, ['algorithm'])} (of {given['name']})"
        ) from None


def _method_keys(raw: Mapping[str, Any]) -> list[str]:
    """The settings of the algorithm that a configuration names, whatever else is wrong with it."""
    named = raw.get("algorithm")
    name = named.get("name") if isinstance(named, dict) else None
    return (
        list(register_algorithm[name].model_fields)
        if isinstance(name, str) and name in register_algorithm
        else []
    )
