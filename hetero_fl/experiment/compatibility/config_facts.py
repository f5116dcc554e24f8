"""Properties of a run that depend on its configuration only.

Compatibility rules are functions of these properties. A client profile is a set of clients with
equal settings. An item is a named part of an upload, such as a model or class statistics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import AsyncPolicy, predicts_proxy_set, unused_options
from hetero_fl.config import Config
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import PARTITION_KINDS, SourceConfig
from hetero_fl.config.population import Population
from hetero_fl.config.schema import CLIENT_OPTIONS
from hetero_fl.utils.objects import OBJECT_PREFIX

ROBUST_KEYS = ("rule", "predictions", "statistics")
"""Keys of the section `aggregation` that select a rule, each for a different kind of item."""

PARTITION_KEYS = {
    "dirichlet": ("alpha", "cap"),
    "quantity": ("alpha",),
    "classes": ("classes", "classes_spread", "shots"),
    "drawn": ("alpha", "rows", "spread"),
}
"""Keys of the section `data.partition` that each kind of partition reads."""

T = TypeVar("T")


def first(elements: Iterable[T]) -> T | None:
    """Return the first element of an iterable, or None if it is empty."""
    return next(iter(elements), None)


class ConfigFacts:
    """Properties of a run that depend on its configuration only.

    Args:
        config: The configuration.
        clients: The population of clients.
        algorithm: The method with the settings of the configuration.
    """

    def __init__(self, config: Config, clients: Population, algorithm: Algorithm) -> None:
        self.config = config
        self.clients = clients
        self.algorithm = algorithm
        self.name = str(config.algorithm["name"])
        self.privacy = config.privacy
        self.unit = config.privacy.unit if config.privacy else ""
        self.policy = algorithm.needs.asynchronous or AsyncPolicy()
        self.is_async = config.runtime.mode == "async" or algorithm.needs.asynchronous is not None

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

    def given_models(self) -> dict[str, str] | None:
        """Describe the models that initialize the run, if any, and how to run without them."""
        source = self.config.init_from
        if not source:
            return None
        if source.startswith(OBJECT_PREFIX):
            return {"found": "init='given'", "advice": "pass model classes, or set init='seeded'"}
        return {"found": f"init_from={source}", "advice": "remove one of them"}

    def unused_option(self) -> str | None:
        """Return the key of a client option that is set but not used by the method, or None."""
        unused = unused_options(self.algorithm)
        for key, name, value in self.enabled_options():
            if name in unused:
                return key
            if (
                name == "recalibrate"
                and "proxy_predictions" in value
                and not predicts_proxy_set(self.algorithm)
            ):
                return f"{key}: proxy_predictions"
        return None

    def unused_partition(self) -> bool:
        """Return whether a partition is set, but no two clients divide a data set."""
        partition = self.config.data.partition
        default = type(partition)(min_size=partition.min_size)
        is_set = partition.kind != "natural" and partition.model_dump() != default.model_dump()
        if not is_set or any(p.settings.data is None for p in self.clients.profiles):
            return False
        return len({p.settings.data for p in self.clients.profiles}) == len(self.clients)

    def unused_size(self) -> str | None:
        """Return a client whose size is set although its data is not divided, or None."""
        owners: Counter[SourceConfig | None] = Counter()
        for profile in self.clients.profiles:
            owners[profile.settings.data] += profile.count
        # The default applies to the clients without data of their own.
        default = self.config.clients.defaults.size if owners[None] else 1.0
        return first(
            profile.first
            for profile in self.clients.profiles
            if profile.settings.data is not None
            and owners[profile.settings.data] == 1
            and profile.settings.size != default
        )

    def unused_partition_setting(self) -> str | None:
        """Return a key of `data.partition` that the kind of partition does not read, or None."""
        partition = self.config.data.partition
        if partition.kind not in PARTITION_KINDS:
            return None
        default = type(partition)()
        read = {"min_size", "kind", "arguments", *PARTITION_KEYS.get(partition.kind, ())}
        for key in type(partition).model_fields.keys() - read:
            if getattr(partition, key) not in (None, getattr(default, key)):
                return key
        return None

    def unused_proxy_setting(self) -> str | None:
        """Return a key of `data.proxy` that is set although there is no proxy set, or None."""
        proxy = self.config.data.proxy
        if proxy.size or proxy.source is not None:
            return None
        return "labels" if proxy.labels else "columns" if proxy.columns is not None else None

    def single_uploads(self) -> str | None:
        """Return a setting that requires individual uploads at the server.

        Returns:
            The setting as `key=value`, or None if there is no such setting.
        """
        for key in ROBUST_KEYS:
            if (value := getattr(self.config.aggregation, key)) != "mean":
                return f"aggregation.{key}={value}"
        attacks = self.config.attacks
        return None if attacks is None else f"attacks.name={attacks.name}"

    def compressing_setting(self) -> str | None:
        """Return a compression setting as `key=stage`, or None if messages are not compressed."""
        channel = self.config.channel
        for key in ("compress", "compress_down"):
            if stage := first(getattr(channel, key)):
                return f"{key}={stage.kind}"
        return None

    def num_wanted(self) -> int:
        """Return the number of uploads that complete a round."""
        return self.config.clients.per_round or len(self.clients)

    def num_sampled(self) -> int:
        """Return the number of clients sampled for a round."""
        return self.config.cohort.num_sampled(self.config.clients.per_round, len(self.clients))

    def min_survivors(self) -> int:
        """Return the number of clients that must complete secure aggregation.

        The result is 0 if secure aggregation is disabled.
        """
        secure_sum = self.config.channel.secure_sum
        return 0 if secure_sum is None else secure_sum.min_survivors(self.num_sampled())

    def rare_sender(self) -> dict[str, Any] | None:
        """Return a client that does not upload in every round, or None.

        Returns:
            A dictionary with the client under `client` and its `share_every` under `every`.
        """
        for profile in self.clients.profiles:
            if profile.settings.share_every > 1:
                return {"client": profile.first, "every": profile.settings.share_every}
        return None

    def waiting_setting(self) -> str | None:
        """Return a key of `cohort` with a value other than the default, or None."""
        cohort = self.config.cohort
        default = type(cohort)()
        names = [n for n in type(default).model_fields if getattr(cohort, n) != getattr(default, n)]
        return min(names, default=None)
