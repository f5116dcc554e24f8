"""Rules on the values of settings, and notes on settings that may not be intended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hetero_fl.aggregation.robust_means import PARAMETERS
from hetero_fl.experiment.compatibility.facts import Facts, first
from hetero_fl.experiment.compatibility.features import Stage, check_features
from hetero_fl.experiment.compatibility.run_facts import RunFacts
from hetero_fl.federation.channel import idle_stages
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.text import Caution, format_list, pluralize

MIN_CLIENTS_IN_SUM = 3
"""Smallest cohort for secure aggregation.

If two clients are summed, each can compute the upload of the other.
"""
MAX_CLIENTS_IN_SUM = 200
"""Largest cohort for secure aggregation, in which each client shares masks with all others."""
MAX_IN_ONE_PLACE = 10_000
"""Largest number of clients for methods that collect all rows or models in one place."""
PRECISION_OF_MEANS = 1e-6
"""Absolute error above which the rounding of sums is noted."""


@dataclass(frozen=True)
class Rule:
    """A rule on the values of settings, or a note on settings that may not be intended.

    Args:
        keys: The two configuration keys that the rule concerns.
        found: Function that returns a false value if a run satisfies the rule, and otherwise what
            violates the rule, or a list of violations.
        message: Format string of the message. The field `{run}` is the argument of `found`. If a
            violation is a mapping, its keys are additional fields. Any other violation is the field
            `{found}`.
        stage: When the rule is checked, see `Feature`.
        line_type: Type of the lines: `Caution` if results, or the protection of clients, may not be
            what the configuration suggests.
    """

    keys: tuple[str, str]
    found: Callable[[Any], Any]
    message: str
    stage: Stage = "run"
    line_type: type[str] = str

    def lines(self, run: Facts) -> Iterator[str]:
        """Yield one message for each violation."""
        found = self.found(run) or []
        for violation in found if isinstance(found, list) else [found]:
            values = violation if isinstance(violation, Mapping) else {"found": violation}
            yield self.line_type(self.message.format(run=run, **values))


MEANS_ADVICE = (
    "choose fedavg with server_lr=1 and without weighting=sum, fedmd with align=0, fd or fedproto"
)

RULES = (
    # Settings without effect
    Rule(
        ("clients.per_round", "clients"),
        lambda run: (run.config.clients.per_round or 0) > len(run.clients) and len(run.clients),
        "clients.per_round: must be <= {found}, the number of clients, got "
        "{run.config.clients.per_round}",
        stage="config",
    ),
    Rule(
        ("cohort.least", "clients.per_round"),
        lambda run: run.config.cohort.least > run.concurrency and run.concurrency,
        "cohort.least: must be <= {found}, the clients in a round (clients.per_round), got "
        "{run.config.cohort.least}",
        stage="config",
    ),
    Rule(
        ("cohort.over_selection", "channel.secure_sum"),
        lambda run: run.unreachable_threshold(),
        "cohort.over_selection={run.config.cohort.over_selection:g} is too large: only the first "
        "{run.config.clients.per_round} of {sampled} sampled clients are used, but "
        "channel.secure_sum.threshold requires {survivors}; choose a smaller over_selection or "
        "threshold",
        stage="config",
    ),
    Rule(
        ("data.partition", "clients"),
        lambda run: run.has_unused_partition(),
        "data.partition: has no effect, because all clients have data of their own; remove it",
        stage="config",
    ),
    Rule(
        ("clients", "size"),
        lambda run: run.unused_size(),
        "clients: '{found}': size: has no effect, because the client has data of its own; remove "
        "it",
        stage="config",
    ),
    Rule(
        ("data.partition", "data.partition.kind"),
        lambda run: run.unused_partition_setting(),
        "data.partition.{found}: has no effect with kind={run.config.data.partition.kind}; remove "
        "it, or set another kind",
        stage="config",
    ),
    Rule(
        ("clients", "algorithm.name"),
        lambda run: run.unused_option(),
        "{found}: not used by algorithm.name={run.name}; remove it",
        stage="config",
    ),
    # Methods
    Rule(
        ("algorithm.name", "data set"),
        lambda run: (
            run.task.kind not in run.algorithm.needs.tasks and ", ".join(run.algorithm.needs.tasks)
        ),
        "algorithm.name={run.name} supports {found} tasks, but the data set has a "
        "{run.task.kind} task",
    ),
    Rule(
        ("algorithm.name", "shares"),
        lambda run: run.missing_shares(),
        "algorithm.name={run.name} requires clients that share {found}; add it to "
        "shares of some or all clients",
    ),
    Rule(
        ("algorithm.name", "clients"),
        lambda run: run.algorithm.needs.all_clients and run.num_clients > MAX_IN_ONE_PLACE,
        f"algorithm.name={{run.name}} needs the rows or models of all clients in one place, "
        f"which supports at most {MAX_IN_ONE_PLACE:,} clients, got {{run.num_clients:,}}",
    ),
    Rule(
        ("clients", "model"),
        lambda run: run.unknown_prefix(),
        "{key}: no model has a tensor with prefix '{prefix}'{hint}",
    ),
    Rule(
        ("algorithm.name", "model"),
        lambda run: sum(profile.count for profile in run.clients_alone) == run.num_clients,
        "algorithm.name={run.name} averages parameters, but no two clients upload the same tensor; "
        "give clients the same model, let their shares overlap, or set clients.common",
        stage="uploads",
    ),
    # Training
    Rule(
        ("class_weights", "class"),
        lambda run: run.invalid_class_weights(),
        "clients: '{client}': class_weights: expected {run.task.outputs} numbers, one for each "
        "class and not all 0, got {found}",
    ),
    Rule(
        ("class_weights", "clients"),
        lambda run: run.weightless_client(),
        "clients: '{client}': class_weights: {weights} is 0 for every training row of the "
        "client; increase a weight",
    ),
    Rule(
        ("prior", "data set"),
        lambda run: run.task.kind != "multiclass" and run.prior_option(),
        "{found}: requires a multiclass task, but the data set has a {run.task.kind} task",
    ),
    Rule(
        ("prior_correction", "logit_adjustment"),
        lambda run: first(
            profile.first
            for profile in run.profiles
            if profile.settings.prior_correction and profile.settings.logit_adjustment
        ),
        "clients: '{found}': prior_correction cannot be combined with logit_adjustment, after "
        "which predictions contain no prior; set one of them to false",
    ),
    Rule(
        ("prior_correction", "shares"),
        lambda run: run.uncorrectable_client(),
        "clients: '{found}': prior_correction requires statistics in shares, because the server of "
        "algorithm.name={run.name} predicts with the client's model",
    ),
    Rule(
        ("algorithm.align", "logit_adjustment"),
        lambda run: run.differently_adjusted(),
        "algorithm.align: requires the same logit_adjustment or prior_correction of all clients, "
        "but predictions of {without} do not include its class prior, those of {other} do; set "
        "algorithm.align=0, or the same value for all clients",
    ),
    Rule(
        ("batch_size", "model"),
        lambda run: run.batch_of_one(),
        "{key}, but {model} has BatchNorm, which cannot train on batches of one row; choose 2 "
        "or more, or a model without BatchNorm",
    ),
    # Sums
    Rule(
        ("channel.secure_sum", "clients.per_round"),
        lambda run: (
            run.secure_sum and run.cohort < MIN_CLIENTS_IN_SUM and pluralize(run.cohort, "client")
        ),
        f"channel.secure_sum: requires {MIN_CLIENTS_IN_SUM} or more clients in a round "
        f"(clients.per_round), got {{found}}",
    ),
    Rule(
        ("channel.secure_sum", "clients.per_round"),
        lambda run: run.secure_sum and run.cohort > MAX_CLIENTS_IN_SUM and f"{run.cohort:,}",
        f"channel.secure_sum: at most {MAX_CLIENTS_IN_SUM} clients in a round "
        f"(clients.per_round), got {{found}}, because each client shares masks with all others; "
        f"set clients.per_round={MAX_CLIENTS_IN_SUM}, or use channel.homomorphic",
    ),
    Rule(
        ("channel.secure_sum.threshold", "clients.per_round"),
        lambda run: run.invalid_threshold(),
        "channel.secure_sum.threshold: must be <= {run.cohort}, the clients in a round "
        "(clients.per_round), and more than half of them, got {found}; choose {least} or more",
    ),
    Rule(
        ("range", "clients.per_round"),
        lambda run: run.summed and run.summed["most"] < 1 and run.summed,
        "channel.{key}.range: {range:g} is too large; sums over {run.cohort} clients "
        "(clients.per_round) exceed {limit}",
    ),
    Rule(
        ("fraction_bits", "range"),
        lambda run: run.summed and run.summed["bits"] > run.summed["most"] and run.summed,
        "channel.{key}.fraction_bits: must be <= {most}, got {bits}; with "
        "channel.{key}.range={range:g}, sums over {run.cohort} clients would exceed {limit}",
    ),
    Rule(
        ("clients.defaults.shares", "channel.homomorphic"),
        lambda run: run.homomorphic and run.unequal_shares(),
        "clients.defaults.shares: {found} shares other layers than others of its architecture, "
        "but with channel.homomorphic all of them receive one sum; give them the same shares",
        stage="uploads",
    ),
    # Robust aggregation and attacks
    Rule(
        ("aggregation", "algorithm.name"),
        lambda run: run.idle_rules(),
        "aggregation.{key}={value} has no effect: {run.name} does not aggregate {items} here; "
        "use mean, or choose another algorithm.name",
        stage="uploads",
    ),
    Rule(
        ("aggregation.rule", "algorithm.name"),
        lambda run: (
            "rule" in run.rules
            and first(name for name, how in run.aggregated_items if how in PARAMETERS)
        ),
        "aggregation.rule={run.config.aggregation.rule} cannot be combined with "
        "algorithm.name={run.name}, which averages '{found}' separately from its model",
        stage="uploads",
    ),
    Rule(
        ("aggregation", "aggregation.malicious"),
        lambda run: run.outvoted_rule(),
        "aggregation.{key}={value} tolerates {malicious} "
        "(aggregation.malicious={run.config.aggregation.malicious:g}) "
        "among {least} or more clients, but {senders} upload {item}; {advice}",
        stage="uploads",
    ),
    Rule(
        ("attacks.name", "algorithm.name"),
        lambda run: run.missing_targets(),
        "attacks.name={run.config.attacks.name} changes {found}, which algorithm.name={run.name} "
        "does not upload here",
        stage="uploads",
    ),
    Rule(
        ("attacks.from_round", "rounds"),
        lambda run: (
            run.config.attacks and run.config.attacks.from_round > run.federation.num_rounds
        ),
        "attacks.from_round: must be <= {run.federation.num_rounds}, the last round (rounds), "
        "got {run.config.attacks.from_round}",
    ),
    Rule(
        ("attacks.trigger", "images"),
        lambda run: run.small_image(),
        "attacks.trigger: must be <= {found}, the side length of the images in pixels, got "
        "{run.config.attacks.trigger}",
    ),
    Rule(
        ("attacks", "classes"),
        lambda run: run.unknown_classes(),
        "attacks.{key}: class must be < {run.task.outputs}, the number of classes, got {value}",
    ),
    # Asynchronous runs
    Rule(
        ("devices", "runtime.mode"),
        lambda run: run.is_async and run.instant_client(),
        "{key}: tasks of {client} take no time, so that with runtime.mode=async it would run "
        "before all other clients; set speed, up or down for all clients (devices, machine)",
    ),
    Rule(
        ("buffer", "rounds"),
        lambda run: (
            run.is_async
            and run.buffer_size > run.num_uploads
            and ("algorithm.buffer" if run.policy.buffer_size else "runtime.buffer")
        ),
        "{found}: must be <= {run.num_uploads}, the uploads of {run.config.rounds} rounds of "
        "{run.concurrency} clients, got {run.buffer_size}",
    ),
    # Privacy
    Rule(
        ("model", "privacy.unit"),
        lambda run: run.unit == "record" and run.mixing_model(),
        "{key}={model} cannot be combined with privacy.unit={run.unit}: {reason}; choose {other}",
    ),
    Rule(
        ("privacy.clip", "algorithm.name"),
        lambda run: run.is_bounded and run.unknown_clip(),
        "privacy.clip: algorithm.name={run.name} does not upload '{item}'{hint}",
    ),
)

NOTES = (
    Rule(
        ("channel", "algorithm.name"),
        lambda run: idle_stages(run.name, run.algorithm, run.federation),
        "{found}",
    ),
    # Sums
    Rule(
        ("range", "clients.per_round"),
        lambda run: run.summed and run.summed["step"] > PRECISION_OF_MEANS and run.summed,
        "channel.{key} rounds the weighted values of clients to multiples of {step:.1g}; "
        "change channel.{key}.{change} for more binary digits",
        line_type=Caution,
    ),
    Rule(
        ("channel.secure_sum.threshold", "clients.per_round"),
        lambda run: (
            run.secure_sum
            and run.secure_sum.threshold is not None
            and (2 * run.secure_sum.min_survivors(run.cohort) - run.cohort - 1 or "none")
        ),
        "channel.secure_sum.threshold: the server learns single uploads if more than {found} of "
        "the {run.cohort} clients collude with it",
    ),
    Rule(
        ("channel.compress", "channel.secure_sum"),
        lambda run: run.secure_sum is not None and bool(run.config.channel.compress),
        "channel.compress rounds the values that clients upload; with channel.secure_sum it does "
        "not make messages smaller",
    ),
    Rule(
        ("channel.secure_sum", "model"),
        lambda run: run.secure_sum and run.clients_alone_in_sum(),
        "channel.secure_sum does not hide some items of {found}: no other client uploads these "
        "tensors, so their sum equals the client's upload",
        line_type=Caution,
    ),
    Rule(
        ("channel.homomorphic", "data set"),
        lambda run: run.homomorphic is not None,
        "channel.homomorphic: the server cannot read its models, so their scores are missing; "
        "clients evaluate the models that they decrypt",
    ),
    # Privacy
    Rule(
        ("privacy.unit", "model"),
        lambda run: run.is_bounded and run.unshared_tensor(),
        "privacy.unit={run.unit}: '{name}' of {model}, and whatever else training changes without "
        "noise, stays at the clients, so the server has no model to deploy",
    ),
    Rule(
        ("privacy.delta", "clients"),
        lambda run: run.weakly_protected(),
        "privacy.delta: {run.config.privacy.delta:g} allows a mechanism that reveals one of "
        "{found}; choose less than one over their number",
        line_type=Caution,
    ),
    # Methods
    Rule(
        ("algorithm.initial_phase", "data.proxy.labels"),
        lambda run: run.algorithm.needs.proxy_set == "labeled",
        "{run.name} trains on the labels of the proxy set before a client's first round "
        "(algorithm.initial_phase)",
    ),
    Rule(
        ("algorithm.name", "model"),
        lambda run: ", ".join(dict.fromkeys(p.arch.spec_id for p in run.clients_alone)),
        "{run.name} averages clients with the same architecture: only one client has each of "
        "{found}",
    ),
    Rule(
        ("clients", "model"),
        lambda run: run.similar_modules(),
        "{run.name} does not average the modules of '{one}' and '{other}': they have the same "
        "class and tensors, but differ in {names}; create them with equal values to average them",
        line_type=Caution,
    ),
    Rule(
        ("algorithm.align", "data set"),
        lambda run: run.distills_other_task and getattr(run.algorithm, "align", 0),
        "algorithm.align has no effect, because the data set has a {run.task.kind} task",
    ),
    Rule(
        ("algorithm.sharpen", "data set"),
        lambda run: (
            run.distills_other_task
            and run.task.kind == "regression"
            and getattr(run.algorithm, "sharpen", "none") != "none"
        ),
        "algorithm.sharpen has no effect, because the data set has a {run.task.kind} task",
    ),
    Rule(
        ("algorithm.teacher", "data set"),
        lambda run: run.distills_other_task and getattr(run.algorithm, "teacher", "") == "contrast",
        "algorithm.teacher=contrast weights clients by their number of rows, because the data set "
        "has a {run.task.kind} task",
    ),
    Rule(
        ("recalibrate", "data.proxy.size"),
        lambda run: (
            not run.num_proxy
            and first(key for key, name, _ in run.enabled_options() if name == "recalibrate")
        ),
        "{found} has no effect without a proxy set (data.proxy.size is 0)",
    ),
    Rule(
        ("server.model", "data.proxy.size"),
        lambda run: run.config.server.model and run.federation.student is None,
        "server.model is ignored: a server model is distilled from a consensus on a proxy set, "
        "which this run does not have",
    ),
    Rule(
        ("evaluation.clients", "clients"),
        lambda run: run.num_evaluated(),
        "evaluation.clients: every evaluation uses the same {found:,} of {run.num_clients:,} "
        "clients",
    ),
    # Robust aggregation and attacks
    Rule(
        ("aggregation.rule", "algorithm.name"),
        lambda run: run.rules and run.unprotected_items(),
        "aggregation.{key}=mean: {items} of malicious clients are averaged without protection",
        line_type=Caution,
    ),
    Rule(
        ("aggregation.rule", "algorithm.name"),
        lambda run: run.rules and sorted({n for n, how in run.aggregated_items if how == "counts"}),
        "{found} are summed without protection from malicious clients",
        line_type=Caution,
    ),
    Rule(
        ("attacks.name", "clients"),
        lambda run: run.malicious and format_list(run.malicious.sorted_ids, 6),
        "{run.num_malicious:,} of {run.num_clients:,} clients are malicious "
        "({run.config.attacks.name}, from round {run.config.attacks.from_round}): {found}; scores "
        "are means over the other clients",
    ),
    # Asynchronous runs
    Rule(
        ("runtime.mode", "algorithm.name"),
        lambda run: run.is_async and run.config.runtime.mode == "sync",
        "runtime.mode=async: {run.name} aggregates uploads as they arrive",
    ),
    Rule(
        ("runtime.staleness", "runtime.mode"),
        lambda run: run.is_async and run.staleness.unused_keys,
        "{run.staleness_key}.{found} is ignored because the staleness kind is {run.staleness.kind}",
    ),
    Rule(
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
    Rule(
        ("devices", "runtime.mode"),
        lambda run: (
            run.is_async and run.config.devices is None and not run.federation.data.is_distributed
        ),
        "devices: not set, so tasks take no time and tasks that start together end together",
    ),
)
"""Rules whose lines are notes for the log on settings that are valid but may not be intended."""


def check(run: Facts, stage: Stage) -> None:
    """Check all features and rules that are known at a stage.

    Args:
        run: The facts.
        stage: "config" before data is loaded, "run" before dry runs of the method, or "uploads"
            before training.

    Raises:
        UserError: If two features exclude each other, or a rule is violated.
    """
    if stage != "uploads":
        check_features(run, stage)
    for rule in RULES:
        if rule.stage == stage:
            for line in rule.lines(run):
                raise UserError(line)


def notes(run: RunFacts) -> list[str]:
    """Return the lines of all notes that apply to a run."""
    return [line for note in NOTES for line in note.lines(run)]
