"""Initial tensors that replace random initialization (the setting `init_from`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from hetero_fl.core.given_models import GivenModel
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.store import PrivateState
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.reporting.run import Run
from hetero_fl.utils.code_permission import AllowCode
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.objects import OBJECT_PREFIX, find_object
from model_zoo import ModelError


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
