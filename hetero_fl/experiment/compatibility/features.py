"""Features that exclude each other.

A feature is a setting with what it needs from a run, and what it denies to the other settings of
the run. Two features exclude each other if one denies what the other needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from hetero_fl.algorithms.base import broadcasts_means
from hetero_fl.config.base import StalenessConfig
from hetero_fl.experiment.compatibility.facts import Facts
from hetero_fl.robustness.rules import prediction_rule
from hetero_fl.utils.errors import UserError

Stage: TypeAlias = Literal["config", "run", "uploads"]


@dataclass(frozen=True)
class Feature:
    """A setting that needs or denies something that other settings deny or need.

    Args:
        key: The configuration key.
        value: Function that returns the value of the setting, True if only the key is shown, or a
            false value if the feature is off. If None, the feature is on if the key does not have
            its default value.
        needs: What the feature needs from the run.
        denies: Properties that no other feature may have at the same time.
        stage: "config" if the configuration determines the value, or "run" if the data, the models
            or the uploads do.
        advice: How to change the settings.
    """

    key: str
    value: Callable[[Any], object] | None = None
    needs: tuple[str, ...] = ()
    denies: tuple[str, ...] = ()
    stage: Stage = "config"
    advice: str = ""

    def setting(self, run: Facts) -> str:
        """Return the setting as `key=value`, or "" if the feature is off."""
        value = run.changed_value(self.key) if self.value is None else self.value(run)
        if not value:
            return ""
        return self.key if value is True else f"{self.key}={value}"


FEATURES = (
    # Rounds
    Feature(
        "runtime.mode", lambda run: run.is_async and "async", denies=("the uploads of one cohort",)
    ),
    Feature(
        "runtime.mode",
        lambda run: not run.is_async and "sync",
        denies=("asynchronous training",),
        advice="set runtime.mode=async",
    ),
    Feature(
        "runtime.buffer", needs=("asynchronous training", "a method without a buffer of its own")
    ),
    Feature(
        "runtime.staleness",
        lambda run: run.config.runtime.staleness != StalenessConfig(),
        needs=("asynchronous training", "a method without staleness settings of its own"),
    ),
    Feature(
        "algorithm.name",
        lambda run: run.policy.buffer_size and run.name,
        denies=("a method without a buffer of its own",),
        advice="set algorithm.buffer, if the method has it",
    ),
    Feature(
        "algorithm.name",
        lambda run: run.policy.staleness is not None and run.name,
        denies=("a method without staleness settings of its own",),
        advice="set algorithm.staleness",
    ),
    Feature(
        "cohort.sampling",
        needs=("the uploads of one cohort",),
        denies=("cohorts that are known in advance",),
    ),
    Feature(
        "cohort.over_selection",
        needs=(
            "the uploads of one cohort",
            "a sample of the clients in each round",
            "tasks that take time",
        ),
        denies=("cohorts that are known in advance",),
    ),
    Feature("cohort.deadline", needs=("the uploads of one cohort",)),
    Feature("cohort.least", needs=("the uploads of one cohort",)),
    Feature("cohort.too_few", needs=("the uploads of one cohort",)),
    Feature("clients.per_round", denies=("all clients in each round",)),
    Feature(
        "clients.per_round",
        lambda run: run.config.clients.per_round is None and "null",
        denies=("a sample of the clients in each round",),
        advice="set clients.per_round",
    ),
    Feature(
        "devices",
        lambda run: not run.takes_time() and "null",
        denies=("tasks that take time",),
        stage="run",
        advice="set devices",
    ),
    Feature(
        "share_every",
        lambda run: run.of_client(lambda own: own.share_every > 1 and own.share_every),
        needs=("the uploads of one cohort", "all clients in each round"),
        denies=("updates of the last broadcast",),
    ),
    # Methods
    Feature(
        "algorithm.name",
        lambda run: (run.algorithm.needs.all_clients or run.single_items()) and run.name,
        needs=("the uploads of one cohort",),
        stage="run",
    ),
    Feature(
        "algorithm.name",
        lambda run: not broadcasts_means(run.algorithm) and run.name,
        needs=("a server that reads the sums of uploads",),
        stage="run",
        advice="choose fedavg with server_lr=1 and without weighting=sum, fedmd with align=0, fd "
        "or fedproto, or remove channel.homomorphic",
    ),
    Feature(
        "algorithm.name",
        lambda run: run.single_items() and run.name,
        needs=("single uploads",),
        stage="run",
        advice="choose hybrid, fedmd, fedavg or fedproto, or remove one of them",
    ),
    Feature(
        "algorithm.name",
        lambda run: run.sends_nothing and run.name,
        denies=("uploads to aggregate",),
        stage="run",
        advice="choose another method",
    ),
    Feature(
        "algorithm.name",
        lambda run: any(spec.ranks for spec in run.uploadable.values()) and run.name,
        denies=("uploads of fixed shapes",),
        stage="run",
        advice="choose another method",
    ),
    Feature(
        "algorithm.name",
        lambda run: run.publishes_rows and run.name,
        needs=("values that depend on private rows without noise",),
        stage="run",
    ),
    Feature(
        "algorithm.name",
        lambda run: not run.predicts_classes and run.name,
        denies=("uploaded class predictions of a multiclass task",),
        stage="run",
        advice="choose another method",
    ),
    Feature(
        "algorithm.name",
        lambda run: run.algorithm.needs.has_required_proxy and run.name,
        needs=("a proxy set",),
        stage="run",
    ),
    Feature(
        "algorithm.initial_phase",
        lambda run: run.algorithm.needs.proxy_set == "labeled" and "true",
        needs=("labels of the proxy set",),
        stage="run",
    ),
    Feature(
        "algorithm.initial_phase",
        lambda run: getattr(run.algorithm, "initial_phase", False) and "true",
        needs=("training that is not part of the privacy budget",),
        stage="run",
    ),
    Feature(
        "algorithm.proxy_rows",
        lambda run: run.drawn_proxy_rows(),
        needs=("the uploads of one cohort",),
        stage="run",
        advice="remove it, or lower data.proxy.size",
    ),
    # Data and task
    Feature(
        "data.proxy.size",
        lambda run: not run.num_proxy and "0",
        denies=("a proxy set",),
        stage="run",
        advice="set data.proxy.size > 0 to make training rows public, or data.proxy.source",
    ),
    Feature(
        "data.proxy.labels",
        lambda run: not run.federation.data.has_proxy_labels and "false",
        denies=("labels of the proxy set",),
        stage="run",
        advice="set it to true, or set algorithm.initial_public_epochs=0",
    ),
    Feature("data.proxy.labels", needs=("a proxy set",), stage="run"),
    Feature("data.proxy.columns", needs=("a proxy set",), stage="run"),
    Feature(
        "data.validation",
        lambda run: not run.has_validation and "0",
        denies=("validation rows",),
        stage="run",
        advice="set data.validation or data.split.validation > 0 (Federation, Client: pass "
        "validation=...), or remove patience",
    ),
    Feature("evaluation.patience", needs=("validation rows",), stage="run"),
    Feature(
        "data.task",
        lambda run: run.task.kind != "multiclass" and run.task.kind,
        denies=("a multiclass task",),
        stage="run",
    ),
    Feature(
        "data.task",
        lambda run: run.task.kind == "regression" and run.task.kind,
        denies=("a classification task",),
        stage="run",
    ),
    Feature(
        "data without images",
        lambda run: any(len(profile.arch.input_shape) != 3 for profile in run.profiles),
        denies=("images of all clients",),
        stage="run",
    ),
    Feature(
        "class_weights",
        lambda run: run.of_client(lambda own: own.class_weights),
        needs=("a multiclass task",),
        stage="run",
    ),
    # Robustness
    Feature(
        "aggregation.rule",
        needs=("single uploads", "the uploads of one cohort", "uploads to aggregate"),
    ),
    Feature(
        "aggregation.predictions",
        needs=("single uploads", "the uploads of one cohort", "uploads to aggregate"),
    ),
    Feature(
        "aggregation.statistics",
        needs=("single uploads", "the uploads of one cohort", "uploads to aggregate"),
    ),
    Feature(
        "aggregation.predictions",
        lambda run: (
            "predictions" in run.rules
            and prediction_rule[run.rules["predictions"]].exclusive
            and run.rules["predictions"]
        ),
        needs=("a multiclass task",),
        stage="run",
    ),
    Feature(
        "attacks.name",
        lambda run: run.config.attacks and run.config.attacks.name,
        needs=("single uploads", "the uploads of one cohort", "uploads to aggregate"),
    ),
    Feature(
        "attacks.name",
        lambda run: "updates" in run.acts_on and run.config.attacks.name,
        needs=("uploads of fixed shapes",),
        stage="run",
    ),
    Feature(
        "attacks.name",
        lambda run: "data" in run.acts_on and run.config.attacks.name,
        needs=("a classification task",),
        stage="run",
    ),
    Feature(
        "attacks.name",
        lambda run: run.has_trigger and run.config.attacks.name,
        needs=("a multiclass task", "images of all clients"),
        stage="run",
    ),
    # Channel
    Feature(
        "channel.secure_sum",
        lambda run: run.config.channel.secure_sum is not None,
        needs=("the uploads of one cohort", "cohorts of a fixed size"),
        denies=("single uploads",),
    ),
    Feature(
        "channel.secure_sum",
        lambda run: run.secure_sum is not None,
        needs=("complete vectors",),
        advice="choose quantize or half, or remove one of them",
    ),
    Feature(
        "channel.secure_sum",
        lambda run: run.config.channel.secure_sum is None and "null",
        denies=("a secure sum",),
        advice="set channel.secure_sum={}",
    ),
    Feature(
        "channel.homomorphic",
        lambda run: run.config.channel.homomorphic is not None,
        needs=("the uploads of one cohort",),
        denies=("single uploads", "sums to which the server adds noise"),
    ),
    Feature(
        "channel.homomorphic",
        lambda run: run.homomorphic is not None,
        needs=("uploads that are not compressed", "broadcasts that are not compressed"),
        denies=("a server that reads the sums of uploads",),
        stage="run",
    ),
    Feature(
        "channel.compress",
        lambda run: run.compressing_stage("compress", ("quantize", "half")),
        denies=("complete vectors",),
    ),
    Feature(
        "channel.compress",
        lambda run: run.compressing_stage("compress"),
        denies=("uploads that are not compressed",),
    ),
    Feature(
        "channel.compress_down",
        lambda run: run.compressing_stage("compress_down"),
        denies=("broadcasts that are not compressed",),
    ),
    Feature(
        "server.model",
        lambda run: run.federation.student is not None,
        needs=("a server that reads the sums of uploads",),
        stage="run",
    ),
    # Privacy
    Feature(
        "privacy.unit",
        lambda run: run.unit,
        needs=("the uploads of one cohort", "cohorts that are known in advance"),
        denies=("values that depend on private rows without noise",),
    ),
    Feature(
        "privacy.unit",
        lambda run: run.unit == "record" and run.unit,
        denies=("training that is not part of the privacy budget",),
        advice="set it to false or 0, or set privacy.unit=client or local",
    ),
    Feature(
        "privacy.unit",
        lambda run: run.unit == "client" and run.unit,
        needs=("uploads that are not compressed", "sums to which the server adds noise"),
        denies=("single uploads",),
        advice="set privacy.unit=record or local",
    ),
    Feature(
        "privacy.unit",
        lambda run: run.is_bounded and run.unit,
        needs=("uploads of fixed shapes", "updates of the last broadcast"),
    ),
    Feature(
        "algorithm.name",
        lambda run: run.is_bounded and run.item_without_start() and run.name,
        denies=("updates of the last broadcast",),
        stage="run",
        advice="choose another method",
    ),
    Feature("privacy.distributed", needs=("a secure sum",)),
    Feature("privacy.poisson_cohorts", denies=("cohorts of a fixed size",)),
    Feature(
        "privacy.votes", needs=("uploaded class predictions of a multiclass task",), stage="run"
    ),
    Feature(
        "init_from",
        lambda run: run.given_start,
        needs=("values that depend on private rows without noise",),
        advice="remove one of them",
    ),
    Feature(
        "preprocess.normalize",
        lambda run: run.of_client(lambda own: own.preprocess.normalize == "own" and "own"),
        needs=("values that depend on private rows without noise",),
        stage="run",
        advice="set fixed numbers",
    ),
    Feature(
        "fine_tune_epochs",
        lambda run: run.of_client(lambda own: own.fine_tune_epochs),
        needs=("training that is not part of the privacy budget",),
        stage="run",
    ),
    Feature(
        "algorithm.name",
        lambda run: run.unit == "record" and run.trains_before_evaluation() and run.name,
        needs=("training that is not part of the privacy budget",),
        stage="run",
    ),
)
"""All features, in the order in which they are checked."""


def check_features(run: Facts, stage: Stage) -> None:
    """Check all features that are known at a stage.

    Raises:
        UserError: If two features exclude each other.
    """
    known = [feature for feature in FEATURES if stage in (feature.stage, "run")]
    for one in known:
        for other in known:
            for need in one.needs:
                if need in other.denies and one.setting(run) and other.setting(run):
                    advice = one.advice or other.advice or "remove one of them"
                    raise UserError(
                        f"{one.setting(run)} cannot be combined with {other.setting(run)}, because "
                        f"it needs {need}; {advice}"
                    )
