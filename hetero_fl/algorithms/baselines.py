"""Reference methods: local training, an ensemble of all models, and training on pooled data."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Needs, register_algorithm
from hetero_fl.algorithms.prediction import add_log_prior, adjust_to_labels, subtract_log_prior
from hetero_fl.algorithms.prototypes import require_linear_heads, require_sent_state
from hetero_fl.algorithms.round_parts import (
    Items,
    add_model,
    local_fit,
)
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import Supervised
from hetero_fl.core.participant import (
    ClientDirectory,
    ClientInfo,
    Participant,
    floating_tensors,
)
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Plan, Predict, Rows
from hetero_fl.utils.ordering import natural_key, natural_order


@register_algorithm("local")
class Local(Algorithm):
    """Train every client alone, without communication.

    This is the baseline that a federated method has to improve on. Include this baseline in every
    comparison: under label skew, several published methods have a lower local test accuracy. The
    global test accuracy of local models is low where clients lack classes.

    Example:
        >>> from hetero_fl.algorithms import Local
        >>> Local().shared, dict(Local().uploads)
        ((), {})
    """

    title = "Local"
    evaluated_when = "after local training"
    shared = ()
    uploads = {}
    downloads = {}
    needs = Needs(counts_traffic=False)


# Prefix of the slots of an ensemble's models, followed by a client id. Client ids contain no
# spaces.
MEMBER = "member "


@register_algorithm("ensemble")
class Ensemble(Local):
    """Average the class probabilities of all clients' locally trained models.

    Each model predicts with its own preprocessing. For regression, outputs are averaged. Every
    client uploads its model. For evaluation only, every client receives the models of all clients.

    The ensemble shows what distillation can gain. The ensemble is a reference, neither a model to
    deploy nor an upper bound: under label skew, models that over-predict their own classes dominate
    the mean. The teachers of FedMD and FedDF differ from this ensemble, because these teachers are
    the mean logits of federated models.

    With `prior_correction`, each client subtracts its log class prior from the bias of the head
    before the upload. Each model is thus corrected with the prior of the client that trained the
    model, on both test sets.

    Example:
        >>> from hetero_fl.algorithms import Ensemble
        >>> Ensemble().needs.all_clients
        True
        >>> Ensemble().uploads["member"].use  # the models are not summed
        'each'
    """

    title = "Ensemble"
    evaluated_when = (
        "mean prediction of all clients' models after local training (saved models: the members)"
    )
    uploads = {"member": ItemSpec("params", use="each", description="the client's model")}
    downloads = {
        "*": ItemSpec("params", description="each client's model, by client id, for evaluation")
    }
    needs = Needs(all_clients=True, unused_options=("fine_tune_epochs",))

    @override
    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        for profile in clients.profiles:
            require_sent_state(f"clients: '{profile.first}': model", profile.arch)
        require_linear_heads(p for p in clients.profiles if p.settings.prior_correction)
        return super().configure(clients)

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield local_fit(client)
        tensors = floating_tensors(client.models["model"])
        if client.settings.prior_correction:
            tensors["head.bias"] = subtract_log_prior(client, tensors["head.bias"])
        return {"member": Item(tensors, float(client.num_rows), "params")}

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        members = server.state.setdefault("members", {})
        members.update({u.client: u.payload["member"] for u in uploads.containing("member")})
        yield from ()

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return server.state.get("members", {}) if recipient.purpose == "evaluate" else {}

    @override
    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        for client_id in natural_order(received):
            add_model(client, MEMBER + client_id, client.peers[client_id].arch, received[client_id])
        yield from ()

    @override
    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        slots = [slot for slot in client.models if slot.startswith(MEMBER)]
        logits = yield [
            Predict(
                slot,
                replace(rows, preprocess=client.peers[slot.removeprefix(MEMBER)].preprocess),
                # Backends cache the outputs of received models by slot.
                tensors=client.models[slot],
                arch=client.arch[slot],
            )
            for slot in slots
        ]
        if client.task.kind == "regression":
            return torch.stack(logits).mean(0)
        if client.task.kind == "multilabel":
            return torch.stack([z.sigmoid() for z in logits]).mean(0).logit(eps=1e-7)
        mean = torch.stack([z.log_softmax(-1) for z in logits]).logsumexp(0)
        # The members have already been corrected.
        return add_log_prior(client, mean) if personal else mean


@register_algorithm("centralized")
class Centralized(Algorithm):
    """Train one model on the pooled rows of all clients.

    In each round, the model is trained on the pooled rows (without the proxy set) with a new
    optimizer. This computation equals FedAvg with λ = 1 and a single client that has all rows. The
    architecture, the settings and the preprocessing are those of the first client with the most
    frequent architecture. With `each_architecture`, there is one such model of each architecture,
    and a client is evaluated with the model of its own architecture. Scores are then comparable
    with those of methods that train the clients' own models.

    The gap between `local` and this method shows how much a federated method can gain. The accuracy
    of this method is not a strict upper bound: personal models may have a higher local test
    accuracy, and methods with more training per round may have a higher global test accuracy.

    Example:
        >>> from hetero_fl.algorithms import Centralized
        >>> needs = Centralized().needs
        >>> needs.all_clients, needs.counts_traffic
        (True, False)
    """

    title = "Centralized"
    evaluated_when = "the pooled model"
    uploads = {}
    downloads = {"model": ItemSpec("params", description="the pooled model, for evaluation")}
    needs = Needs(
        all_clients=True,
        counts_traffic=False,
        shared_model=True,
        unused_options=("fine_tune_epochs",),
    )

    each_architecture: bool = Field(
        False,
        description="train a pooled model of each architecture, with which clients of this "
        "architecture are evaluated",
    )

    @override
    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        for profile in clients.profiles if self.each_architecture else [clients.main_profile]:
            require_sent_state(f"clients: '{profile.first}': model", profile.arch)
        return super().configure(clients)

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        if recipient.purpose != "evaluate":
            return {}
        reference = self._reference(server, recipient.arch)
        return {"model": floating_tensors(server.models[reference.arch.spec_id])}

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from ()
        return {}

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        peers = server.peers
        references = [self._reference(server, profile.arch) for profile in peers.profiles]
        for slot, reference in {each.arch.spec_id: each for each in references}.items():
            rows = Rows("pooled", preprocess=reference.preprocess)
            label_counts = partial(count_labels, server, rows)
            yield local_fit(
                replace(server, settings=reference.settings, label_counts=label_counts),
                Supervised(server.task.kind, slot=slot),
                rows,
                train={slot: None},
                stream_id=min(
                    profile.first
                    for profile in peers.profiles
                    if self._reference(server, profile.arch).arch.spec_id == slot
                ),
            )

    @override
    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        reference = self._reference(client, client.arch["model"])
        add_model(client, "pooled", reference.arch, received["model"])
        yield from ()

    @override
    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        reference = self._reference(client, client.arch["model"])
        logits = yield Predict("pooled", replace(rows, preprocess=reference.preprocess))
        return adjust_to_labels(self, client, logits, personal)

    @override
    def server_model(self, server: Participant) -> str | None:
        return server.peers.main_profile.arch.spec_id

    def _reference(self, participant: Participant, arch: ModelSpec) -> ClientInfo:
        """Return the client whose settings the pooled model for an architecture has."""
        peers = participant.peers
        if not self.each_architecture:
            return peers[peers.main_profile.first]
        first = [p.first for p in peers.profiles if p.arch.spec_id == arch.spec_id]
        return peers[min(first, key=natural_key)]


def count_labels(server: Participant, rows: Rows) -> Tensor:
    """Return the number of rows per class, shape `[C]`."""
    return torch.bincount(rows.columns(server)["y"], minlength=server.task.outputs)
