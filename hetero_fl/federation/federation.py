"""Specification of a federation: the clients, their models and their data.

A slot is the name of a model of a participant, such as "model". Clients with the same settings and
models have the same profile (see `ClientProfile`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from hetero_fl.communication.homomorphic import SharedKey
from hetero_fl.communication.secure_aggregation.crypto import SiteKeys
from hetero_fl.config.clients import ClientSettings, ModelConfig
from hetero_fl.config.communication import ChannelConfig
from hetero_fl.config.population import Population
from hetero_fl.config.protection import AggregationConfig, PrivacyConfig
from hetero_fl.config.schema import Config
from hetero_fl.core.metrics import MetricFunction, Scores, apply_metric, score
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.participant import (
    ClientDirectory,
    Columns,
    Participant,
    RoundContext,
    copy_tensors,
    copy_tree,
)
from hetero_fl.core.task import Task
from hetero_fl.data import Examples, FederatedData, Preprocess
from hetero_fl.engine.device_memory import CPU, DeviceMemory
from hetero_fl.engine.driver import translate_user_errors
from hetero_fl.federation.store import PrivateState
from hetero_fl.privacy.noise import KeyedNoiseSource, NoiseSource, noisy_label_counts
from hetero_fl.robustness.attacks import CountsFunction, DataFunction, MaliciousClients
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.objects import resolve_object
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.registry import import_reference
from hetero_fl.utils.seeding import sample_numbers
from model_zoo import ModelError, model_options

SERVER = "server"
# Of more than MAX_EVALUATED clients, only NUM_REPRESENTATIVE are evaluated by default.
MAX_EVALUATED = 1000
NUM_REPRESENTATIVE = 100


def protect(arch: ModelSpec, privacy: PrivacyConfig | None) -> ModelSpec:
    """Return a model of which clients share what the noise on uploads protects."""
    if privacy is None or privacy.unit == "record":
        return arch
    return replace(arch, shares_trained_only=True)


def as_sender(server: Participant, client_id: str) -> Participant:
    """Return the server as the sender of a broadcast to a client.

    The random draws of the broadcast depend on the client.
    """
    return replace(server, participant_id=f"{server.participant_id} to {client_id}", stream_uses={})


@dataclass
class FederationSpec:
    """Specification of a federation: clients, models, data and settings.

    The specification does not change during a run. Participants are created for each task and
    dropped afterwards.

    Attributes:
        task: The learning task.
        data: The data of all clients and the server.
        client_infos: Information on each client, keyed by client id.
        server_settings: Settings of training at the server.
        server_preprocess: Preprocessing of examples at the server.
        student: The model that the server trains, or None if the server does not train a model.
        seed: Seed of the run.
        num_rounds: Number of rounds of the run.
        common: Prefixes of the names of tensors that all architectures share.
        cohort: Number of clients sampled for a round.
        evaluated_clients: Ids of the clients whose models are evaluated, in the order of the
            configuration.
        representative_clients: Ids of a sample of the clients, from which costs are estimated. If
            there are at most `MAX_EVALUATED` clients, the sample contains all clients.
        channel: Compression of messages.
        aggregation: Aggregation rules.
        malicious: The simulated malicious clients, or None if there are none.
        privacy: Settings of differential privacy, or None if the run is not private.
        noise: Source of the noise for differential privacy. In a deployment, the noise is drawn
            from the random number generator of the operating system.
        shared_key: Key of homomorphic encryption, which the clients share. None at the server.
        site_keys: Keys that sign the keys of a round of secure aggregation.
        metrics: References to user-defined metrics, keyed by name.
        memory: Memory of the device on which participants store tensors.
    """

    task: Task
    data: FederatedData
    client_infos: ClientDirectory
    server_settings: ClientSettings
    server_preprocess: Preprocess
    student: ModelSpec | None
    seed: int
    num_rounds: int
    common: tuple[str, ...] = ()
    cohort: int = 0
    evaluated_clients: Sequence[str] = ()
    representative_clients: Sequence[str] = ()
    channel: ChannelConfig = field(default_factory=ChannelConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    malicious: MaliciousClients | None = None
    privacy: PrivacyConfig | None = None
    noise: NoiseSource = field(default_factory=lambda: KeyedNoiseSource(0))
    shared_key: SharedKey | None = None
    site_keys: SiteKeys = field(default_factory=SiteKeys)
    metrics: Mapping[str, str] = field(default_factory=dict)
    memory: DeviceMemory = field(default_factory=lambda: DeviceMemory(CPU), repr=False)
    _initial: dict[str, Tensors] = field(default_factory=dict, repr=False)

    @classmethod
    def from_config(
        cls,
        config: Config,
        data: FederatedData,
        clients: Mapping[str, ClientSettings],
        student: bool = True,
    ) -> FederationSpec:
        """Build the federation that a configuration describes.

        Each architecture is built once to check the configuration. Malicious clients are excluded
        from `evaluated_clients`.

        Args:
            config: The configuration of the run.
            data: The data of all clients and the server.
            clients: Settings of each client, keyed by client id.
            student: Whether the method can train a model at the server. If False, `student` of the
                federation is None.

        Raises:
            UserError: If the model of a client or of the server cannot be built, if
                `evaluation.clients` is larger than the number of clients, or if every evaluated
                client is malicious.
        """
        population = Population.from_settings(clients)
        archs: list[ModelSpec] = []
        checked: set[ModelSpec] = set()
        for profile in population.profiles:
            view = data.unnormalized_view(
                profile.settings.preprocess, f"clients: '{profile.first}': preprocess"
            )
            arch = build_model_spec(profile.settings.model[0], data, view)
            archs.append(protect(arch, config.privacy))
            if archs[-1] not in checked:
                check_model(archs[-1], f"clients: '{profile.first}': model", view)
                checked.add(archs[-1])
        client_infos = ClientDirectory(population, [{"model": arch} for arch in archs], data)
        server = config.server
        server_view = data.server_preprocess(server.preprocess)
        student_arch = build_model_spec(server.model, data, server_view) if server.model else None
        if student_arch is not None:
            check_model(student_arch, "server.model")
        malicious = None
        if config.attacks:
            malicious = MaliciousClients.from_config(
                config.attacks, population, data.task, config.seed
            )
        evaluated = _sample_evaluated(population, config.evaluation.clients, config.seed)
        return cls(
            task=data.task,
            data=data,
            client_infos=client_infos,
            server_settings=ClientSettings(optimizer=server.optimizer),
            server_preprocess=server_view,
            student=student_arch if student else None,
            seed=config.seed,
            num_rounds=config.rounds,
            common=tuple(config.clients.common),
            cohort=config.cohort.num_sampled(config.clients.per_round, len(population)),
            evaluated_clients=_exclude_malicious(evaluated, malicious),
            representative_clients=_sample_evaluated(population, None, config.seed),
            channel=config.channel,
            aggregation=config.aggregation,
            malicious=malicious,
            privacy=config.privacy,
            noise=KeyedNoiseSource(config.seed),
            metrics=config.evaluation.metrics,
        )

    def score(self, logits: Tensor, y: Tensor, columns: Examples) -> Scores:
        """Compute the metrics of the task and the user-defined metrics.

        Args:
            logits: Outputs, shape `[N, C]`.
            y: Targets, shape `[N]` (classes) or `[N, C]`.
            columns: Further columns of the examples, such as the units of a regression, and the
                excluded classes of a ranking.

        Returns:
            The scores, keyed by the name of the metric.

        Raises:
            RunFailedError: If a user-defined metric raises an exception.
        """
        scores = score(self.task, logits, y, columns.unit, excluded=columns.excluded)
        for name, reference in self.metrics.items():
            function = load_metric(name, reference)
            with translate_user_errors():
                scores[name] = apply_metric(function, self.task, logits, y)
        return scores

    def with_models(
        self, models: Sequence[Mapping[str, ModelSpec]] | Mapping[str, Mapping[str, ModelSpec]]
    ) -> FederationSpec:
        """Return a copy of the federation with other client models.

        Args:
            models: The models, keyed by slot, either for each client profile or keyed by client id.

        Raises:
            UserError: If the model of a client cannot be built.
        """
        known = {profile.arch for profile in self.client_infos.profiles}
        if isinstance(models, Mapping):
            models = {client: self._protect_slots(slots) for client, slots in models.items()}
        else:
            models = [self._protect_slots(slots) for slots in models]
        client_infos = ClientDirectory(self.client_infos.clients, models, self.data)
        for profile in client_infos.profiles:
            for slot, arch in profile.models.items():
                own = f"clients: '{profile.first}': model"
                if arch not in known:
                    check_model(arch, own if slot == "model" else f"algorithm.{slot}")
                known.add(arch)
        return replace(self, client_infos=client_infos)

    def _protect_slots(self, models: Mapping[str, ModelSpec]) -> dict[str, ModelSpec]:
        return {slot: protect(arch, self.privacy) for slot, arch in models.items()}

    def with_memory(self, memory: DeviceMemory) -> FederationSpec:
        """Return the federation with another memory for the tensors of participants.

        If the device does not change, the federation itself is returned.
        """
        if memory.storage_device == self.memory.storage_device:
            return self
        return replace(self, memory=memory, _initial={})

    def initial_tensors(self, arch: ModelSpec) -> Tensors:
        """Return the initial tensors of an architecture, keyed by name.

        The tensors are cached and must not be modified in place.
        """
        if arch.spec_id not in self._initial:
            tensors = self.memory.to_storage(arch.initial_tensors(self.seed))
            self._initial[arch.spec_id] = tensors
        return self._initial[arch.spec_id]

    def changed_tensors(self, client_id: str, models: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Leave out constants of a client's models, such as masks, which `client` adds again.

        Constants are tensors that are not trained and have their initial values.

        Args:
            client_id: The client.
            models: Tensors of the client's models, keyed by slot and name.
        """
        changed = dict(models)
        for slot, arch in self.client_infos[client_id].models.items():
            initial = self.initial_tensors(arch)
            changed[slot] = {
                name: tensor
                for name, tensor in models.get(slot, {}).items()
                if name in arch.trained_names or not torch.equal(tensor, initial[name])
            }
        return {slot: tensors for slot, tensors in changed.items() if tensors}

    @cached_property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.client_infos)

    @cached_property
    def client_ids(self) -> Sequence[str]:
        """Ids of all clients in natural order.

        If not all clients take part in a round, use `client_infos.clients.ids`, which does not
        store the id of each client.
        """
        return list(self.client_infos.clients.ids)

    def round_context(self, round_idx: int, attempt: int = 0) -> RoundContext:
        """Return the context of a round for a participant.

        Args:
            round_idx: Index of the round, from 0.
            attempt: Number of times that the participant has already trained in this round.
        """
        return RoundContext(self.seed, round_idx, self.num_rounds, attempt)

    def sample_cohort(self, count: int | None, round_idx: int) -> list[str]:
        """Sample the clients of a round.

        With `privacy.poisson_cohorts`, each client is sampled independently.

        Args:
            count: Number of clients. With `privacy.poisson_cohorts`, the expected number of
                clients. If None, all clients are returned.
            round_idx: Index of the round, from 0.

        Returns:
            Client ids in natural order.
        """
        if count is not None and self.privacy is not None and self.privacy.poisson_cohorts:
            draws = self.noise.stream(round_idx, "cohort")
            is_sampled = draws.uniform(self.num_clients) < count / self.num_clients
            sampled = is_sampled.nonzero().squeeze(1).tolist()
        elif count is None or count >= self.num_clients:
            return list(self.client_ids)
        else:
            key = (self.seed, round_idx, "cohort")
            sampled = sample_numbers(self.num_clients, count, *key)
        ids = self.client_infos.clients.ids
        return [ids[i] for i in sampled]

    def client(
        self, client_id: str, state: PrivateState, round_idx: int, attempt: int = 0
    ) -> Participant:
        """Create a client with private state, for one task of a round.

        Args:
            client_id: The client.
            state: Private state of the client, which is not modified in place.
            round_idx: Index of the round, from 0.
            attempt: Number of times that the client has already trained in this round.
        """
        client_info = self.client_infos[client_id]
        memory = self.memory
        private = {slot: memory.to_storage(tensors) for slot, tensors in state.models.items()}
        models = {
            slot: {**self.initial_tensors(arch), **private.get(slot, {})}
            for slot, arch in client_info.models.items()
        }
        models = {**private, **models}

        def columns(name: str, preprocess: Any) -> Columns:
            return self.data.columns(client_id, name, preprocess or client_info.preprocess)

        data: DataFunction = columns
        label_counts: CountsFunction = partial(self.label_counts, client_id)
        if self.malicious is not None:
            data, label_counts = self.malicious.poison_data(
                client_id, columns, label_counts, round_idx
            )
        return Participant(
            participant_id=client_id,
            task=self.task,
            arch=dict(client_info.models),
            models=models,
            data=lambda name, preprocess: memory.columns_to_storage(data(name, preprocess)),
            settings=client_info.settings,
            label_counts=lambda: memory.to_storage(label_counts()),
            num_rows=client_info.num_rows,
            has_proxy=client_info.has_proxy,
            peers=self.client_infos,
            state=memory.to_storage(copy_tree(state.state)),
            round_context=self.round_context(round_idx, attempt),
        )

    @property
    def has_noisy_counts(self) -> bool:
        """Whether label counts are noisy, because differential privacy protects single records."""
        return self.privacy is not None and self.privacy.unit == "record"

    def label_counts(self, client_id: str) -> Tensor:
        """Return the number of a client's training examples of each class.

        If `has_noisy_counts` is True, noise is added to the counts.

        Returns:
            Label counts in the default dtype, shape `[outputs]`.
        """
        counts = self.data.label_counts(client_id).to(torch.get_default_dtype())
        if self.privacy is None or not self.has_noisy_counts:
            return counts
        return noisy_label_counts(counts, self.task.kind, self.privacy, self.noise, client_id)

    def server(self) -> Participant:
        """Create the server in the initial state.

        The server has a model for each architecture of the clients, in the slot
        `ModelSpec.spec_id`, and a model in the slot "student" if `student` is not None.
        """
        archs = {profile.arch.spec_id: profile.arch for profile in self.client_infos.profiles}
        models = {slot: dict(self.initial_tensors(arch)) for slot, arch in sorted(archs.items())}
        if self.student is not None:
            archs["student"] = self.student
            models["student"] = dict(self.initial_tensors(self.student))
        return Participant(
            participant_id=SERVER,
            task=self.task,
            arch=archs,
            models={slot: copy_tensors(tensors) for slot, tensors in models.items()},
            data=lambda name, preprocess: self.memory.columns_to_storage(
                self.data.columns(SERVER, name, preprocess or self.server_preprocess)
            ),
            settings=self.server_settings,
            label_counts=lambda: torch.zeros(self.task.outputs, device=self.memory.storage_device),
            has_proxy=self.data.n_proxy > 0,
            peers=self.client_infos,
            common=self.common,
            round_context=self.round_context(0),
        )

    def preprocessing_of(self, slot: str) -> Preprocess:
        """Return the preprocessing of public examples for a model at the server.

        If clients train the model, the preprocessing of the first client (in natural order) with
        the architecture is returned. Otherwise, the preprocessing of the server is returned.

        Args:
            slot: Slot of the model.
        """
        profiles = self.client_infos.profiles
        first = natural_order(p.first for p in profiles if p.arch.spec_id == slot)[:1]
        return self.client_infos[first[0]].preprocess if first else self.server_preprocess


def load_metric(name: str, reference: str) -> MetricFunction:
    """Import a user-defined metric.

    Args:
        name: Name of the metric.
        reference: Reference to the function, such as `python:package.module:function`.

    Raises:
        UserError: If the function cannot be imported.
    """
    function: MetricFunction = import_reference(
        reference, f"evaluation.metrics.{name}", takes="predictions, targets"
    )
    return function


def build_model_spec(model: ModelConfig, data: FederatedData, view: Preprocess) -> ModelSpec:
    """Create the specification of a configured model.

    Args:
        model: Configuration of the model.
        data: The federated data, which determine the input shape, number of outputs and vocabulary.
        view: Preprocessing of the participant that uses the model.
    """
    arch = ModelSpec.from_config(
        model.name,
        data.task.outputs,
        view.shape(tuple(data.input_shape)),
        model.feature_dim,
        _fill_blocks(model, view),
        pretrained=model.pretrained,
        vocabulary=data.vocabulary.size if data.vocabulary else None,
    )
    return arch.without_caches()


def _fill_blocks(model: ModelConfig, view: Preprocess) -> dict[str, Any]:
    """Return the model's options, with the `blocks` of the preprocessing if required."""
    known = model_options(resolve_object(model.name, "model"))
    if view.blocks and "blocks" not in model.options and known.get("blocks", 0) in ((), None):
        return {**model.options, "blocks": tuple(tuple(block) for block in view.blocks)}
    return model.options


def _sample_evaluated(clients: Population, num_evaluated: int | None, seed: int) -> list[str]:
    default = len(clients) if len(clients) <= MAX_EVALUATED else NUM_REPRESENTATIVE
    count = num_evaluated or default
    if count > len(clients):
        raise UserError(
            f"evaluation.clients: must be <= {len(clients)}, the number of clients, got {count}"
        )
    if count == len(clients):
        return list(clients)
    sampled = [clients.ids[i] for i in sample_numbers(len(clients), count, seed, "evaluation")]
    return sorted(sampled, key=lambda client_id: clients.position(client_id) or (0, 0))


def _exclude_malicious(client_ids: list[str], malicious: MaliciousClients | None) -> list[str]:
    if malicious is None:
        return client_ids
    honest = [client_id for client_id in client_ids if client_id not in malicious.ids]
    if not honest:
        raise UserError(
            "attacks: every evaluated client is malicious; "
            "attack fewer clients or increase evaluation.clients"
        )
    return honest


def check_model(arch: ModelSpec, where: str, view: Preprocess | None = None) -> None:
    """Check that a model can be created and trained.

    Args:
        arch: Specification of the model.
        where: Prefix of error messages.
        view: Preprocessing of the inputs, which error messages explain.

    Raises:
        UserError: If the model cannot be created or trained.
    """
    try:
        arch.check()
    except ModelError as error:
        inputs = ""
        if view is not None and view.missing is not None and not view.blocks:
            count = arch.input_shape[0] // 2
            inputs = f"; preprocess.missing=indicate makes {count} columns and {count} indicators"
        raise UserError(f"{where}: {str(error).removeprefix('model ')}{inputs}") from None


def describe_settings(settings: ClientSettings) -> dict[str, Any]:
    """Return the client settings that differ from the defaults, as JSON content."""
    return settings.model_dump(mode="json", exclude_defaults=True)
