"""Facts of a run on which features and rules depend.

Facts follow from the configuration alone, or from what the clients upload. The method declares
uploads. Their names, shapes and tensors are computed on first use with dry runs of the method. An
item is a named part of an upload, such as a model or class statistics.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any, TypeVar

from torch import Tensor

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.aggregation.robust_means import AggregationRules, RobustCombiner
from hetero_fl.aggregation.uploads import Owner, owners_of_item
from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import AsyncPolicy, predicts_proxy_set, unused_options
from hetero_fl.algorithms.round_parts import (
    permitted_part,
    shareable_tensors,
    shared_part,
    shared_parts,
)
from hetero_fl.config import Config
from hetero_fl.config.base import StalenessConfig
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import PARTITION_KINDS, SourceConfig
from hetero_fl.config.population import Population
from hetero_fl.config.schema import CLIENT_OPTIONS
from hetero_fl.core.participant import ClientInfo, ClientProfile, floating_tensors
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.engine.driver import run_plan, translate_user_errors
from hetero_fl.federation.expected import ExpectedUploads, initial_server
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.privacy.accounting import PrivacyCharge
from hetero_fl.privacy.client_side import uploadable_items
from hetero_fl.robustness.rules import RobustRule, Rule, prediction_rule, rule
from hetero_fl.utils.errors import suggest_or_list
from hetero_fl.utils.objects import OBJECT_PREFIX
from hetero_fl.utils.text import pluralize

ITEMS_OF_RULES = {
    "rule": ("models", "parameters"),
    "predictions": ("rows", "predictions"),
    "statistics": ("class_sums", "class sums"),
}
"""Kind and description of the items to which each key of the section `aggregation` applies."""

T = TypeVar("T")


def first(elements: Iterable[T]) -> T | None:
    """Return the first element of an iterable, or None if it is empty."""
    return next(iter(elements), None)


class Facts:
    """Facts that follow from the configuration alone.

    Args:
        config: The configuration.
        clients: The population of clients.
        algorithm: The method.
    """

    def __init__(self, config: Config, clients: Population, algorithm: Algorithm) -> None:
        self.config = config
        self.clients = clients
        self.algorithm = algorithm
        self.name = str(config.algorithm["name"])
        self.settings = [(profile.first, profile.settings) for profile in clients.profiles]
        self.unit = config.privacy.unit if config.privacy else ""
        # The norms of uploaded items are clipped.
        self.is_bounded = self.unit in ("client", "local")
        self.policy = algorithm.needs.asynchronous or AsyncPolicy()
        self.is_async = config.runtime.mode == "async" or algorithm.needs.asynchronous is not None
        # Without uploads, there are no sums.
        self.secure_sum = config.channel.secure_sum if algorithm.uploads else None
        self.homomorphic = config.channel.homomorphic if algorithm.uploads else None
        self.num_clients = len(clients)
        self.concurrency = config.clients.per_round or self.num_clients

    def changed_value(self, key: str) -> Any:
        """Return the value of a key, or None if it is the default or its section is not set."""
        section: Any = self.config
        *sections, name = key.split(".")
        for part in sections:
            section = getattr(section, part)
            if section is None:
                return None
        value = getattr(section, name)
        return None if value == type(section).model_fields[name].get_default() else value

    def of_client(self, value: Callable[[ClientSettings], object]) -> str:
        """Return a value that is set for a client, with the id of the client, or ""."""
        set_by = ((value(settings), client) for client, settings in self.settings)
        return first(f"{found} ({client})" for found, client in set_by if found) or ""

    def enabled_options(self) -> Iterator[tuple[str, str, Any]]:
        """Yield the key, name and value of each client option that the configuration enables."""
        clients = self.config.clients
        sections: list[tuple[str, ClientSettings]] = [("clients.defaults.", clients.defaults)]
        sections += [(f"clients: '{group.name}': ", group) for group in clients.groups]
        sections += [(f"clients: '{override.match}': ", override) for override in clients.overrides]
        for place, settings in sections:
            for name in (*CLIENT_OPTIONS, "class_weights", "objective"):
                if value := getattr(settings, name):
                    yield place + name, name, value

    def unused_option(self) -> str | None:
        """Return the key of a client option that is set but not used by the method, or None."""
        unused = unused_options(self.algorithm)
        if not predicts_proxy_set(self.algorithm):
            unused.add("proxy_predictions")
        for key, name, value in self.enabled_options():
            if name in unused:
                return key
            if name == "recalibrate" and unused.intersection(value):
                return f"{key}: proxy_predictions"
        return None

    def prior_option(self) -> str | None:
        """Return the key of a client option that is set and uses class frequencies, or None."""
        options = ("logit_adjustment", "local_prior", "prior_correction")
        return first(key for key, name, _ in self.enabled_options() if name in options)

    @property
    def given_start(self) -> str | None:
        """Describe the models that initialize the run, if any."""
        source = self.config.init_from
        is_object = source is not None and source.startswith(OBJECT_PREFIX)
        return "given modules, without init='seeded'" if is_object else source

    def single_items(self) -> str:
        """Return the names of items that the method processes individually instead of as a sum."""
        return ", ".join(n for n, spec in self.algorithm.uploads.items() if spec.use == "each")

    def compressing_stage(self, key: str, allowed: tuple[str, ...] = ()) -> str | None:
        """Return the kind of a compression stage that is not among the allowed ones, or None."""
        stages = getattr(self.config.channel, key)
        return first(stage.kind for stage in stages if stage.kind not in allowed)

    def has_unused_partition(self) -> bool:
        """Return whether a partition is set, but no two clients divide a data set."""
        partition = self.config.data.partition
        default = type(partition)(min_size=partition.min_size)
        if partition.kind == "natural" or partition.model_dump() == default.model_dump():
            return False
        sources = {settings.data for _, settings in self.settings}
        return None not in sources and len(sources) == len(self.clients)

    def unused_size(self) -> str | None:
        """Return a client whose size is set although its data is not divided, or None."""
        owners: Counter[SourceConfig | None] = Counter()
        for profile in self.clients.profiles:
            owners[profile.settings.data] += profile.count
        # The default applies to the clients without data of their own.
        default = self.config.clients.defaults.size if owners[None] else 1.0
        return first(
            client
            for client, settings in self.settings
            if settings.data is not None and owners[settings.data] == 1 and settings.size != default
        )

    def unused_partition_setting(self) -> str | None:
        """Return a key of `data.partition` that the kind of partition does not read, or None."""
        partition = self.config.data.partition
        if partition.kind not in PARTITION_KINDS:
            return None
        default = type(partition)()
        read = {"min_size", "kind", "arguments", *PARTITION_KINDS[partition.kind]}
        return first(
            key
            for key in type(partition).model_fields.keys() - read
            if getattr(partition, key) not in (None, getattr(default, key))
        )

    def unreachable_threshold(self) -> dict[str, int] | None:
        """Return the sampled and the required clients if too few uploads of a cohort are used."""
        per_round = self.config.clients.per_round
        secure_sum = self.config.channel.secure_sum
        if per_round is None or secure_sum is None:
            return None
        sampled = self.config.cohort.num_sampled(per_round, len(self.clients))
        survivors = secure_sum.min_survivors(sampled)
        return {"sampled": sampled, "survivors": survivors} if survivors > per_round else None


class UploadFacts(Facts):
    """Facts that follow from what the clients of a run upload.

    Args:
        config: The configuration.
        algorithm: The method with all its settings.
        federation: The clients with their data and models.
    """

    def __init__(self, config: Config, algorithm: Algorithm, federation: FederationSpec) -> None:
        super().__init__(config, federation.client_infos.clients, algorithm)
        self.federation = federation
        self.task = federation.task
        self.profiles = federation.client_infos.profiles
        self.settings = [(profile.first, profile.settings) for profile in self.profiles]
        self.num_proxy = federation.data.n_proxy
        self.cohort = federation.cohort
        self.num_uploads = config.rounds * self.concurrency
        self.buffer_size = self.policy.buffer_size or config.runtime.buffer or self.concurrency
        # Staleness settings of the method, or of `runtime.staleness` if the method has none.
        own = self.policy.staleness
        self.staleness: StalenessConfig = own or config.runtime.staleness
        self.staleness_key = "runtime.staleness" if own is None else "algorithm"
        self.sends_nothing = algorithm.needs.all_clients or not algorithm.uploads
        self.distills_other_task = self.num_proxy > 0 and self.task.kind != "multiclass"
        self.malicious = federation.malicious
        self.num_malicious = len(self.malicious.ids) if self.malicious else 0
        self.has_trigger = self.malicious is not None and self.malicious.has_trigger
        self.acts_on = set(self.malicious.attack.acts_on) if self.malicious else set()
        aggregation = config.aggregation.model_dump(include=set(ITEMS_OF_RULES))
        self.rules = {key: name for key, name in aggregation.items() if name != "mean"}

    # Items

    @cached_property
    def declared(self) -> dict[str, ItemSpec]:
        """Items that the method declares as uploads, except label counts, keyed by name."""
        return {n: spec for n, spec in self.algorithm.uploads.items() if spec.kind != "counts"}

    @cached_property
    def shared(self) -> set[str]:
        """Kinds of data that at least one client shares, named as in the setting `shares`."""
        named = {share for _, own in self.settings for share in own.shares}
        return named | {"parameters" for _, own in self.settings if permitted_part(own.shares)}

    @property
    def shares_model(self) -> bool:
        """Whether clients upload an item `model`."""
        model = self.declared.get("model")
        return model is not None and model.needed_share in self.shared

    @cached_property
    def uploadable(self) -> dict[str, ItemSpec]:
        """Items that at least one client may upload, keyed by name."""
        return uploadable_items(self.algorithm, self.federation)

    @property
    def publishes_rows(self) -> bool:
        """Whether private rows, or values for each of them, leave the clients."""
        if self.algorithm.needs.all_clients and not self.algorithm.uploads:
            return True
        return any(s.kind == "rows" and s.rows_of == "train" for s in self.uploadable.values())

    @property
    def predicts_classes(self) -> bool:
        """Whether clients upload class predictions of a multiclass task."""
        has_predictions = any(spec.prediction_type for spec in self.uploadable.values())
        return has_predictions and self.task.kind == "multiclass"

    def missing_shares(self) -> str | None:
        """Describe the kinds of data that the method requires if no client shares any of these.

        The result is None if at least one client shares such data.
        """
        needed = {spec.needed_share for spec in self.declared.values()}
        return " or ".join(sorted(needed)) if needed and not needed & self.shared else None

    # Parts of models

    def unknown_prefix(self) -> dict[str, str] | None:
        """Return a configured prefix that matches no tensor of an averaged model, or None.

        Returns:
            A dictionary with the prefix, its configuration key and a suggestion, under `prefix`,
            `key` and `hint`.
        """
        prefixes = dict.fromkeys(self.federation.common, "clients.common")
        for client, own in self.settings:
            parts = [part for part in map(str, own.shares) if part.endswith(".")]
            prefixes |= dict.fromkeys(parts, f"clients: '{client}': shares")
        slots = shared_parts(self.algorithm) or ["model"]
        pairs = product(self.profiles, slots)
        archs = {profile.models[slot] for profile, slot in pairs if slot in profile.models}
        tensors = [self.federation.initial_tensors(arch) for arch in archs] if prefixes else []
        names = {name for own in tensors for name in floating_tensors(own)}
        for prefix, key in prefixes.items():
            if not any(name.startswith(prefix) for name in names):
                depth = range(1, max(1, prefix.count(".")) + 1)
                known = {".".join(name.split(".")[:i]) + "." for name in names for i in depth}
                return {"key": key, "prefix": prefix, "hint": suggest_or_list(prefix, known)}
        return None

    # Dry runs

    @cached_property
    def expectations(self) -> ExpectedUploads:
        """Expected names, shapes and dtypes of uploaded items, determined by dry runs."""
        return ExpectedUploads(self.algorithm, self.federation)

    @cached_property
    def round_idx(self) -> int:
        """Index of the first round in which all clients upload."""
        intervals = {own.share_every for _, own in self.settings}
        return min(math.lcm(*intervals), self.federation.num_rounds) - 1

    @cached_property
    def broadcasts(self) -> list[tuple[ClientInfo, Payload]]:
        """The first client of each profile, paired with a broadcast of the initial server."""
        with translate_user_errors():
            infos = [self.federation.client_infos[client] for client, _ in self.settings]
            return [(info, self.expectations.broadcast(info, self.round_idx)) for info in infos]

    @cached_property
    def uploaded(self) -> dict[str, Mapping[str, Item]]:
        """Items that the first client of each profile uploads, with placeholder values."""
        expected = self.expectations.expected_items
        with translate_user_errors():
            return {
                info.client_id: expected(info, broadcast, self.round_idx)
                for info, broadcast in self.broadcasts
            }

    def trains_before_evaluation(self) -> bool:
        """Return whether clients train on private rows before an evaluation of the models."""
        privacy = self.expectations.privacy
        # Only called for record-level privacy.
        assert privacy is not None
        with translate_user_errors():
            for info, received in self.broadcasts:
                client = self.expectations.placeholder_client(info, 0)
                charges: list[PrivacyCharge] = []
                backend = privacy.charge_steps(self.expectations.backend, charges)
                for hook in (self.algorithm.deploy, self.algorithm.personalize):
                    run_plan(client, hook(client, received), backend)
                if charges:
                    return True
        return False

    # Clients that upload the same tensors

    @cached_property
    def aggregated_items(self) -> set[tuple[str, str]]:
        """Names of the aggregated items, each with the kind of the aggregation (see `Uploads`)."""
        infos = self.federation.client_infos
        sent = [Upload(infos[c], Payload(dict(items))) for c, items in self.uploaded.items()]
        received = Uploads(sent, self.algorithm.uploads, self.federation.common)
        server = initial_server(self.algorithm, self.federation, self.round_idx)
        with translate_user_errors():
            run_plan(server, self.algorithm.aggregate(server, received), self.expectations.backend)
        return received.aggregated_items

    @cached_property
    def uploaded_tensors(self) -> list[tuple[ClientProfile, dict[tuple[str, Owner], None]]]:
        """The tensors that the clients of each profile upload.

        A tensor is the name of an item and an owner. Equal tensors are combined.
        """
        found = []
        for profile, (info, received) in zip(self.profiles, self.broadcasts, strict=True):
            tensors: dict[tuple[str, Owner], None] = {}
            # The index of the first round in which the clients upload.
            round_idx = profile.settings.share_every - 1
            items = self.expectations.expected_items(info, received, round_idx)
            for name, item in items.items():
                spec = self.expectations.specs[name]
                group = profile.arch.spec_id
                _, owners = owners_of_item(item, group, spec, self.federation.common)
                if spec.kind != "counts":
                    tensors |= dict.fromkeys((name, owner) for owner in owners.values())
            found.append((profile, tensors))
        return found

    @cached_property
    def clients_alone(self) -> list[ClientProfile]:
        """Profiles of clients whose models are averaged with those of no other client.

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
        common = self.federation.common
        sent = []
        for profile in self.profiles:
            part = shared_part(self.algorithm, profile.settings)
            initial = self.federation.initial_tensors(profile.arch)
            own = shareable_tensors(self.algorithm, profile.arch, initial, part)
            # Models of different widths are averaged within a family.
            keys = {
                (name, tuple(own[name].shape), "")
                if common and name.startswith(common)
                else (name, (), profile.arch.family_id)
                for name in own
            }
            sent.append((profile, keys))
        return self._lone_owners(sent, all)

    def clients_alone_in_sum(self) -> str:
        """Describe the clients with a summed tensor that no other client uploads, or ""."""
        specs = self.expectations.specs
        summed = [
            (profile, {tensor for tensor in tensors if specs[tensor[0]].use == "sum"})
            for profile, tensors in self.uploaded_tensors
        ]
        return self.federation.client_infos.format_clients(self._lone_owners(summed, any))

    def _lone_owners(
        self,
        sent: Sequence[tuple[ClientProfile, Collection[Any]]],
        test: Callable[[Iterable[bool]], bool],
    ) -> list[ClientProfile]:
        """Return the profiles of clients with uploaded tensors that no other client uploads.

        Args:
            sent: Pairs of a profile and the keys of the uploaded tensors.
            test: `all` if no other client may upload any of the tensors. `any` if at least one
                tensor must not be uploaded by another client.
        """
        if self.num_clients == 1:
            return []
        owners = Counter[Any]()
        for profile, keys in sent:
            owners.update(dict.fromkeys(keys, profile.count))
        return [profile for profile, keys in sent if test(owners[key] == 1 for key in keys)]

    def unequal_shares(self) -> str | None:
        """Return the first client that uploads other tensors than others of its architecture.

        Clients that upload nothing are not compared.
        """
        first_tensors: dict[str, dict[tuple[str, Owner], None]] = {}
        for profile, tensors in self.uploaded_tensors:
            if tensors and first_tensors.setdefault(profile.arch.spec_id, tensors) != tensors:
                return profile.first
        return None

    def item_without_start(self) -> str | None:
        """Return an item of parameters that is not relative to a broadcast, or None."""
        return first(
            name
            for items in self.uploaded.values()
            for name, item in items.items()
            if item.kind == "params" and not isinstance(item.values, dict)
        )

    # Robust rules and attacks

    @cached_property
    def items_by_rule(self) -> dict[str, list[str]]:
        """Names of the items to which each key of the section `aggregation` applies."""
        combined = self.aggregated_items
        return {
            key: sorted(name for name, how in combined if how == kind)
            for key, (kind, _) in ITEMS_OF_RULES.items()
        }

    def unprotected_items(self) -> list[dict[str, str]]:
        """Return the items that are averaged without a robust rule, by the key of the rule."""
        return [
            {"key": key, "items": ", ".join(items)}
            for key, items in self.items_by_rule.items()
            if items and key not in self.rules
        ]

    def idle_rules(self) -> list[dict[str, str]]:
        """Return the aggregation rules that apply to no item."""
        return [
            {"key": key, "value": value, "items": ITEMS_OF_RULES[key][1]}
            for key, value in self.rules.items()
            if not self.items_by_rule[key]
        ]

    def outvoted_rule(self) -> dict[str, Any] | None:
        """Return an aggregation rule for which an item has too few uploads, or None."""
        config = self.config.aggregation
        for key, value in self.rules.items():
            # The median of class sums requires as many clients as the base class.
            combiner: RobustRule = Rule(config)
            if key != "statistics":
                combiner = (rule if key == "rule" else prediction_rule)[value](config)
            for name, senders in self._senders(key):
                malicious = config.num_malicious(senders)
                least = combiner.min_clients(malicious)
                if senders < least:
                    tolerated = (f for f in range(senders) if combiner.min_clients(f) <= senders)
                    most = max(tolerated, default=0)
                    advice = "use the model for more clients, or remove the rule"
                    if most:
                        advice = f"set aggregation.malicious to {most} or less"
                    return {
                        "key": key,
                        "value": value,
                        "malicious": pluralize(malicious, "malicious client"),
                        "least": least,
                        "senders": senders,
                        "item": name,
                        "advice": advice,
                    }
        return None

    def _senders(self, key: str) -> Iterator[tuple[str, int]]:
        """Yield the parts that a rule combines, and the number of their uploads in each cohort.

        Args:
            key: Key of the rule in the section `aggregation`.
        """
        for cohort, item in product(self._cohorts(), self.items_by_rule[key]):
            senders = [client for client, sent in self.uploaded.items() if item in sent]
            if key == "rule":
                yield from self._senders_of_models(item, senders, cohort)
                continue
            spec = self.algorithm.uploads.get(item)
            if spec is not None and spec.use == "each":
                # The server also combines predictions that it computes with uploaded models.
                senders = list(self.uploaded)
            yield item, sum(cohort[client] for client in senders)

    def _senders_of_models(
        self, item: str, senders: Sequence[str], cohort: Mapping[str, int]
    ) -> Iterator[tuple[str, int]]:
        """Yield the tensors that are combined separately, and the number of their uploads."""
        rules = AggregationRules(self.federation.aggregation, self.task)
        declaration = self.algorithm.uploads[item]
        models = RobustCombiner(item, declaration, self.federation.common, rules)
        senders = [c for c in senders if isinstance(self.uploaded[c][item].values, dict)]
        for client in senders:
            info = self.federation.client_infos[client]
            models.add(Upload(info, Payload(dict(self.uploaded[client]))))
        for (group, places), owners in models.blocks().items():
            if total := sum(cohort[senders[place]] for place in places):
                name = owners[0][0]
                yield f"{name} of {group}" if group else name, total

    def _cohorts(self) -> list[Counter[str]]:
        """Return the number of clients per profile for each distinct composition of a cohort."""
        per_round = self.config.clients.per_round
        rounds = self.federation.num_rounds if per_round is not None else 1
        found: dict[frozenset[tuple[str, int]], Counter[str]] = {}
        for index in range(rounds):
            sampled = self.federation.sample_cohort(per_round, index)
            count = Counter(self.federation.client_infos.profile(c).first for c in sampled)
            found.setdefault(frozenset(count.items()), count)
        return list(found.values())

    def missing_targets(self) -> str | None:
        """Describe the data that the attack changes if no client uploads such data.

        The result is None if a client uploads such data, and without an attack.
        """
        if not self.acts_on:
            return None
        present = {"data"}
        for item in (item for sent in self.uploaded.values() for item in sent.values()):
            if item.kind in ("params", "update", "class_sums"):
                present.add("updates")
            elif item.kind == "rows" and isinstance(item.values, Tensor):
                present |= {"rows"} if item.values.is_floating_point() else set()
        described = {"data": "labeled rows", "updates": "updates", "rows": "predictions"}
        missing = [described[kind] for kind in sorted(self.acts_on)]
        return None if self.acts_on & present else " and ".join(missing)
