"""The federation: who takes part, with which model, on which data; and participants made from it for one task at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hetero_fl.config.clients import ClientSettings, ModelConfig
from hetero_fl.config.communication import ChannelConfig
from hetero_fl.config.population import Population
from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.config.robustness import AggregationConfig
from hetero_fl.config.schema import Config
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
from hetero_fl.data import FederatedData, Preprocess
from hetero_fl.engine.device_memory import CPU, DeviceMemory
from hetero_fl.federation.state_store import PrivateState
from hetero_fl.privacy.mechanisms import KeyedNoiseSource, NoiseSource, noisy_label_counts
from hetero_fl.robustness.attacks import CountsFunction, DataFunction, MaliciousClients
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.seeding import Key, sample_numbers
from model_zoo import ModelError, model_options

SERVER = "server"
MANY = 1000
SOME = 100  # of more clients than MANY only SOME are read, if nothing else is said


@dataclass
class FederationSpec:
    """The fixed facts of a run. Participants are made from them when they are needed and dropped afterwards."""

    task: Task
    data: FederatedData
    client_infos: ClientDirectory
    server_settings: ClientSettings
    server_preprocess: Preprocess
    student: ModelSpec | None
    seed: int
    num_rounds: int
    common: tuple[str, ...] = ()
    cohort: int = 0  # clients invited to a round
    # the clients whose models are read, in the order of the configuration
    evaluated_clients: Sequence[str] = ()
    # those who stand for all where everybody would have to be asked; all of up to MANY
    representative_clients: Sequence[str] = ()
    channel: ChannelConfig = field(default_factory=ChannelConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    malicious: MaliciousClients | None = None
    privacy: PrivacyConfig | None = None
    noise: NoiseSource = field(
        default_factory=lambda: KeyedNoiseSource(0)
    )  # a deployment's participants draw theirs from the system
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
        """Build and check every architecture once; `student`: whether the method can train one at the server.

        Raises UserError naming the client whose model cannot be made, and for more readings than there are clients. Of liars,
        if there are any, no model is read.
        """
        population = Population.from_settings(clients)
        archs: list[ModelSpec] = []
        checked: set[ModelSpec] = set()
        for kind in population.profiles:
            view = data.unnormalized_view(
                kind.settings.preprocess, f"clients: '{kind.first}': preprocess"
            )
            archs.append(build_model_spec(kind.settings.model[0], data, view))
            if archs[-1] not in checked:
                _check_model(archs[-1], f"clients: {kind.first}: model")
                checked.add(archs[-1])
        client_infos = ClientDirectory(population, [{"model": arch} for arch in archs], data)
        server = config.server
        server_view = data.server_preprocess(server.preprocess)
        student_arch = build_model_spec(server.model, data, server_view) if server.model else None
        if student_arch is not None:
            _check_model(student_arch, "server.model")
        settings = ClientSettings(optimizer=server.optimizer)
        common = tuple(config.clients.common)
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
            server_settings=settings,
            server_preprocess=server_view,
            student=student_arch if student else None,
            seed=config.seed,
            num_rounds=config.rounds,
            common=common,
            cohort=config.cohort.num_sampled(config.clients.per_round, len(population)),
            evaluated_clients=_exclude_malicious(evaluated, malicious),
            representative_clients=_sample_evaluated(population, None, config.seed),
            channel=config.channel,
            aggregation=config.aggregation,
            malicious=malicious,
            privacy=config.privacy,
            noise=KeyedNoiseSource(config.seed),
        )

    def with_models(
        self, models: Sequence[Mapping[str, ModelSpec]] | Mapping[str, Mapping[str, ModelSpec]]
    ) -> FederationSpec:
        """Return the federation with these models, by slot, of each client profile (or of each client, by id).

        Raises UserError naming a client whose own model cannot be made.
        """
        known = {kind.arch for kind in self.client_infos.profiles}
        client_infos = ClientDirectory(self.client_infos.clients, models, self.data)
        for kind in client_infos.profiles:
            if kind.arch not in known:
                _check_model(kind.arch, f"clients: {kind.first}: model")
        return replace(self, client_infos=client_infos)

    def with_memory(self, memory: DeviceMemory) -> FederationSpec:
        """Return the federation whose participants store their tensors as this memory says."""
        if memory.storage_device == self.memory.storage_device:
            return self
        return replace(self, memory=memory, _initial={})

    def initial_tensors(self, arch: ModelSpec) -> Tensors:
        """The tensors that every participant with this architecture starts from. Do not change them in place."""
        if arch.spec_id not in self._initial:
            made = self.memory.to_storage(arch.initial_tensors(self.seed))
            self._initial[arch.spec_id] = made
        return self._initial[arch.spec_id]

    def round_context(self, round_idx: int, attempt: int = 0) -> RoundContext:
        """Where the run stands in that round (from 0), for somebody who trained in it so often before."""
        return RoundContext(self.seed, round_idx, self.num_rounds, attempt)

    def sample_cohort(self, count: int | None, round_idx: int, attempt: int = 0) -> list[str]:
        """Return the clients of a round, in id order: all, or `count` of them drawn by key.

        With `privacy.poisson_cohorts` each client takes part by a draw of its own; `count` is then
        the mean.
        """
        ids = self.client_infos.clients.ids
        if count is not None and self.privacy is not None and self.privacy.poisson_cohorts:
            draws = self.noise.stream(round_idx, "cohort")
            taken = draws.uniform(len(ids)) < count / len(ids)
            return [ids[i] for i in taken.nonzero().squeeze(1).tolist()]
        if count is None or count >= len(ids):
            return list(ids)
        key = (self.seed, round_idx, "cohort", *attempt_key(attempt))
        return [ids[i] for i in sample_numbers(len(ids), count, *key)]

    def client(
        self, client_id: str, state: PrivateState, round_idx: int, attempt: int = 0
    ) -> Participant:
        """A client, with what it keeps privately, ready for one task of that round."""
        client_info = self.client_infos[client_id]
        memory = self.memory
        kept = {slot: memory.to_storage(tensors) for slot, tensors in state.models.items()}
        models = {
            slot: {**self.initial_tensors(arch), **kept.get(slot, {})}
            for slot, arch in client_info.models.items()
        }
        models = {**kept, **models}

        def columns(name: str, through: Any) -> Columns:
            return self.data.columns(client_id, name, through or client_info.preprocess)

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
            data=lambda name, through: memory.columns_to_storage(data(name, through)),
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
        """Whether clients know their label counts with noise only: where privacy protects records."""
        return self.privacy is not None and self.privacy.unit == "record"

    def label_counts(self, client_id: str) -> Tensor:
        """Label counts of a client's training rows, `[outputs]`, in the default dtype; with noise where records are private."""
        counts = self.data.label_counts(client_id).to(torch.get_default_dtype())
        if self.privacy is None or not self.has_noisy_counts:
            return counts
        return noisy_label_counts(counts, self.task.kind, self.privacy, self.noise, client_id)

    def server(self) -> Participant:
        """The server before the first round: a model for each architecture, and the student if one is asked for."""
        archs = {kind.arch.spec_id: kind.arch for kind in self.client_infos.profiles}
        models = {slot: dict(self.initial_tensors(arch)) for slot, arch in sorted(archs.items())}
        if self.student is not None:
            archs["student"] = self.student
            models["student"] = dict(self.initial_tensors(self.student))
        return Participant(
            participant_id=SERVER,
            task=self.task,
            arch=archs,
            models={slot: copy_tensors(tensors) for slot, tensors in models.items()},
            data=lambda name, through: self.memory.columns_to_storage(
                self.data.columns(SERVER, name, through or self.server_preprocess)
            ),
            settings=self.server_settings,
            label_counts=lambda: torch.zeros(self.task.outputs, device=self.memory.storage_device),
            has_proxy=self.data.n_proxy > 0,
            peers=self.client_infos,
            common=self.common,
            round_context=self.round_context(0),
        )

    def preprocessing_of(self, slot: str) -> Preprocess:
        """How a model at the server sees public examples: as the group's first client does, or as the server itself."""
        members = [kind.first for kind in self.client_infos.profiles if kind.arch.spec_id == slot]
        return self.client_infos[members[0]].preprocess if members else self.server_preprocess


def attempt_key(attempt: int) -> tuple[Key, ...]:
    """Return the part of a random stream's key that tells a repeated round from the first try."""
    return ("attempt", attempt) if attempt else ()


def build_model_spec(model: ModelConfig, data: FederatedData, view: Preprocess) -> ModelSpec:
    """The model of the configuration, for the shape in which its owner sees examples."""
    shape = view.shape(tuple(data.input_shape))
    words = data.vocabulary.size if data.vocabulary else None
    about = (model.feature_dim, _fill_blocks(model, view), model.pretrained, words)
    return ModelSpec.from_config(model.name, data.task.outputs, shape, *about)


def _fill_blocks(model: ModelConfig, view: Preprocess) -> dict[str, Any]:
    """The model's options; one that asks for `blocks` and was given none gets those that its owner sees."""
    known = model_options(model.name)
    if view.blocks and "blocks" not in model.options and known.get("blocks", 0) in ((), None):
        return {**model.options, "blocks": tuple(tuple(block) for block in view.blocks)}
    return model.options


def _sample_evaluated(clients: Population, num_evaluated: int | None, seed: int) -> list[str]:
    """Everybody, or so many as are asked for, drawn once for the whole run."""
    count = num_evaluated or (len(clients) if len(clients) <= MANY else SOME)
    if count > len(clients):
        raise UserError(f"evaluation.clients: found {count}, but there are {len(clients)} clients")
    if count == len(clients):
        return list(clients)
    drawn = [clients.ids[i] for i in sample_numbers(len(clients), count, seed, "evaluation")]
    return sorted(drawn, key=lambda id: clients.position(id) or (0, 0))


def _exclude_malicious(client_ids: list[str], malicious: MaliciousClients | None) -> list[str]:
    honest = [id for id in client_ids if malicious is None or id not in malicious.ids]
    if not honest:
        raise UserError(
            "attacks: everybody whose model is read lies; leave some honest, or raise evaluation.clients"
        )
    return honest


def _check_model(arch: ModelSpec, where: str) -> None:
    try:
        arch.check()
    except ModelError as error:
        raise UserError(f"{where}: {error}") from None


def describe_settings(settings: ClientSettings) -> dict[str, Any]:
    """What differs from the defaults, for reports."""
    return settings.model_dump(mode="json", exclude_defaults=True)
