"""Notes for the log on settings that are valid but may not be intended, as compatibility rules."""

from __future__ import annotations

from collections.abc import Iterable

from hetero_fl.experiment.compatibility.rule import CompatibilityRule
from hetero_fl.experiment.compatibility.run_facts import RunFacts
from hetero_fl.federation.channel import idle_stages
from hetero_fl.utils.text import Caution

NOTES: tuple[CompatibilityRule[RunFacts], ...] = (
    CompatibilityRule(
        ("channel", "algorithm.name"),
        lambda run: idle_stages(run.name, run.algorithm, run.federation),
        "{found}",
    ),
    # Secure aggregation
    CompatibilityRule(
        ("channel.secure_sum.range", "clients.per_round"),
        lambda run: run.secure_sum and run.coarse_rounding(run.secure_sum),
        "channel.secure_sum rounds the weighted values of clients to multiples of {step:.1g}; "
        "change channel.secure_sum.{key} for more binary digits",
        Caution,
    ),
    CompatibilityRule(
        ("channel.secure_sum.threshold", "clients.per_round"),
        lambda run: (
            run.secure_sum
            and run.secure_sum.threshold is not None
            and (2 * run.secure_sum.min_survivors(run.cohort) - run.cohort - 1 or "none")
        ),
        "channel.secure_sum.threshold: the server learns single uploads if more than {found} of "
        "the {run.cohort} clients collude with it",
    ),
    CompatibilityRule(
        ("channel.compress", "channel.secure_sum"),
        lambda run: run.secure_sum is not None and bool(run.config.channel.compress),
        "channel.compress rounds the values that clients upload; with channel.secure_sum it does "
        "not make messages smaller",
    ),
    CompatibilityRule(
        ("channel.secure_sum", "model"),
        lambda run: run.secure_sum and run.clients_alone_in_sum(),
        "channel.secure_sum does not hide some items of {found}: no other client uploads these "
        "tensors, so their sum equals the client's upload",
        Caution,
    ),
    # Differential privacy
    CompatibilityRule(
        ("privacy.unit", "model"),
        lambda run: run.unit in ("client", "local") and run.unshared_tensor(),
        "privacy.unit={run.unit}: '{name}' of {model}, and whatever else training changes without "
        "noise, stays at the clients, so the server has no model to deploy",
    ),
    # Homomorphic encryption
    CompatibilityRule(
        ("channel.homomorphic", "data set"),
        lambda run: run.homomorphic is not None,
        "channel.homomorphic: the server cannot read its models, so their scores are missing; "
        "clients evaluate the models that they decrypt",
    ),
    CompatibilityRule(
        ("channel.homomorphic.range", "clients.per_round"),
        lambda run: run.homomorphic and run.coarse_rounding(run.homomorphic),
        "channel.homomorphic rounds the weighted values of clients to multiples of {step:.1g}; "
        "change channel.homomorphic.{key} for more binary digits",
        Caution,
    ),
    # Methods
    CompatibilityRule(
        ("algorithm.initial_phase", "data.proxy.labels"),
        lambda run: run.algorithm.needs.proxy_set == "labeled",
        "{run.name} trains on the labels of the proxy set before a client's first round "
        "(algorithm.initial_phase)",
    ),
    CompatibilityRule(
        ("algorithm.name", "model"),
        lambda run: run.architectures_alone(),
        "{run.name} averages clients with the same architecture: {groups} {verb} only one client",
    ),
    CompatibilityRule(
        ("clients", "model"),
        lambda run: run.similar_modules(),
        "{run.name} does not average the modules of '{one}' and '{other}': they have the same "
        "class and tensors, but differ in {names}; create them with equal values to average them",
        Caution,
    ),
    CompatibilityRule(
        ("algorithm.teacher", "data set"),
        lambda run: run.idle_teacher_settings(),
        "{found}, because the data set has a {run.task.kind} task",
    ),
    CompatibilityRule(
        ("recalibrate", "data.proxy.size"),
        lambda run: run.idle_recalibration(),
        "{found} has no effect without a proxy set (data.proxy.size is 0)",
    ),
    # Robust aggregation and attacks
    CompatibilityRule(
        ("aggregation.rule", "algorithm.name"),
        lambda run: run.rules and run.unprotected_items(),
        "aggregation.{key}=mean: {items} of malicious clients are averaged without protection",
        Caution,
    ),
    CompatibilityRule(
        ("aggregation.rule", "algorithm.name"),
        lambda run: run.rules and sorted({n for n, how in run.dry_round[1] if how == "counts"}),
        "{found} are summed without protection from malicious clients",
        Caution,
    ),
    CompatibilityRule(
        ("attacks.name", "clients"),
        lambda run: run.named_malicious(),
        "{count:,} of {run.num_clients:,} clients are malicious ({run.config.attacks.name}, from "
        "round {run.config.attacks.from_round}): {ids}; scores are means over the other clients",
    ),
    # Asynchronous runs
    CompatibilityRule(
        ("runtime.mode", "algorithm.name"),
        lambda run: run.is_async and run.config.runtime.mode == "sync",
        "runtime.mode=async: {run.name} aggregates uploads as they arrive",
    ),
    CompatibilityRule(
        ("runtime.staleness", "runtime.mode"),
        lambda run: run.is_async and run.staleness.unused_keys,
        "{run.staleness_key}.{found} is ignored because the staleness kind is {run.staleness.kind}",
    ),
    CompatibilityRule(
        ("runtime.staleness", "runtime.buffer"),
        lambda run: (
            run.is_async
            and run.buffer_size == 1
            and run.policy.staleness is None
            and run.staleness.kind != "constant"
        ),
        "runtime.staleness has no effect with runtime.buffer=1: the weighted mean of one upload is "
        "that upload; consider algorithm.name=fedasync, whose server steps shrink with staleness",
    ),
    CompatibilityRule(
        ("devices", "runtime.mode"),
        lambda run: (
            run.is_async and run.config.devices is None and not run.federation.data.is_distributed
        ),
        "devices: not set, so tasks take no time and tasks that start together end together",
    ),
)
"""Notes for the log on combinations of settings that are valid but may not be intended."""

LATER_NOTES: tuple[CompatibilityRule[RunFacts], ...] = (
    CompatibilityRule(
        ("privacy.delta", "clients"),
        lambda run: run.weakly_protected(),
        "privacy.delta: {run.privacy.delta:g} allows a mechanism that reveals one of {found}; "
        "choose less than one over their number",
        Caution,
    ),
    CompatibilityRule(
        ("server.model", "data.proxy.size"),
        lambda run: run.config.server.model and run.federation.student is None,
        "server.model is ignored: a server model is distilled from a consensus on a proxy set, "
        "which this run does not have",
    ),
    CompatibilityRule(
        ("evaluation.clients", "clients"),
        lambda run: run.num_evaluated(),
        "evaluation.clients: every evaluation uses the same {found:,} of {run.num_clients:,} "
        "clients",
    ),
)
"""Notes that follow the privacy budget in the log."""


def compatibility_notes(notes: Iterable[CompatibilityRule[RunFacts]], run: RunFacts) -> list[str]:
    """Return the lines of all notes that apply to a run."""
    return [line for note in notes for line in note.lines(run)]
