"""Facts that follow from the configuration of a run, on which features and rules depend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import AsyncPolicy, predicts_proxy_set, unused_options
from hetero_fl.config import Config
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import PARTITION_KINDS, SourceConfig
from hetero_fl.config.population import Population
from hetero_fl.config.schema import CLIENT_OPTIONS
from hetero_fl.utils.objects import OBJECT_PREFIX

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
        self.num_wanted = config.clients.per_round or len(clients)

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
        for client, settings in self.settings:
            if found := value(settings):
                return f"{found} ({client})"
        return ""

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
        for key in type(partition).model_fields.keys() - read:
            if getattr(partition, key) not in (None, getattr(default, key)):
                return key
        return None

    def unreachable_threshold(self) -> dict[str, int] | None:
        """Return the sampled and the required clients if too few uploads of a cohort are used."""
        per_round = self.config.clients.per_round
        secure_sum = self.config.channel.secure_sum
        if per_round is None or secure_sum is None:
            return None
        sampled = self.config.cohort.num_sampled(per_round, len(self.clients))
        survivors = secure_sum.min_survivors(sampled)
        return {"sampled": sampled, "survivors": survivors} if survivors > per_round else None
