"""The version of the package and the names that have changed since the previous release."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

__version__ = "0.2.0"

# New names of documented modules, classes and functions that have moved, keyed by old name. Entries
# are kept for one release.
MOVED_NAMES = {
    "hetero_fl.aggregation.rules": "hetero_fl.robustness.rules",
    "hetero_fl.aggregation.rules.base": "hetero_fl.robustness.rules",
    "hetero_fl.aggregation.rules.base.middle": "hetero_fl.robustness.rules.trimmed_mean",
    "hetero_fl.algorithms.algorithm": "hetero_fl.algorithms.register_algorithm",
    "hetero_fl.algorithms.mentee": "hetero_fl.algorithms.mutual",
    "hetero_fl.algorithms.mentee.WithMentee": "hetero_fl.algorithms.mutual.MenteeTraining",
    "hetero_fl.algorithms.width": "hetero_fl.algorithms.prototypes",
    "hetero_fl.algorithms.width.CommonWidth": "hetero_fl.algorithms.prototypes.CommonFeatureWidth",
    "hetero_fl.channel.attacks": "hetero_fl.robustness.attacks",
    "hetero_fl.channel.link": "hetero_fl.communication.link",
    "hetero_fl.channel.privacy.accounting": "hetero_fl.privacy.accounting",
    "hetero_fl.codec": "hetero_fl.utils.serialization",
    "hetero_fl.config.load_config": "hetero_fl.load_config",
    "hetero_fl.config.source": "hetero_fl.config.data",
    "hetero_fl.data.join": "hetero_fl.data.join_images_and_table",
    "hetero_fl.data.source": "hetero_fl.data.register_source",
    "hetero_fl.errors": "hetero_fl.utils.errors",
    "hetero_fl.experiment.deployment.audit_log": "hetero_fl.deployment.audit_log",
    "hetero_fl.experiment.deployment.transport": "hetero_fl.deployment.messages",
    "hetero_fl.mutual": "hetero_fl.core.mutual_objectives",
    "hetero_fl.mutual.Mutual": "hetero_fl.core.mutual_objectives.MutualDistillation",
    "hetero_fl.objectives": "hetero_fl.core.objectives",
    "hetero_fl.objectives.ClassDigest": "hetero_fl.core.objectives.ClassTeacherDistillation",
    "hetero_fl.objectives.Digest": "hetero_fl.core.objectives.TeacherDistillation",
    "hetero_fl.payload": "hetero_fl.core.payload",
    "hetero_fl.plan": "hetero_fl.core.plan",
    "hetero_fl.saved": "hetero_fl.core.saved_model",
    "hetero_fl.state": "hetero_fl.core.participant",
    "hetero_fl.state.own": "hetero_fl.core.participant.copy_tensors",
}

# Renamed members and arguments, keyed by class and old name. A value is the new member of the
# class, or the code to write instead. Entries are kept for one release.
RENAMED_MEMBERS = {
    "Algorithm": {
        "add_log_prior": "hetero_fl.algorithms.add_log_prior(client, logits)",
        "aggregation_group": "client_info.arch.family_id",
        "architecture": "models",
        "asynchronous": "needs = Needs(asynchronous=AsyncPolicy(…))",
        "average": "hetero_fl.algorithms.average_models(server, uploads)",
        "buffer_size": "needs = Needs(asynchronous=AsyncPolicy(…))",
        "called": "the label of a ModelSpec that `models` returns",
        "counted": "needs = Needs(counts_traffic=…)",
        "counts_traffic": "needs = Needs(counts_traffic=…)",
        "dearest": "needs = Needs(largest_uploads=…)",  # style: ok (old name)
        "discount": "needs = Needs(asynchronous=AsyncPolicy(…))",
        "display_name": "the label of a ModelSpec that `models` returns",
        "distils": "needs = Needs(proxy_set=…)",  # style: ok (old name)
        "download_part": "shared = SharedPart(received=…)",
        "everybody": "needs = Needs(all_clients=…)",  # style: ok (old name)
        "extra_models": "models",
        "extras": "models",
        "family": "client_info.arch.family_id",
        "fit": "hetero_fl.algorithms.local_fit(client, …)",
        "gives": "hetero_fl.algorithms.may_share(client, …)",
        "goal": "needs = Needs(asynchronous=AsyncPolicy(…))",
        "has_models_per_client": "needs = Needs(models_per_client=…)",
        "inference_model": "the first step of `predict`",
        "is_distillation": "needs = Needs(proxy_set=…)",
        "kept_state": "shared = SharedPart(received=…)",
        "local_tensor_names": "shared = SharedPart(local=…)",
        "logit_adjustment": "client.settings.logit_adjustment",
        "may_share": "hetero_fl.algorithms.may_share(client, …)",
        "model_spec": "models",
        "needs_all_clients": "needs = Needs(all_clients=…)",
        "needs_proxy": 'needs = Needs(proxy_set="required")',
        "one_by_one": "needs = Needs(models_per_client=…)",
        "one_shot": "needs = Needs(one_upload=True)",
        "part": "hetero_fl.algorithms.base.shared_part(method, settings)",
        "personalise": "personalize",  # style: ok (old name)
        "phase": "needs = Needs(one_upload=True)",
        "portion": "hetero_fl.algorithms.base.shareable_tensors(method, …)",
        "private": "shared = SharedPart(received=…)",
        "reads": "evaluated_when",
        "reads_proxy_labels": 'needs = Needs(proxy_set="labeled")',
        "requires": "needs = Needs(also=…)",
        "resolve": "configure",
        "sends": "hetero_fl.algorithms.base.upload_part(method, …)",
        "server_model_slot": "server_model",
        "server_slot": "server_model",
        "share": "hetero_fl.algorithms.upload_model(method, client)",
        "shareable_tensors": "hetero_fl.algorithms.base.shareable_tensors(method, …)",
        "shared_part": "hetero_fl.algorithms.base.shared_part(method, settings)",
        "sharing": "hetero_fl.algorithms.base.uploads_in_round(settings, …)",
        "slot": "shared = SharedPart(slot=…)",
        "staleness_config": "needs = Needs(asynchronous=AsyncPolicy(…))",
        "start": "setup",
        "stays": "shared = SharedPart(local=…)",
        "takes": "shared = SharedPart(received=…)",
        "tasks": "needs = Needs(tasks=…)",
        "upload_part": "hetero_fl.algorithms.base.upload_part(method, …)",
        "upload_phase": "needs = Needs(one_upload=True)",
        "uploads_in_round": "hetero_fl.algorithms.base.uploads_in_round(settings, …)",
        "used": "the first step of `predict`",
        "with_prior": "hetero_fl.algorithms.add_log_prior(client, logits)",
        "with_worst_case_size": "needs = Needs(largest_uploads=…)",
    },
    "Attack": {
        "rows_of": "poison_rows",
        "said": "poison_predictions",
        "triggered": "triggered_rows",
        "updates": "poison_updates",
    },
    "AttackContext": {
        "draws": "generator",
        "liars": "malicious",  # style: ok (old name)
        "round": "round_idx",
    },
    "ClientDirectory": {"kind": "profile", "kinds": "profiles", "named": "format_clients"},
    "ClientInfo": {
        "id": "client_id",
        "n": "num_rows",
        "reading": "purpose",
        "is_evaluation": "purpose",
    },
    "FederatedData": {
        "beside": "extra_columns",  # style: ok (old name)
        "private": "client_rows",
        "public": "public_sets",
    },
    "FederatedTrainer": {"round": "run_round", "saved": "on_checkpoint"},
    "Fit": {
        "as_id": "stream_id",
        "beside": "extra_batches",  # style: ok (old name)
        "given": "context",
    },
    "ItemSpec": {"across": "across_architectures", "says": "prediction_type"},
    "MenteeTraining": {
        "both": "objective",
        "fit_both": "objective",
        "joint_fit": "objective",
        "mean": "mentee_mean",
        "small": "mentee_model",
        "together": "objective",
    },
    "ModelSpec": {
        "group": "family",
        "group_id": "family_id",
        "id": "spec_id",
        "initial": "initial_tensors",
        "width": "feature_width",
    },
    "Objective": {"private": "private_loss", "public": "public_loss", "total": "total_loss"},
    "Participant": {
        "clock": "round_context",
        "id": "participant_id",
        "n": "num_rows",
        "work": "step_share",
    },
    "PartitionContext": {"draws": "rng"},
    "PredictionAttack": {"lie": "poison_logits"},
    "PredictionRule": {"least": "min_clients"},
    "PreparedRun": {"rounds": "make_trainer"},
    "ProxyDistillation": {
        "distil": "distill_into_groups",  # style: ok (old name)
        "label_counts_item": "label_counts",
        "opinion": "upload_predictions",
        "proxy_predictions": "upload_predictions",
    },
    "ProxyTraining": {
        "at_server": "server_fit",
        "digest": "distill",
        "drawn": "proxy_indices",
        "rehearsal": "proxy_replay",  # style: ok (old name)
        "remember": "store_teacher",
        "remembered": "teacher_for",
        "taught": "teacher_rows",
    },
    "RoundContext": {"again": "attempt", "round": "round_idx", "rounds": "num_rounds"},
    "Rows": {"beside": "extra_columns", "through": "preprocess"},  # style: ok (old name)
    "Rule": {"least": "min_clients"},
    "TensorRows": {"table": "tensors"},
    "Upload": {"worth": "staleness_weight"},
    "Uploads": {
        "combined": "aggregated_items",
        "having": "containing",
        "heard_of": "is_available",
    },
}


def describe_new_name(error: BaseException) -> str:
    """Return a hint with the new name if an error was caused by a renamed object.

    Args:
        error: The error that an unknown import, attribute or argument raised.

    Returns:
        Text to append to the message of the error, or an empty string if the name has not changed.

    Example:
        >>> from hetero_fl.utils.version import describe_new_name
        >>> describe_new_name(ModuleNotFoundError(name="hetero_fl.plan"))
        '; hetero_fl.plan is now hetero_fl.core.plan'
    """
    if isinstance(error, ImportError) and error.name is not None:
        match = re.match(r"cannot import name '(\w+)'", str(error))
        return _describe_import(error.name, match[1] if match else "")
    if isinstance(error, AttributeError) and error.name is not None:
        owner: Any = error.obj
        if isinstance(owner, ModuleType):
            return _describe_import(owner.__name__, error.name)
        if isinstance(owner, super):
            owner = getattr(owner, "__self_class__", None)
        cls = owner if isinstance(owner, type) else type(owner)
        return _describe_member([base.__name__ for base in cls.__mro__], error.name)
    # `dataclasses.replace` and `local_fit` call the constructor, too.
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if isinstance(error, TypeError) and match:
        return _describe_member([match[1]], match[2])
    # Pydantic considers a class variable of the previous release a field without annotation.
    match = re.match(r"A non-annotated attribute was detected: `(\w+) =", str(error))
    return _describe_member(["Algorithm"], match[1]) if match else ""


def describe_renamed_hooks(cls: type) -> str:
    """Describe the renamed methods and class variables that a user's class defines.

    Args:
        cls: The user's class.

    Returns:
        Texts such as `Class.old is now new`, separated by commas, or an empty string if the class
        defines no old name.
    """
    bases = [base.__name__ for base in cls.__mro__ if _is_internal(base)]
    renamed = {old: new for base in bases for old, new in RENAMED_MEMBERS.get(base, {}).items()}
    found = {
        name: f"{base.__name__}.{name} is now {renamed[name]}"
        for base in reversed(cls.__mro__)
        if not _is_internal(base)
        for name in vars(base)
        if name in renamed
    }
    return ", ".join(found.values())


def _is_internal(cls: type) -> bool:
    return cls.__module__.startswith("hetero_fl.")


def _describe_import(module: str, name: str) -> str:
    missing = f"{module}.{name}" if name else module
    found = {old: new for old, new in MOVED_NAMES.items() if f"{old}.".startswith(f"{missing}.")}
    # An empty folder of an older checkout can be imported.
    if not found and module in MOVED_NAMES:
        found = {module: MOVED_NAMES[module]}
    # The user may know the new module, but not the new name.
    if not found and name:
        found = {
            f"{module}.{name}": new
            for old, new in MOVED_NAMES.items()
            if old.endswith(f".{name}") and new.startswith(f"{module}.")
        }
    return "".join(f"; {old} is now {new}" for old, new in found.items())


def _describe_member(class_names: list[str], name: str) -> str:
    for class_name in class_names:
        new = RENAMED_MEMBERS.get(class_name, {}).get(name)
        if new is not None:
            replacement = f"{class_name}.{new}" if new.isidentifier() else new
            return f"; {class_name}.{name} is now {replacement}"
    return ""
