"""The version of the package, and names that have changed since the previous one."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# Names that the documentation showed to users, before and after; all of this is kept for one
# release.
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
    "hetero_fl.mutual": "hetero_fl.core.objectives",
    "hetero_fl.mutual.Mutual": "hetero_fl.core.objectives.MutualDistillation",
    "hetero_fl.objectives": "hetero_fl.core.objectives",
    "hetero_fl.objectives.ClassDigest": "hetero_fl.core.objectives.ClassTeacherDistillation",
    "hetero_fl.objectives.Digest": "hetero_fl.core.objectives.TeacherDistillation",
    "hetero_fl.payload": "hetero_fl.core.payload",
    "hetero_fl.plan": "hetero_fl.core.plan",
    "hetero_fl.saved": "hetero_fl.core.saved_model",
    "hetero_fl.state": "hetero_fl.core.participant",
    "hetero_fl.state.own": "hetero_fl.core.participant.copy_tensors",
}

# Hooks, attributes and arguments that the documentation showed to authors of methods, by class.
RENAMED_MEMBERS = {
    "Algorithm": {
        "architecture": "model_spec",
        "called": "display_name",
        "counted": "counts_traffic",
        "dearest": "with_worst_case_size",
        "discount": "staleness_config",
        "distils": "is_distillation",
        "everybody": "needs_all_clients",
        "extras": "extra_models",
        "family": "aggregation_group",
        "gives": "may_share",
        "goal": "buffer_size",
        "one_by_one": "has_models_per_client",
        "part": "shared_part",
        "personalise": "personalize",
        "phase": "upload_phase",
        "portion": "shareable_tensors",
        "private": "kept_state",
        "reads": "evaluated_when",
        "reads_counts": "reads_label_counts",
        "resolve": "configure",
        "sends": "upload_part",
        "server_slot": "server_model_slot",
        "sharing": "uploads_in_round",
        "start": "setup",
        "stays": "local_tensor_names",
        "takes": "download_part",
        "used": "inference_model",
        "with_prior": "add_log_prior",
    },
    "Attack": {
        "rows_of": "poison_rows",
        "said": "poison_predictions",
        "triggered": "triggered_rows",
        "updates": "poison_updates",
    },
    "AttackContext": {"draws": "generator", "liars": "malicious", "round": "round_idx"},
    "ClassSums": {"made": "origin"},
    "ClientDirectory": {"kind": "profile", "kinds": "profiles", "named": "format_clients"},
    "ClientInfo": {"id": "client_id", "n": "num_rows", "reading": "is_evaluation"},
    "FederatedData": {
        "beside": "extra_columns",
        "private": "client_rows",
        "public": "public_sets",
    },
    "FederatedTrainer": {"round": "run_round", "saved": "on_checkpoint"},
    "Fit": {"beside": "extra_batches", "given": "context", "made": "origin"},
    "MenteeTraining": {
        "both": "joint_fit",
        "mean": "mentee_mean",
        "small": "mentee_model",
        "together": "fit_both",
    },
    "ModelSpec": {"id": "spec_id", "initial": "initial_tensors", "width": "feature_width"},
    "Objective": {"private": "private_loss", "public": "public_loss", "total": "total_loss"},
    "Participant": {
        "clock": "round_context",
        "id": "participant_id",
        "n": "num_rows",
        "work": "step_share",
    },
    "PartitionContext": {"draws": "rng"},
    "Predict": {"made": "origin"},
    "PredictionAttack": {"lie": "poison_logits"},
    "PredictionRule": {"least": "min_clients"},
    "PreparedRun": {"rounds": "make_trainer"},
    "ProxyDistillation": {
        "distil": "distill_into_groups",
        "opinion": "proxy_predictions",
        "released": "released_label_counts",
    },
    "ProxyTraining": {
        "at_server": "server_fit",
        "drawn": "proxy_indices",
        "rehearsal": "proxy_replay",
        "remember": "store_teacher",
        "remembered": "teacher_for",
        "taught": "teacher_rows",
    },
    "RoundContext": {"again": "attempt", "round": "round_idx", "rounds": "num_rounds"},
    "Rows": {"beside": "extra_columns", "through": "preprocess"},
    "Rule": {"least": "min_clients"},
    "TensorRows": {"table": "tensors"},
    "Upload": {"worth": "staleness_weight"},
    "Uploads": {"heard_of": "is_available", "worths": "staleness_weights"},
}


def describe_new_name(error: Exception) -> str:
    """Return a hint that names the new one of what a user's file did not find.

    Args:
        error: What the import or a call of the user's code raised for an import, an attribute or
            an argument that does not exist.

    Returns:
        Text to append to the error's message; empty if nothing of that name has changed.

    Example:
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
        kind = owner if isinstance(owner, type) else type(owner)
        return _describe_member([base.__name__ for base in kind.__mro__], error.name)
    # `replace(rows, beside=…)` and `self.fit(client, given=…)` end in the constructor, too
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if isinstance(error, TypeError) and match:
        return _describe_member([match[1]], match[2])
    # a class variable of the previous release is to pydantic a field without a type
    match = re.match(r"A non-annotated attribute was detected: `(\w+) =", str(error))
    return _describe_member(["Algorithm"], match[1]) if match else ""


def describe_renamed_hooks(kind: type) -> str:
    """Return which methods and class variables of a user's class have another name now.

    Args:
        kind: The user's class.

    Returns:
        Comma-separated text; empty if the class defines no old name.
    """
    bases = [base.__name__ for base in kind.__mro__ if _is_own(base)]
    renamed = {old: new for base in bases for old, new in RENAMED_MEMBERS.get(base, {}).items()}
    found = {
        name: f"{base.__name__}.{name} is now {renamed[name]}"
        for base in reversed(kind.__mro__)
        if not _is_own(base)
        for name in vars(base)
        if name in renamed
    }
    return ", ".join(found.values())


def _is_own(kind: type) -> bool:
    return kind.__module__.startswith("hetero_fl.")


def _describe_import(module: str, name: str) -> str:
    missing = f"{module}.{name}" if name else module
    found = {old: new for old, new in MOVED_NAMES.items() if f"{old}.".startswith(f"{missing}.")}
    if not found and module in MOVED_NAMES:  # a folder that an older checkout left behind
        found = {module: MOVED_NAMES[module]}
    if not found and name:  # the module had moved before the name changed
        found = {
            f"{module}.{name}": new
            for old, new in MOVED_NAMES.items()
            if old.endswith(f".{name}") and new.startswith(f"{module}.")
        }
    return "".join(f"; {old} is now {new}" for old, new in found.items())


def _describe_member(kinds: list[str], name: str) -> str:
    for kind in kinds:
        if name in RENAMED_MEMBERS.get(kind, {}):
            return f"; {kind}.{name} is now {kind}.{RENAMED_MEMBERS[kind][name]}"
    return ""
