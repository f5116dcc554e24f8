"""Properties of a run that depend on its data and models.

Compatibility rules are functions of these properties. Properties that require a dry run of the
method are computed on first use. A client profile is a set of clients with equal settings and
architectures. An item is a named part of an upload, such as a model or class statistics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from torch import Tensor

from hetero_fl.aggregation import Upload
from hetero_fl.aggregation.robust_means import AggregationRules, RobustCombiner
from hetero_fl.algorithms.distillation import ProxyDistillation, predicts_without_prior
from hetero_fl.algorithms.hybrid import FedDF
from hetero_fl.algorithms.round_parts import permitted_part
from hetero_fl.config.base import StalenessConfig
from hetero_fl.config.communication import (
    HomomorphicConfig,
    SecureAggregationConfig,
    num_fraction_bits,
)
from hetero_fl.config.simulation import DeviceConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.payload import Payload
from hetero_fl.engine.driver import run_plan, translate_user_errors
from hetero_fl.experiment.compatibility.config_facts import ROBUST_KEYS, first
from hetero_fl.experiment.compatibility.upload_facts import UploadFacts
from hetero_fl.federation.simulation.conditions import Devices
from hetero_fl.robustness.rules import PredictionRule, Rule, prediction_rule, rule
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.objects import OBJECT_PREFIX
from hetero_fl.utils.text import format_list
from model_zoo import is_batch_norm, model_options

PRECISION_OF_MEANS = 1e-6
"""Absolute error above which the rounding of sums is noted."""


class RunFacts(UploadFacts):
    """Properties of a run that depend on its data and models.

    Args:
        config: The configuration.
        algorithm: The method with all its settings.
        federation: The clients with their data and models.
    """

    def takes_time(self) -> bool:
        """Return whether the tasks of at least one client take simulated or real time."""
        if self.config.devices is not None or self.federation.data.is_distributed:
            return True
        return any(profile.settings.machine != DeviceConfig() for profile in self.profiles)

    def num_evaluated(self) -> int | None:
        """Return the number of evaluated clients, or None if all honest clients are evaluated."""
        evaluated = len(self.federation.evaluated_clients)
        malicious = len(self.malicious.ids) if self.malicious else 0
        return evaluated if evaluated < self.num_clients - malicious else None

    @cached_property
    def class_weights(self) -> dict[str, list[float]]:
        """Class weights that are set as numbers, keyed by the first client of each profile."""
        weights = {profile.first: profile.settings.class_weights for profile in self.profiles}
        return {client: found for client, found in weights.items() if isinstance(found, list)}

    def weightless_client(self) -> dict[str, Any] | None:
        """Return a client whose training rows all have class weight 0, or None.

        Clients that keep their label counts private are not checked.
        """
        infos = self.federation.client_infos
        for leader, weights in self.class_weights.items():
            if min(weights) != 0:
                continue
            for client_id in self.federation.representative_clients:
                is_known = self.federation.data.reveals_labels(client_id)
                if not is_known or infos[client_id].settings is not infos[leader].settings:
                    continue
                counts = self.federation.label_counts(client_id).tolist()
                if not any(w * n for w, n in zip(weights, counts, strict=True)):
                    return {"client": client_id, "weights": weights}
        return None

    def batch_of_one(self) -> dict[str, str] | None:
        """Return a setting because of which a model with BatchNorm trains on a single row, or None.

        Returns:
            A dictionary with the setting under `key` and the name of the model under `model`.
        """
        for key, arch in self._batches_of_one():
            if arch in self.batch_norm_models:
                return {"key": key, "model": arch.name}
        return None

    def _batches_of_one(self) -> Iterator[tuple[str, ModelSpec]]:
        for profile in self.profiles:
            if profile.settings.batch_size == 1:
                for arch in profile.models.values():
                    yield f"clients: '{profile.first}': batch_size: got 1", arch
        for client_id in self.federation.data.client_rows.clients_with_one_row():
            for arch in self.federation.client_infos[client_id].models.values():
                yield f"clients: '{client_id}': data: has 1 training row", arch
        size = getattr(self.algorithm, "proxy_batch_size", None)
        if size is not None and self.num_proxy and min(size, self.num_proxy) == 1:
            key = "algorithm.proxy_batch_size: got 1" if size == 1 else "data.proxy: has 1 row"
            for profile in self.profiles:
                yield key, profile.arch
            if self.federation.student is not None:
                yield key, self.federation.student

    @cached_property
    def batch_norm_models(self) -> set[ModelSpec]:
        """Specifications of the models that contain BatchNorm layers."""
        models = {m for profile in self.profiles for m in profile.models.values()}
        if self.federation.student is not None:
            models.add(self.federation.student)
        return {m for m in models if any(map(is_batch_norm, m.build().modules()))}

    @property
    def has_validation(self) -> bool:
        """Whether there are validation rows, global ones or those of an evaluated client."""
        data = self.federation.data
        return len(data.public_sets["common_validation"].rows) > 0 or any(
            data.n_rows(client_id, "validation") for client_id in self.federation.evaluated_clients
        )

    def drawn_proxy_rows(self) -> int | None:
        """Return the number of proxy rows sampled in each round, or None if all rows are used."""
        rows = getattr(self.algorithm, "proxy_rows", None)
        return rows if rows is not None and rows < self.num_proxy else None

    def instant_client(self) -> dict[str, str] | None:
        """Return a client whose tasks take no time although time is simulated, or None.

        Returns:
            A dictionary with the client under `client`, and under `key` the setting that simulates
            time for other clients or delays uploads.
        """
        if self.federation.data.is_distributed:
            return None
        timings = list(Devices(self.federation, self.config.devices).timing_of_profiles())
        instant = first(client for client, takes_time, _ in timings if not takes_time)
        if instant is None:
            return None
        if self.config.faults is not None and self.config.faults.late > 0:
            return {"key": "faults.late", "client": instant}
        if any(takes_time or not always for _, takes_time, always in timings):
            return {"key": "devices", "client": instant}
        return None

    @property
    def staleness(self) -> StalenessConfig:
        """Staleness settings of the method, or of `runtime.staleness` if the method has none."""
        return self.policy.staleness or self.config.runtime.staleness

    @property
    def staleness_key(self) -> str:
        """Configuration section that contains the settings in `staleness`."""
        return "runtime.staleness" if self.policy.staleness is None else "algorithm"

    def coarse_rounding(
        self, config: SecureAggregationConfig | HomomorphicConfig
    ) -> dict[str, Any] | None:
        """Return the step to which clients round weighted values, and the key to change.

        The result is None if the mean of clients with equal weights is exact to 1e-6.
        """
        step: float = 2.0 ** -num_fraction_bits(config, self.cohort)
        if step <= PRECISION_OF_MEANS:
            return None
        return {"step": step, "key": "range" if config.fraction_bits is None else "fraction_bits"}

    def trains_before_evaluation(self) -> bool:
        """Return whether clients train on private rows before an evaluation of the models."""
        privacy = self.expectations.privacy
        # Only called for record-level privacy.
        assert privacy is not None
        with translate_user_errors():
            for info, received in self.broadcasts:
                client = self.expectations.placeholder_client(info, 0)
                for hook in (self.algorithm.deploy, self.algorithm.personalize):
                    ledger = privacy.make_ledger(self.expectations.backend)
                    assert ledger is not None
                    run_plan(client, hook(client, received), ledger)
                    if ledger.charges[client.participant_id]:
                        return True
        return False

    def unaccountable_training(self) -> str | None:
        """Return why the privacy cost of a client's training cannot be computed.

        The result is None if the privacy cost of all clients can be computed.
        """
        with translate_user_errors():
            for info, received in self.broadcasts:
                try:
                    self.expectations.dry_run_upload(info, received, 0)
                except UserError as error:
                    return str(error)
        return None

    def mixing_model(self) -> dict[str, str] | None:
        """Return a model whose gradient of a row depends on other rows, or None.

        These are models with BatchNorm, and models whose forward pass writes buffers.

        Returns:
            A dictionary with the configuration key of the model under `key`, the name of the model
            under `model`, the reason under `reason`, and another model under `other`.
        """
        for profile in self.profiles:
            for slot, arch in profile.models.items():
                own = f"clients: '{profile.first}': model"
                key = own if slot == "model" else f"algorithm.{slot}"
                if arch in self.batch_norm_models:
                    reason = "BatchNorm mixes the rows of a batch"
                    return {"key": key, "reason": reason, **_other(arch)}
                if arch.written_names:
                    reason = f"its forward pass writes '{min(arch.written_names)}' from rows"
                    other = "a model that changes in training only by its gradients"
                    return {"key": key, "reason": reason, **_other(arch), "other": other}
        return None

    def unshared_tensor(self) -> dict[str, str] | None:
        """Return a tensor that training changes and that stays at the clients, or None."""
        for profile in self.profiles:
            if names := profile.arch.local_names & profile.arch.written_names:
                return {"name": min(names), "model": _other(profile.arch)["model"]}
        return None

    def weakly_protected(self) -> str | None:
        """Describe the protected rows or clients if δ is at least 1/n, for n rows or clients.

        A mechanism that publishes one of n rows or clients at random satisfies (0, 1/n)-DP. The
        result is None if δ is smaller, and without differential privacy.
        """
        if self.privacy is None:
            return None
        count = self.num_clients
        protected = f"{count} clients"
        if self.unit == "record":
            infos = self.federation.client_infos
            count = min(
                infos[client_id].num_rows for client_id in self.federation.representative_clients
            )
            protected = f"the {count} training rows of the smallest client"
        return protected if self.privacy.delta * count >= 1 else None

    @cached_property
    def rules(self) -> dict[str, str]:
        """Aggregation rules other than the mean, keyed by the keys of the section `aggregation`."""
        values = {key: str(getattr(self.config.aggregation, key)) for key in ROBUST_KEYS}
        return {key: value for key, value in values.items() if value != "mean"}

    @cached_property
    def items_by_rule(self) -> dict[str, list[str]]:
        """Names of the items to which each key of the section `aggregation` applies."""
        combined = self.dry_round[1]
        kinds = {"rule": "models", "predictions": "rows", "statistics": "class_sums"}
        return {key: sorted(n for n, how in combined if how == kinds[key]) for key in ROBUST_KEYS}

    def unprotected_items(self) -> list[dict[str, str]]:
        """Return the items that are averaged without a robust rule.

        Returns:
            One dictionary for each key of the section `aggregation`, with the key under `key` and
            the names of the items under `items`.
        """
        return [
            {"key": key, "items": ", ".join(items)}
            for key, items in self.items_by_rule.items()
            if items and key not in self.rules
        ]

    def idle_rule(self) -> dict[str, str] | None:
        """Return an aggregation rule that applies to no item, or None."""
        described = {
            "rule": "parameters",
            "predictions": "predictions",
            "statistics": "class sums",
        }
        for key, value in self.rules.items():
            if not self.items_by_rule[key]:
                return {"key": key, "value": value, "items": described[key]}
        return None

    def prior_option(self) -> str | None:
        """Return the key of a client option that is set and uses class frequencies, or None."""
        options = ("logit_adjustment", "local_prior", "prior_correction")
        return first(key for key, name, _ in self.enabled_options() if name in options)

    def uncorrectable_client(self) -> str | None:
        """Return a client whose predictions the server cannot correct by the class prior, or None.

        FedDF predicts with uploaded models at the server, which needs the clients' label counts for
        the correction.
        """
        if not isinstance(self.algorithm, FedDF):
            return None
        return first(
            profile.first
            for profile in self.profiles
            if profile.settings.prior_correction
            and permitted_part(profile.settings.shares) is None
            and "statistics" not in profile.settings.shares
        )

    def differently_adjusted(self) -> dict[str, str] | None:
        """Return two clients, of which only the first predicts without its class prior, or None."""
        if not self.aligns_teacher or self.task.kind != "multiclass" or not self.num_proxy:
            return None
        without = first(p.first for p in self.profiles if predicts_without_prior(p.settings))
        others = first(p.first for p in self.profiles if not predicts_without_prior(p.settings))
        return {"without": without, "other": others} if without and others else None

    @property
    def aligns_teacher(self) -> bool:
        """Whether the method aligns the teacher's predictions with label frequencies."""
        return isinstance(self.algorithm, ProxyDistillation) and self.algorithm.align > 0

    def idle_teacher_settings(self) -> list[str]:
        """Describe the settings of the teacher that have no effect on the kind of task."""
        method, kind = self.algorithm, self.task.kind
        if kind == "multiclass" or not self.num_proxy or not isinstance(method, ProxyDistillation):
            return []
        found = []
        if method.align:
            found.append("algorithm.align has no effect")
        if method.teacher == "contrast":
            found.append("algorithm.teacher=contrast weights clients by their number of rows")
        if method.sharpen != "none" and kind == "regression":
            found.append("algorithm.sharpen has no effect")
        return found

    def idle_recalibration(self) -> str | None:
        """Return the key of a recalibration setting if there is no proxy set, else None."""
        return first(
            key
            for key, name, _ in self.enabled_options()
            if name == "recalibrate" and not self.num_proxy
        )

    def private_fine_tuning(self) -> str | None:
        """Return a client that is fine-tuned on its rows before an evaluation, or None."""
        return first(p.first for p in self.profiles if p.settings.fine_tune_epochs)

    def outvoted_rule(self) -> dict[str, Any] | None:
        """Return an aggregation rule for which an item has too few uploads, or None."""
        config = self.config.aggregation
        combiners: dict[str, Rule | PredictionRule] = {}
        for key, value in self.rules.items():
            if key == "rule":
                combiners[key] = rule[value](config)
            elif key == "predictions":
                combiners[key] = prediction_rule[value](config)
            else:
                # The median requires as many clients as the base class.
                combiners[key] = Rule(config)
        for cohort in self._cohorts():
            for key, combiner in combiners.items():
                for item in self.items_by_rule[key]:
                    for description, senders in self._senders(item, key, cohort):
                        if found := self._too_few(combiner, description, senders):
                            return {"key": key, "value": self.rules[key], **found}
        return None

    def _cohorts(self) -> Iterator[Counter[str]]:
        """Yield the number of clients per profile for each distinct composition of a cohort."""
        seen: set[frozenset[tuple[str, int]]] = set()
        per_round = self.config.clients.per_round
        for index in range(self.federation.num_rounds if per_round is not None else 1):
            sampled = self.federation.sample_cohort(per_round, index)
            count = Counter(self.federation.client_infos.profile(c).first for c in sampled)
            composition = frozenset(count.items())
            if composition not in seen:
                seen.add(composition)
                yield count

    def _senders(self, item: str, key: str, cohort: Counter[str]) -> Iterator[tuple[str, int]]:
        """Yield the separately aggregated parts of an item.

        Args:
            item: Name of the item.
            key: Key of the rule in the section `aggregation`.
            cohort: Number of clients per profile, keyed by the first client of the profile.

        Yields:
            A description of the part, and the number of clients in the cohort that upload it.
        """
        sent = self.dry_round[0]
        senders = [client for client in sent if item in sent[client]]
        if key != "rule":
            spec = self.algorithm.uploads.get(item)
            # The server also combines predictions that it computes with uploaded models.
            from_models = spec is not None and spec.use == "each"
            yield item, sum(cohort[client] for client in (sent if from_models else senders))
            return
        rules = AggregationRules(self.federation.aggregation, self.task)
        declaration = self.algorithm.uploads[item]
        models = RobustCombiner(item, declaration, self.federation.common, rules)
        senders = [client for client in senders if isinstance(sent[client][item].values, dict)]
        for client in senders:
            info = self.federation.client_infos[client]
            models.add(Upload(info, Payload(sent[client])))
        for (group, places), owners in models.blocks().items():
            if total := sum(cohort[senders[place]] for place in places):
                name = owners[0][0]
                yield f"{name} of {group}" if group else name, total

    def _too_few(
        self, combiner: Rule | PredictionRule, description: str, senders: int
    ) -> dict[str, Any] | None:
        malicious = self.config.aggregation.num_malicious(senders)
        least = combiner.min_clients(malicious)
        if senders >= least:
            return None
        most = max((f for f in range(senders) if combiner.min_clients(f) <= senders), default=0)
        if most:
            advice = f"set aggregation.malicious to {most} or less"
        else:
            advice = "use the model for more clients, or remove the rule"
        return {
            "malicious": f"{malicious} malicious client{'s' if malicious != 1 else ''}",
            "least": least,
            "senders": senders,
            "item": description,
            "advice": advice,
        }

    @property
    def acts_on(self) -> frozenset[str]:
        """The targets of the attack: `data`, `rows`, `updates`, or none without an attack."""
        return self.malicious.attack.acts_on if self.malicious else frozenset()

    @property
    def has_trigger(self) -> bool:
        """Whether the attack adds a trigger pattern to images."""
        return self.malicious is not None and self.malicious.has_trigger

    def named_malicious(self) -> dict[str, Any] | None:
        """Return the number and the first ids of the malicious clients, or None without any."""
        if self.malicious is None:
            return None
        ids = self.malicious.sorted_ids
        return {"count": len(ids), "ids": format_list(ids, 6)}

    def missing_targets(self) -> str | None:
        """Describe the data that the attack changes if no client uploads such data.

        The result is None if a client uploads such data, and without an attack.
        """
        items = [item for sent in self.dry_round[0].values() for item in sent.values()]
        present = {"data"}
        for item in items:
            if item.kind in ("params", "update", "class_sums"):
                present.add("updates")
            elif item.kind == "rows" and isinstance(item.values, Tensor):
                present |= {"rows"} if item.values.is_floating_point() else set()
        if not self.acts_on or self.acts_on & present:
            return None
        described = {"data": "labeled rows", "updates": "updates", "rows": "predictions"}
        return " and ".join(described[kind] for kind in sorted(self.acts_on))

    def small_image(self) -> int | None:
        """Return the shortest image side in pixels if the trigger is larger, else None."""
        attacks = self.config.attacks
        sides = [side for profile in self.profiles for side in profile.arch.input_shape[1:]]
        return min(sides) if attacks is not None and attacks.trigger > min(sides) else None

    def unknown_class(self) -> dict[str, Any] | None:
        """Return a class in the attack settings that does not exist in the data, or None."""
        attacks = self.config.attacks
        if attacks is None or self.task.kind != "multiclass":
            return None
        pairs = attacks.pairs or {}
        most = max([attacks.target, *pairs, *pairs.values()])
        if most < self.task.outputs:
            return None
        return {"key": "target" if attacks.target >= self.task.outputs else "pairs", "value": most}


def _other(arch: ModelSpec) -> dict[str, str]:
    """Return the name of a model, and a similar model without BatchNorm."""
    if arch.name.startswith(OBJECT_PREFIX):
        model = arch.name.removeprefix(OBJECT_PREFIX)
        return {"model": model, "other": "a module with GroupNorm or LayerNorm"}
    return {"model": arch.name, "other": group_norm_variant(arch.name)}


def group_norm_variant(name: str) -> str:
    """Return the configuration of a similar model with GroupNorm instead of BatchNorm."""
    if "_bn_" in name:
        return name.replace("_bn_", "_gn_")
    if "norm" in model_options(name):
        return f"{{name: {name}, norm: group}}"
    return "{name: resnet18_small, norm: group}" if "resnet" in name else "cnn_gn_small"
