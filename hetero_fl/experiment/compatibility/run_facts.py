"""Facts that follow from the data, the models and the settings of a prepared run.

A client profile is a set of clients with equal settings and architectures.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from hetero_fl.algorithms.distillation import ProxyDistillation, predicts_without_prior
from hetero_fl.algorithms.hybrid import FedDF
from hetero_fl.algorithms.round_parts import permitted_part
from hetero_fl.config.communication import num_fraction_bits
from hetero_fl.config.simulation import DeviceConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.experiment.compatibility.facts import UploadFacts, first
from hetero_fl.federation.simulation.conditions import Devices
from hetero_fl.utils.errors import suggest_or_list
from hetero_fl.utils.objects import OBJECT_PREFIX, get_object
from hetero_fl.utils.text import format_list
from model_zoo import is_batch_norm, model_options


class RunFacts(UploadFacts):
    """Facts that follow from the data, the models and the settings of a prepared run."""

    # Rounds

    def takes_time(self) -> bool:
        """Return whether the tasks of at least one client take simulated or real time."""
        if self.config.devices is not None or self.federation.data.is_distributed:
            return True
        return any(settings.machine != DeviceConfig() for _, settings in self.settings)

    def instant_client(self) -> dict[str, str] | None:
        """Return a client whose tasks take no time although time is simulated, or None.

        Returns:
            A dictionary with the client under `client`, and under `key` the setting that simulates
            time for other clients or delays uploads.
        """
        if self.federation.data.is_distributed:
            return None
        timings = list(Devices(self.federation, self.config.devices).timing_of_profiles())
        faults = self.config.faults
        has_late = faults is not None and faults.late > 0
        if not has_late and not any(takes_time or not always for _, takes_time, always in timings):
            return None
        key = "faults.late" if has_late else "devices"
        return first({"key": key, "client": client} for client, timed, _ in timings if not timed)

    def num_evaluated(self) -> int | None:
        """Return the number of evaluated clients, or None if all honest clients are evaluated."""
        evaluated = len(self.federation.evaluated_clients)
        return evaluated if evaluated < self.num_clients - self.num_malicious else None

    @property
    def has_validation(self) -> bool:
        """Whether there are validation rows, global ones or those of an evaluated client."""
        data = self.federation.data
        return len(data.public_sets["common_validation"].rows) > 0 or any(
            data.n_rows(client_id, "validation") for client_id in self.federation.evaluated_clients
        )

    # Training

    def invalid_class_weights(self) -> dict[str, Any] | None:
        """Return a client with a wrong number of class weights, or with zeros only, or None."""
        given = ((client, settings.class_weights) for client, settings in self.settings)
        return first(
            {"client": client, "found": weights}
            for client, weights in given
            if isinstance(weights, list) and (len(weights) != self.task.outputs or not any(weights))
        )

    def weightless_client(self) -> dict[str, Any] | None:
        """Return a client whose training rows all have class weight 0, or None.

        Clients that keep their label counts private are not checked.
        """
        for client in self.federation.representative_clients:
            weights = self.federation.client_infos[client].settings.class_weights
            if isinstance(weights, list) and self.federation.data.reveals_labels(client):
                counts = self.federation.label_counts(client).tolist()
                if not any(w * n for w, n in zip(weights, counts, strict=True)):
                    return {"client": client, "weights": weights}
        return None

    def batch_of_one(self) -> dict[str, str] | None:
        """Return a setting because of which a model with BatchNorm trains on a single row, or None.

        Returns:
            A dictionary with the setting under `key` and the name of the model under `model`.
        """
        return first(
            {"key": key, "model": arch.name}
            for key, arch in self._batches_of_one()
            if arch in self.batch_norm_models
        )

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

    def similar_modules(self) -> dict[str, str] | None:
        """Describe two modules with equal tensors that are not averaged, or return None.

        The modules are objects of one class, with other values of some attributes.
        """
        owners: dict[str, str] = {}
        for profile in self.profiles:
            if get_object(profile.arch.name) is not None and self.shares_model:
                owners.setdefault(profile.arch.name, profile.first)
        # The first module of each signature. If others differ, one of them differs from the first.
        leaders: dict[object, str] = {}
        for name, owner in owners.items():
            leader = leaders.setdefault(get_object(name).signature, name)
            if name != leader and (names := get_object(leader).differences(get_object(name))):
                found = format_list(names, 3, quote=True)
                return {"one": owners[leader], "other": owner, "names": found}
        return None

    # Predictions

    def drawn_proxy_rows(self) -> int | None:
        """Return the number of proxy rows sampled in each round, or None if all rows are used."""
        rows = getattr(self.algorithm, "proxy_rows", None)
        return rows if rows is not None and rows < self.num_proxy else None

    def uncorrectable_client(self) -> str | None:
        """Return a client whose predictions the server cannot correct by the class prior, or None.

        FedDF predicts with uploaded models at the server, which needs the clients' label counts for
        the correction.
        """
        return first(
            client
            for client, settings in self.settings
            if isinstance(self.algorithm, FedDF)
            and settings.prior_correction
            and permitted_part(settings.shares) is None
            and "statistics" not in settings.shares
        )

    def differently_adjusted(self) -> dict[str, str] | None:
        """Return two clients, of which only the first predicts without its class prior, or None."""
        aligns = isinstance(self.algorithm, ProxyDistillation) and self.algorithm.align > 0
        if not aligns or self.task.kind != "multiclass" or not self.num_proxy:
            return None
        without = first(client for client, own in self.settings if predicts_without_prior(own))
        others = first(client for client, own in self.settings if not predicts_without_prior(own))
        return {"without": without, "other": others} if without and others else None

    # Sums

    @property
    def summed(self) -> dict[str, Any] | None:
        """The kind of sum under `key`, its settings, and what limits its range, or None."""
        for key, limit in (
            ("secure_sum", "64-bit integers"),
            ("homomorphic", "the modulus of ciphertexts"),
        ):
            section = getattr(self, key)
            if section is not None:
                bits = num_fraction_bits(section, self.cohort)
                most = section.max_fraction_bits(self.cohort)
                return {
                    "key": key,
                    "range": section.range,
                    "change": "range" if section.fraction_bits is None else "fraction_bits",
                    "bits": bits,
                    "most": most,
                    "step": 2.0**-bits,
                    "limit": limit,
                }
        return None

    def invalid_threshold(self) -> dict[str, int] | None:
        """Return a threshold that is no majority of the cohort, and the smallest one, or None."""
        if self.secure_sum is None:
            return None
        survivors = self.secure_sum.min_survivors(self.cohort)
        least = self.cohort // 2 + 1
        return None if least <= survivors <= self.cohort else {"found": survivors, "least": least}

    # Privacy

    def mixing_model(self) -> dict[str, str] | None:
        """Return a model whose gradient of a row depends on other rows, or None.

        These are models with BatchNorm, and models whose forward pass writes buffers.

        Returns:
            A dictionary with the configuration key of the model under `key`, the name of the model
            under `model`, the reason under `reason`, and another model under `other`.
        """
        for profile in self.profiles:
            for slot, arch in profile.models.items():
                if arch in self.batch_norm_models:
                    reason = "BatchNorm mixes the rows of a batch"
                    other = model_without_batch_norm(arch)
                elif arch.written_names:
                    reason = f"its forward pass writes '{min(arch.written_names)}' from rows"
                    other = "a model that changes in training only by its gradients"
                else:
                    continue
                own = f"clients: '{profile.first}': model"
                key = own if slot == "model" else f"algorithm.{slot}"
                model = arch.name.removeprefix(OBJECT_PREFIX)
                return {"key": key, "model": model, "reason": reason, "other": other}
        return None

    def unshared_tensor(self) -> dict[str, str] | None:
        """Return a tensor that training changes and that stays at the clients, or None."""
        return first(
            {"name": min(names), "model": profile.arch.name.removeprefix(OBJECT_PREFIX)}
            for profile in self.profiles
            if (names := profile.arch.local_names & profile.arch.written_names)
        )

    def weakly_protected(self) -> str | None:
        """Describe the protected rows or clients if δ is at least 1/n, for n rows or clients.

        A mechanism that publishes one of n rows or clients at random satisfies (0, 1/n)-DP. The
        result is None if δ is smaller, and without differential privacy.
        """
        if self.config.privacy is None:
            return None
        count = self.num_clients
        protected = f"{count} clients"
        if self.unit == "record":
            infos = self.federation.client_infos
            count = min(infos[c].num_rows for c in self.federation.representative_clients)
            protected = f"the {count} training rows of the smallest client"
        return protected if self.config.privacy.delta * count >= 1 else None

    def unknown_clip(self) -> dict[str, str] | None:
        """Return an item in `privacy.clip` that the method does not upload, or None."""
        clip = self.config.privacy.clip if self.config.privacy else None
        uploads = self.algorithm.uploads
        return first(
            {"item": name, "hint": suggest_or_list(name, uploads)}
            for name in (clip if isinstance(clip, dict) else ())
            if name not in uploads
        )

    # Attacks

    def small_image(self) -> int | None:
        """Return the shortest image side in pixels if the trigger is larger, else None."""
        attacks = self.config.attacks
        if attacks is None or not self.has_trigger:
            return None
        side = min(side for profile in self.profiles for side in profile.arch.input_shape[1:])
        return side if attacks.trigger > side else None

    def unknown_classes(self) -> list[dict[str, Any]]:
        """Return the classes in the attack settings that do not exist in the data."""
        attacks = self.config.attacks
        if attacks is None or self.task.kind != "multiclass":
            return []
        pairs = [("pairs", value) for pair in (attacks.pairs or {}).items() for value in pair]
        named = [("target", attacks.target), *pairs]
        return [{"key": key, "value": c} for key, c in named if c >= self.task.outputs]


def model_without_batch_norm(arch: ModelSpec) -> str:
    """Return the configuration of a similar model with GroupNorm instead of BatchNorm."""
    name = arch.name
    if name.startswith(OBJECT_PREFIX):
        return "a module with GroupNorm or LayerNorm"
    if "_bn_" in name:
        return name.replace("_bn_", "_gn_")
    if "norm" in model_options(name):
        return f"{{name: {name}, norm: group}}"
    return "{name: resnet18_small, norm: group}" if "resnet" in name else "cnn_gn_small"
