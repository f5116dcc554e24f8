"""Properties of a run that depend on what its clients upload.

The method declares uploads. Their names, shapes and tensors are computed on first use with dry runs
of the method.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from itertools import product
from typing import Any

from torch import Tensor

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import call_broadcast
from hetero_fl.algorithms.round_parts import (
    permitted_part,
    shareable_tensors,
    shared_part,
    shared_parts,
)
from hetero_fl.communication.vector_layout import TensorKey, VectorLayout
from hetero_fl.config import Config
from hetero_fl.core.participant import ClientInfo, ClientProfile, floating_tensors
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.engine.driver import run_plan, translate_user_errors
from hetero_fl.experiment.compatibility.config_facts import ConfigFacts, first
from hetero_fl.federation.expected import ExpectedUploads, first_broadcasts
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.summed_uploads.derived_setup import DerivedSetup
from hetero_fl.privacy.client_side import uploadable_items
from hetero_fl.utils.errors import suggest_or_list
from hetero_fl.utils.objects import get_object
from hetero_fl.utils.text import format_list


class UploadFacts(ConfigFacts):
    """Properties of a run that depend on what its clients upload.

    Args:
        config: The configuration.
        algorithm: The method with all its settings.
        federation: The clients with their data and models.
    """

    def __init__(self, config: Config, algorithm: Algorithm, federation: FederationSpec) -> None:
        super().__init__(config, federation.client_infos.clients, algorithm)
        self.federation = federation
        self.task = federation.task
        self.num_clients = len(federation.client_infos)
        self.num_proxy = federation.data.n_proxy
        self.profiles = federation.client_infos.profiles
        self.cohort = federation.cohort
        # Without uploads, secure aggregation and homomorphic encryption are not used.
        self.secure_sum = config.channel.secure_sum if algorithm.uploads else None
        self.homomorphic = config.channel.homomorphic if algorithm.uploads else None
        self.concurrency = config.clients.per_round or self.num_clients
        self.num_uploads = config.rounds * self.concurrency
        self.buffer_size = self.policy.buffer_size or config.runtime.buffer or self.concurrency
        self.sends_nothing = algorithm.needs.all_clients or not algorithm.uploads
        self.malicious = federation.malicious
        self.attack = f"attacks.name={config.attacks.name}" if config.attacks else None

    @cached_property
    def declared(self) -> dict[str, ItemSpec]:
        """Items that the method declares as uploads, except label counts, keyed by name."""
        return {n: spec for n, spec in self.algorithm.uploads.items() if spec.kind != "counts"}

    @cached_property
    def shared(self) -> set[str]:
        """Kinds of data that at least one client shares, named as in the setting `shares`."""
        settings = [profile.settings for profile in self.profiles]
        named = {share for own in settings for share in own.shares}
        return named | {"parameters" for own in settings if permitted_part(own.shares)}

    @cached_property
    def uploadable(self) -> dict[str, ItemSpec]:
        """Items that at least one client may upload, keyed by name."""
        return uploadable_items(self.algorithm, self.federation)

    def items_used_singly(self) -> str:
        """Return the names of items that the method processes individually instead of as a sum."""
        return ", ".join(n for n, spec in self.algorithm.uploads.items() if spec.use == "each")

    def missing_shares(self) -> str | None:
        """Describe the kinds of data that the method requires if no client shares any of these.

        The result is None if at least one client shares such data.
        """
        needed = {spec.needed_share for spec in self.declared.values()}
        return " or ".join(sorted(needed)) if needed and not needed & self.shared else None

    def unknown_prefix(self) -> dict[str, str] | None:
        """Return a configured prefix that matches no tensor name, or None.

        Returns:
            A dictionary with the prefix, its configuration key and a suggestion, under `prefix`,
            `key` and `hint`.
        """
        prefixes = dict.fromkeys(self.federation.common, "clients.common") | self._named_parts
        names = self._tensor_names if prefixes else set()
        for prefix, key in prefixes.items():
            if not any(name.startswith(prefix) for name in names):
                depth = range(1, max(1, prefix.count(".")) + 1)
                parts = {".".join(name.split(".")[:i]) + "." for name in names for i in depth}
                return {"key": key, "prefix": prefix, "hint": suggest_or_list(prefix, parts)}
        return None

    def part_of_other_model(self) -> str | None:
        """Return a prefix in `shares` that matches no tensor of the averaged model, or None.

        Only methods that average an auxiliary model are checked.
        """
        slots = shared_parts(self.algorithm)
        if not self._named_parts or "model" in slots:
            return None
        for profile, slot in product(self.profiles, slots):
            part = shared_part(self.algorithm, profile.settings, slot)
            names = profile.models[slot].shapes
            if any(part is None or name.startswith(part) for name in names):
                return None
        return first(self._named_parts)

    def unequal_shares(self) -> str | None:
        """Return the first client whose `shares` differ from those of its architecture, or None.

        Clients that upload nothing are not compared.
        """
        parts: dict[str, list[Any]] = {}
        slots = list(shared_parts(self.algorithm))
        for profile in self.profiles:
            own = [shared_part(self.algorithm, profile.settings, slot) for slot in slots]
            is_sender = any(part != () for part in own)
            if is_sender and parts.setdefault(profile.arch.spec_id, own) != own:
                return profile.first
        return None

    @cached_property
    def _named_parts(self) -> dict[str, str]:
        return {
            part: f"clients: '{profile.first}': shares"
            for profile in self.profiles
            for part in map(str, profile.settings.shares)
            if part.endswith(".")
        }

    @cached_property
    def _tensor_names(self) -> set[str]:
        archs = {profile.arch for profile in self.profiles}
        tensors = [floating_tensors(self.federation.initial_tensors(arch)) for arch in archs]
        return {name for own in tensors for name in own}

    @cached_property
    def clients_alone(self) -> list[ClientProfile]:
        """Profiles of clients whose uploaded tensors no other client uploads.

        The list is empty if the clients upload items other than averaged models.
        """
        travel = {
            spec.kind
            for spec in self.declared.values()
            if spec.needed_share in self.shared and (spec.kind != "rows" or self.num_proxy)
        }
        model = self.declared.get("model")
        if model is None or model.use != "sum" or not travel <= {"params", "update"}:
            return []
        if self.num_clients == 1:
            return []
        common = self.federation.common
        sent = []
        for profile in self.profiles:
            family = profile.arch.family_id
            # Tensors with equal keys are averaged (see `hetero_fl.aggregation.means`).
            own: set[tuple[str, tuple[int, ...], str]] = set()
            for name, tensor in self.shareable_tensors(profile).items():
                is_common = bool(common) and name.startswith(common)
                own.add((name, tuple(tensor.shape), "") if is_common else (name, (), family))
            sent.append((profile, own))
        return _lone_owners(sent, all)

    def shareable_tensors(self, profile: ClientProfile) -> Mapping[str, Tensor]:
        """Return the model tensors that the clients of a profile upload, keyed by name."""
        part = shared_part(self.algorithm, profile.settings)
        initial = self.federation.initial_tensors(profile.arch)
        return shareable_tensors(self.algorithm, profile.arch, initial, part)

    def architectures_alone(self) -> dict[str, str] | None:
        """Return the architectures of `clients_alone` and a matching verb, or None without any."""
        groups = dict.fromkeys(profile.arch.spec_id for profile in self.clients_alone)
        if not groups:
            return None
        return {"groups": ", ".join(groups), "verb": "has" if len(groups) == 1 else "have"}

    def similar_modules(self) -> dict[str, str] | None:
        """Describe two modules with equal tensors that are not averaged, or return None.

        The modules are objects of one class, with other values of some attributes.
        """
        model = self.declared.get("model")
        if model is None or model.needed_share not in self.shared:
            return None
        owners: dict[str, str] = {}
        for profile in self.profiles:
            if get_object(profile.arch.name) is not None:
                owners.setdefault(profile.arch.name, profile.first)
        groups: dict[object, list[str]] = {}
        for name in owners:
            groups.setdefault(get_object(name).signature, []).append(name)
        # If modules of a group differ, one of them differs from the first.
        for one, *others in groups.values():
            for other in others:
                if names := get_object(one).differences(get_object(other)):
                    found = format_list(names, 3, quote=True)
                    return {"one": owners[one], "other": owners[other], "names": found}
        return None

    def clients_alone_in_sum(self) -> str:
        """Describe the clients with an uploaded tensor that no other client uploads.

        The text is empty if there are no such clients.
        """
        derived = DerivedSetup(self.algorithm, self.federation)
        layout = VectorLayout(derived.expectations.specs, self.federation.common)
        sent = []
        for profile in self.profiles:
            # The index of the first round in which the client uploads is `share_every` - 1.
            form = derived.upload_form(profile.first, profile.settings.share_every - 1)
            keys: set[TensorKey] = set(layout.tensor_keys(profile.arch.spec_id, form))
            sent.append((profile, keys))
        alone = _lone_owners(sent, any)
        return self.federation.client_infos.format_clients(alone) if alone else ""

    @cached_property
    def expectations(self) -> ExpectedUploads:
        """Expected names, shapes and dtypes of uploaded items, determined by dry runs."""
        return ExpectedUploads(self.algorithm, self.federation)

    @cached_property
    def broadcasts(self) -> list[tuple[ClientInfo, Payload]]:
        """The first client of each profile, paired with the first broadcast to the client."""
        with translate_user_errors():
            return first_broadcasts(self.algorithm, self.federation)

    def unknown_clip(self) -> dict[str, str] | None:
        """Return an item in `privacy.clip` that the method does not upload, or None."""
        clip = self.privacy.clip if self.privacy else None
        uploads = self.algorithm.uploads
        unknown = first(n for n in clip if n not in uploads) if isinstance(clip, dict) else None
        if unknown is None:
            return None
        return {"item": unknown, "hint": suggest_or_list(unknown, uploads)}

    def item_without_start(self) -> str | None:
        """Return an item of parameters that is not relative to a broadcast, or None."""
        with translate_user_errors():
            for info, received in self.broadcasts:
                for name, item in self.expectations.expected_items(info, received, 0).items():
                    if item.kind == "params" and not isinstance(item.values, dict):
                        return name
        return None

    @cached_property
    def dry_round(self) -> tuple[dict[str, Mapping[str, Item]], set[tuple[str, str]]]:
        """Result of a dry run of the first round in which all clients upload.

        The first element contains the uploaded items, keyed by the first client of each profile.
        The second element contains the items that the server aggregates (see
        `Uploads.aggregated_items`).
        """
        with translate_user_errors():
            intervals = {profile.settings.share_every for profile in self.profiles}
            index = min(math.lcm(*intervals), self.federation.num_rounds) - 1
            server = self.federation.server()
            server.round_context = self.federation.round_context(index)
            self.algorithm.setup(server)
            sent = {}
            uploads = []
            for profile in self.profiles:
                info = self.federation.client_infos[profile.first]
                broadcast = call_broadcast(self.algorithm, server, info)
                items = self.expectations.expected_items(info, broadcast, index)
                sent[profile.first] = items
                uploads.append(Upload(info, Payload(dict(items))))
            received = Uploads(uploads, self.algorithm.uploads, self.federation.common)
            run_plan(server, self.algorithm.aggregate(server, received), self.expectations.backend)
            return sent, received.aggregated_items


def _lone_owners(
    sent: list[tuple[ClientProfile, set[Any]]], test: Callable[[Iterable[bool]], bool]
) -> list[ClientProfile]:
    """Return the profiles of clients with uploaded tensors that no other client uploads.

    Args:
        sent: Pairs of a profile and the keys of the uploaded tensors.
        test: `all` if no other client may upload any of the tensors. `any` if at least one tensor
            must not be uploaded by another client.
    """
    owners = Counter[Any]()
    for profile, keys in sent:
        owners.update(dict.fromkeys(keys, profile.count))
    return [profile for profile, keys in sent if test(owners[key] == 1 for key in keys)]
