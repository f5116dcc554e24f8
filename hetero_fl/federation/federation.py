"""The federation: who takes part, with which model, on which data; and participants made from it for one task at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hetero_fl.config.clients import ClientSettings, ModelConfig
from hetero_fl.config.communication import ChannelConfig
from hetero_fl.config.population import Population
from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.config.robustness import AggregationConfig
from hetero_fl.config.schema import Config
from hetero_fl.core.model_spec import Architecture, Tensors
from hetero_fl.core.participant import Clock, Columns, Participant, Roster, copied, own
from hetero_fl.core.task import Task
from hetero_fl.data import FederatedData, Preprocess
from hetero_fl.federation.state_store import Private
from hetero_fl.privacy.mechanisms import KeyedNoise, Noise, noised_counts
from hetero_fl.robustness.attacks import Liars
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.seeding import sample
from model_zoo import ModelError, model_options

SERVER = "server"
MANY, SOME = 1000, 100  # of more clients than MANY only SOME are read, if nothing else is said


@dataclass
class Federation:
    """The fixed facts of a run. Participants are made from them when they are needed and dropped afterwards."""

    task: Task
    data: FederatedData
    cards: Roster
    server_settings: ClientSettings
    server_preprocess: Preprocess
    student: Architecture | None
    seed: int
    rounds: int
    common: tuple[str, ...] = ()
    cohort: int = 0  # clients invited to a round
    # the clients whose models are read, in the order of the configuration
    readers: Sequence[str] = ()
    # those who stand for all where everybody would have to be asked; all of up to MANY
    some: Sequence[str] = ()
    channel: ChannelConfig = field(default_factory=ChannelConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    liars: Liars | None = None
    privacy: PrivacyConfig | None = None
    noise: Noise = field(
        default_factory=lambda: KeyedNoise(0)
    )  # a deployment's participants draw theirs from the system
    _initial: dict[str, Tensors] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        config: Config,
        data: FederatedData,
        clients: Mapping[str, ClientSettings],
        student: bool = True,
    ) -> Federation:
        """Build and check every architecture once; `student`: whether the method can train one at the server.

        Raises UserError naming the client whose model cannot be made, and for more readings than there are clients. Of liars,
        if there are any, no model is read.
        """
        population = Population.of(clients)
        archs: list[Architecture] = []
        checked: set[Architecture] = set()
        for kind in population.kinds:
            view = data.plain(kind.settings.preprocess, f"clients: '{kind.first}': preprocess")
            archs.append(architecture(kind.settings.model[0], data, view))
            if archs[-1] not in checked:
                _check(archs[-1], f"clients: {kind.first}: model")
                checked.add(archs[-1])
        cards = Roster(population, archs, data)
        server = config.server
        server_view = data.server_preprocess(server.preprocess)
        student_arch = architecture(server.model, data, server_view) if server.model else None
        if student_arch is not None:
            _check(student_arch, "server.model")
        settings = ClientSettings(optimizer=server.optimizer)
        common = tuple(config.clients.common)
        liars = (
            Liars.of(config.attacks, population, data.task, config.seed) if config.attacks else None
        )
        return cls(
            data.task, data, cards, settings, server_view, student_arch if student else None, config.seed, config.rounds, common,
            config.cohort.invited(config.clients.per_round, len(population)),
            _honest(_drawn(population, config.evaluation.clients, config.seed), liars), _drawn(population, None, config.seed),
            config.channel, config.aggregation, liars, config.privacy, KeyedNoise(config.seed),
        )  # fmt: skip

    def with_models(self, archs: Sequence[Architecture] | Mapping[str, Architecture]) -> Federation:
        """The same federation, each kind of clients (or each client, by id) with its one of these models.

        Raises UserError naming a client whose model cannot be made.
        """
        known, cards = (
            {kind.arch for kind in self.cards.kinds},
            Roster(self.cards.clients, archs, self.data),
        )
        for kind in cards.kinds:
            if kind.arch not in known:
                _check(kind.arch, f"clients: {kind.first}: model")
        return replace(self, cards=cards)

    def initial(self, arch: Architecture) -> Tensors:
        """The tensors that every participant with this architecture starts from. Do not change them in place."""
        if arch.id not in self._initial:
            self._initial[arch.id] = arch.initial(self.seed)
        return self._initial[arch.id]

    def clock(self, round: int, again: int = 0) -> Clock:
        """Where the run stands in that round (from 0), for somebody who trained in it so often before."""
        return Clock(self.seed, round, self.rounds, again)

    def client(self, id: str, private: Private, round: int, again: int = 0) -> Participant:
        """A client, with what it keeps privately, ready for one task of that round."""
        card = self.cards[id]
        models = {"model": {**self.initial(card.arch), **private.models.get("model", {})}}
        models |= {
            slot: dict(tensors) for slot, tensors in private.models.items() if slot != "model"
        }

        def columns(name: str, through: Any) -> Columns:
            return self.data.columns(id, name, through or card.preprocess)

        seen = (
            (columns, self.counts(id))
            if self.liars is None
            else self.liars.seen(id, columns, self.counts(id), round)
        )
        return Participant(
            id=id,
            task=self.task,
            arch={"model": card.arch},
            models=models,
            data=seen[0],
            settings=card.settings,
            counts=seen[1],
            n=card.n,
            has_proxy=self.data.has_proxy(card.preprocess),
            peers=self.cards,
            state=copied(private.state),
            clock=self.clock(round, again),
        )

    @property
    def counts_are_noised(self) -> bool:
        """Whether clients know their label counts with noise only: where privacy protects records."""
        return self.privacy is not None and self.privacy.unit == "record"

    def counts(self, id: str) -> Tensor:
        """Label counts of a client's training rows, `[outputs]`, in the default dtype; with noise where records are private."""
        counts = self.data.label_counts(id).to(torch.get_default_dtype())
        if self.privacy is None or not self.counts_are_noised:
            return counts
        return noised_counts(counts, self.task.kind, self.privacy, self.noise, id)

    def server(self) -> Participant:
        """The server before the first round: a model for each architecture, and the student if one is asked for."""
        archs = {kind.arch.id: kind.arch for kind in self.cards.kinds}
        models = {slot: dict(self.initial(arch)) for slot, arch in sorted(archs.items())}
        if self.student is not None:
            archs["student"] = self.student
            models["student"] = dict(self.initial(self.student))
        return Participant(
            id=SERVER,
            task=self.task,
            arch=archs,
            models={slot: own(tensors) for slot, tensors in models.items()},
            data=lambda name, through: self.data.columns(
                SERVER, name, through or self.server_preprocess
            ),
            settings=self.server_settings,
            counts=torch.zeros(self.task.outputs),
            has_proxy=self.data.n_proxy > 0,
            peers=self.cards,
            common=self.common,
            clock=self.clock(0),
        )

    def view_of(self, slot: str) -> Preprocess:
        """How a model at the server sees public examples: as the group's first client does, or as the server itself."""
        members = [kind.first for kind in self.cards.kinds if kind.arch.id == slot]
        return self.cards[members[0]].preprocess if members else self.server_preprocess


def architecture(model: ModelConfig, data: FederatedData, view: Preprocess) -> Architecture:
    """The model of the configuration, for the shape in which its owner sees examples."""
    shape = view.shape(tuple(data.input_shape))
    words = data.vocabulary.size if data.vocabulary else None
    about = (model.feature_dim, _with_blocks(model, view), model.pretrained, words)
    return Architecture.of(model.name, data.task.outputs, shape, *about)


def _with_blocks(model: ModelConfig, view: Preprocess) -> dict[str, Any]:
    """The model's options; one that asks for `blocks` and was given none gets those that its owner sees."""
    known = model_options(model.name)
    if view.blocks and "blocks" not in model.options and known.get("blocks", 0) in ((), None):
        return {**model.options, "blocks": tuple(tuple(block) for block in view.blocks)}
    return model.options


def _drawn(clients: Population, asked: int | None, seed: int) -> list[str]:
    """Everybody, or so many as are asked for, drawn once for the whole run."""
    count = asked or (len(clients) if len(clients) <= MANY else SOME)
    if count > len(clients):
        raise UserError(f"evaluation.clients: found {count}, but there are {len(clients)} clients")
    if count == len(clients):
        return list(clients)
    drawn = [clients.ids[i] for i in sample(len(clients), count, seed, "evaluation")]
    return sorted(drawn, key=lambda id: clients.place(id) or (0, 0))


def _honest(readers: list[str], liars: Liars | None) -> list[str]:
    honest = [id for id in readers if liars is None or id not in liars.ids]
    if not honest:
        raise UserError(
            "attacks: everybody whose model is read lies; leave some honest, or raise evaluation.clients"
        )
    return honest


def _check(arch: Architecture, where: str) -> None:
    try:
        arch.check()
    except ModelError as error:
        raise UserError(f"{where}: {error}") from None


def describe_settings(settings: ClientSettings) -> dict[str, Any]:
    """What differs from the defaults, for reports."""
    return settings.model_dump(mode="json", exclude_defaults=True)
