"""Which features work together: one table of rules, each with the two configuration keys that it is about.

A rule is checked as soon as its facts are known: those of `RULES_ON_LOADING` before data is loaded,
those of `RULES_AFTER_PREPARATION` before training starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hetero_fl.algorithms.base import is_user_method
from hetero_fl.algorithms.distillation import InitialPhase
from hetero_fl.config.base import StalenessConfig
from hetero_fl.experiment.facts import ConfigFacts, RunFacts, first
from hetero_fl.federation.dry_run import check_user_method
from hetero_fl.robustness.attacks import Attack
from hetero_fl.robustness.robust_means import PARAMETERS
from hetero_fl.robustness.rules import PredictionRule, Rule, prediction_rule
from hetero_fl.utils.code_permission import OWN
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.registry import import_reference
from hetero_fl.utils.text import pluralize
from model_zoo import ModelError

ROUNDING = ("quantize", "half")
"""Compression stages that change numbers only, so that compressed uploads can be added."""
FEWEST_IN_SUM = 3
"""Clients in a secure sum: in a sum of two, each knows the other's part."""
MOST_IN_ONE_PLACE = 10_000
"""Clients of which a method may need all rows or models in one place."""

BOUNDED = ("client", "local")
"""Units of privacy under which whole uploads are bounded."""

Facts = TypeVar("Facts", bound=ConfigFacts)


@dataclass(frozen=True)
class CompatibilityRule(Generic[Facts]):
    """A combination of settings that cannot work, or that may not be meant.

    Args:
        keys: The two configuration keys, as the message names them.
        violation: Returns something true if a run violates the rule; a list if it does so more
            than once.
        message: The line that the user reads. `{run...}` is filled in from the facts; `{found}`, or
            the names in a mapping, from what `violation` returns.
    """

    keys: tuple[str, str]
    violation: Callable[[Facts], Any]
    message: str

    def lines(self, run: Facts) -> list[str]:
        """Return the message for each violation, usually none or one."""
        found = self.violation(run)
        if not found:
            return []
        lines = []
        for one in found if isinstance(found, list) else [found]:
            values = one if isinstance(one, Mapping) else {"found": one}
            lines.append(self.message.format(run=run, **values))
        return lines


def check_rules(rules: Mapping[str, CompatibilityRule[Facts]], run: Facts) -> None:
    """Raise UserError for the first rule that a run violates."""
    for rule in rules.values():
        for line in rule.lines(run):
            raise UserError(line)


RULES_ON_LOADING: dict[str, CompatibilityRule[ConfigFacts]] = {
    # Cohorts
    "cohort_larger_than_population": CompatibilityRule(
        ("clients.per_round", "clients"),
        lambda run: (run.config.clients.per_round or 0) > len(run.clients) and len(run.clients),
        "clients.per_round: found {run.config.clients.per_round}, but there are {found} clients",
    ),
    "sampled_clients_share_rarely": CompatibilityRule(
        ("clients.per_round", "share_every"),
        lambda run: run.config.clients.per_round is not None and run.rare_sender(),
        "clients.per_round: cannot be combined with share_every ({client}): who is sampled may "
        "not be who shares",
    ),
    # Synchronous and asynchronous runs
    "synchronous_buffer": CompatibilityRule(
        ("runtime.buffer", "runtime.mode"),
        lambda run: not run.is_async and run.config.runtime.buffer,
        "runtime.buffer: found {found}, but a synchronous round takes its whole cohort; write "
        "runtime.mode=async, or leave this out",
    ),
    "synchronous_staleness": CompatibilityRule(
        ("runtime.staleness", "runtime.mode"),
        lambda run: not run.is_async and run.config.runtime.staleness != StalenessConfig(),
        "runtime.staleness: nothing is stale in synchronous rounds; write runtime.mode=async, or "
        "leave this out",
    ),
    "asynchronous_secure_sum": CompatibilityRule(
        ("runtime.mode", "channel.secure_sum"),
        lambda run: run.is_async and run.config.channel.secure_sum,
        "runtime.mode: async cannot be combined with channel.secure_sum, which sums one cohort's "
        "uploads",
    ),
    "asynchronous_robustness": CompatibilityRule(
        ("runtime.mode", "aggregation.rule"),
        lambda run: run.is_async and run.single_uploads(),
        "runtime.mode: async cannot be combined with {found}: both look at the uploads of one "
        "cohort",
    ),
    "asynchronous_clients_share_rarely": CompatibilityRule(
        ("runtime.mode", "share_every"),
        lambda run: run.is_async and run.rare_sender(),
        "runtime.mode: async cannot be combined with share_every ({client}): there are no rounds",
    ),
    "two_staleness_settings": CompatibilityRule(
        ("runtime.staleness", "algorithm.staleness"),
        lambda run: (
            run.policy.staleness is not None and run.config.runtime.staleness != StalenessConfig()
        ),
        "runtime.staleness: is not used: {run.name} has its own, algorithm.staleness",
    ),
    "asynchronous_cohort": CompatibilityRule(
        ("cohort", "runtime.mode"),
        lambda run: run.is_async and run.waiting_setting(),
        "cohort.{found}: is for rounds that wait for a cohort; runtime.mode is async",
    ),
    # Privacy
    "private_asynchronous_run": CompatibilityRule(
        ("runtime.mode", "privacy.unit"),
        lambda run: run.unit and run.is_async,
        "runtime.mode: found async, with privacy.unit: found {run.unit}; what is spent is planned for cohorts, round "
        "by round",
    ),
    "private_run_from_other_models": CompatibilityRule(
        ("init_from", "privacy.unit"),
        lambda run: run.unit and run.config.init_from,
        "init_from: found {found}, with privacy.unit: found {run.unit}; what those models know of private rows is not "
        "counted in ε; leave one of them out",
    ),
    "private_sampling": CompatibilityRule(
        ("cohort.sampling", "privacy.unit"),
        lambda run: run.unit and run.config.cohort.sampling != "uniform",
        "cohort.sampling: found {run.config.cohort.sampling}, with privacy.unit: found {run.unit}; "
        "who takes part has to be known before the run, to be accounted",
    ),
    "private_over_selection": CompatibilityRule(
        ("cohort.over_selection", "privacy.unit"),
        lambda run: run.unit and run.config.cohort.over_selection > 1,
        "cohort.over_selection: found {run.config.cohort.over_selection}, with privacy.unit: found "
        "{run.unit}; who takes part has to be known before the run, to be accounted",
    ),
    "private_repeated_rounds": CompatibilityRule(
        ("cohort.too_few", "privacy.unit"),
        lambda run: run.unit and run.config.cohort.too_few == "repeat",
        "cohort.too_few: found repeat, with privacy.unit: found {run.unit}; who takes part has to "
        "be known before the run, to be accounted",
    ),
    "distributed_noise_in_plain_sum": CompatibilityRule(
        ("privacy.distributed", "channel.secure_sum"),
        lambda run: (
            run.privacy and run.privacy.distributed and run.config.channel.secure_sum is None
        ),
        "privacy.distributed: needs channel.secure_sum: of a single upload the server would see "
        "all but a little noise",
    ),
    "private_clients_robustness": CompatibilityRule(
        ("aggregation.rule", "privacy.unit"),
        lambda run: run.unit == "client" and run.single_uploads(),
        "{found}: cannot be combined with privacy.unit: found {run.unit}: noise is added to sums; take unit: record or "
        "local",
    ),
    "poisson_cohorts_secure_sum": CompatibilityRule(
        ("privacy.poisson_cohorts", "channel.secure_sum"),
        lambda run: run.privacy and run.privacy.poisson_cohorts and run.config.channel.secure_sum,
        "privacy.poisson_cohorts: cannot be combined with channel.secure_sum, which is agreed on "
        "for cohorts of one size; leave one of them out",
    ),
    "private_clients_compression": CompatibilityRule(
        ("channel.compress", "privacy.unit"),
        lambda run: run.unit == "client" and first(run.config.channel.compress),
        "channel.compress: found {found.kind}, which changes uploads after they were bounded, with "
        "privacy.unit: found {run.unit}; take unit: record or local",
    ),
    # Robustness
    "secure_sum_robustness": CompatibilityRule(
        ("aggregation.rule", "channel.secure_sum"),
        lambda run: run.config.channel.secure_sum and run.single_uploads(),
        "{found}: needs single uploads, but channel.secure_sum tells only their sum; leave one of "
        "them out",
    ),
    # Cohorts that are chosen or repeated
    "choice_among_all_clients": CompatibilityRule(
        ("cohort.over_selection", "clients.per_round"),
        lambda run: run.config.clients.per_round is None and run.choosing_setting(),
        "cohort.{found}: chooses among clients, but clients.per_round is not given: all clients "
        "are sampled",
    ),
    "least_above_sampled": CompatibilityRule(
        ("cohort.least", "clients.per_round"),
        lambda run: run.config.cohort.least > run.num_wanted() and run.num_wanted(),
        "cohort.least: found {run.config.cohort.least}, but {found} clients take part in a round "
        "(clients.per_round)",
    ),
    "losses_of_secure_sum": CompatibilityRule(
        ("cohort.sampling", "channel.secure_sum"),
        lambda run: run.config.cohort.sampling == "oort" and run.config.channel.secure_sum,
        "cohort.sampling: oort goes by each client's training loss, of which channel.secure_sum "
        "tells the mean alone; take available or uniform, or leave channel.secure_sum out",
    ),
    "over_selection_secure_sum": CompatibilityRule(
        ("cohort.over_selection", "channel.secure_sum"),
        lambda run: (
            run.config.clients.per_round is not None
            and run.min_survivors() > run.num_wanted()
            and {"sampled": run.num_sampled(), "survivors": run.min_survivors()}
        ),
        "cohort.over_selection: found {run.config.cohort.over_selection:g}; of {sampled} sampled "
        "clients the first {run.config.clients.per_round} are taken, but "
        "channel.secure_sum.threshold asks for {survivors} to stay: no round would be opened; take "
        "a smaller over_selection or threshold",
    ),
    "repeated_secure_sum": CompatibilityRule(
        ("cohort.least", "channel.secure_sum"),
        lambda run: (
            run.config.cohort.too_few == "repeat"
            and 0 < run.min_survivors() < run.config.cohort.least
            and run.min_survivors()
        ),
        "cohort.least: found {run.config.cohort.least}, with cohort.too_few: repeat and "
        "channel.secure_sum, which opens sums of {found}: of two sums of a round the difference "
        "tells single uploads; take no more, or too_few: skip",
    ),
}

RULES_AFTER_PREPARATION: dict[str, CompatibilityRule[RunFacts]] = {
    "over_selection_without_time": CompatibilityRule(
        ("cohort.over_selection", "devices"),
        lambda run: run.config.cohort.over_selection > 1 and not run.takes_time(),
        "cohort.over_selection: takes the first to arrive, but without `devices` nobody takes time",
    ),
    # Methods
    "task_of_method": CompatibilityRule(
        ("algorithm.name", "data.name"),
        lambda run: (
            run.task.kind not in run.algorithm.needs.tasks and ", ".join(run.algorithm.needs.tasks)
        ),
        "algorithm.name: {run.name} is for {found}, but data.name has a {run.task.kind} task",
    ),
    "no_proxy_set": CompatibilityRule(
        ("algorithm.name", "data.proxy.size"),
        lambda run: run.algorithm.needs.has_required_proxy and not run.num_proxy,
        "algorithm.name: {run.name} compares predictions on a proxy set, but data.proxy.size is 0; "
        "set it above 0, so that so many training rows are public, or name another set in "
        "data.proxy.source",
    ),
    "no_proxy_labels": CompatibilityRule(
        ("algorithm.initial_phase", "data.proxy.labels"),
        lambda run: (
            run.algorithm.needs.proxy_set == "labeled" and not run.federation.data.has_proxy_labels
        ),
        "algorithm.initial_phase: found true, with which {run.name} trains on labels of the proxy "
        "set, but data.proxy.labels is false; set it to true, or algorithm.initial_public_epochs "
        "to 0",
    ),
    "no_shares": CompatibilityRule(
        ("algorithm.name", "clients.defaults.shares"),
        lambda run: run.missing_shares(),
        "algorithm.name: {run.name} needs clients that share {found}, but no client's `shares` has "
        "it; add it in clients.defaults.shares, or to those who may send it",
    ),
    "large_population": CompatibilityRule(
        ("algorithm.name", "clients"),
        lambda run: run.algorithm.needs.all_clients and run.num_clients > MOST_IN_ONE_PLACE,
        f"algorithm.name: {{run.name}} brings all clients' rows or models together, at most "
        f"{MOST_IN_ONE_PLACE:,} of them; found {{run.num_clients:,}} clients",
    ),
    "unknown_part": CompatibilityRule(
        ("clients.common", "model"),
        lambda run: run.unknown_prefix(),
        "{key}: no client's `model` has a tensor whose name begins with '{prefix}'{hint}",
    ),
    "part_of_other_model": CompatibilityRule(
        ("algorithm.name", "shares"),
        lambda run: run.part_of_other_model(),
        "algorithm.name: {run.name} averages a small model next to each client's own, of which no "
        "client's `shares` names a part; found '{found}'",
    ),
    "nothing_to_average": CompatibilityRule(
        ("algorithm.name", "model"),
        lambda run: sum(kind.count for kind in run.clients_alone) == run.num_clients,
        "algorithm.name: {run.name} averages parameters here, but no two clients send the same "
        "tensor; give clients the same `model`, let their `shares` overlap, or name common "
        "prefixes in clients.common",
    ),
    # Training
    "class_weights_of_other_task": CompatibilityRule(
        ("class_weights", "data.name"),
        lambda run: (
            run.task.kind != "multiclass"
            and first(k.first for k in run.profiles if k.settings.class_weights is not None)
        ),
        "clients: {found}: class_weights: is for classes that exclude one another, but data.name "
        "has a {run.task.kind} task",
    ),
    "number_of_class_weights": CompatibilityRule(
        ("class_weights", "data.name"),
        lambda run: first(
            {"client": client, "count": len(weights)}
            for client, weights in run.class_weights.items()
            if len(weights) != run.task.outputs
        ),
        "clients: {client}: class_weights: found {count} numbers for {run.task.outputs} classes of "
        "data.name",
    ),
    "negative_class_weights": CompatibilityRule(
        ("class_weights", "weights"),
        lambda run: first(
            {"client": client, "weight": min(weights)}
            for client, weights in run.class_weights.items()
            if min(weights) < 0
        ),
        "clients: {client}: class_weights: found {weight:g}; weights are 0 or more",
    ),
    "class_weights_without_effect": CompatibilityRule(
        ("class_weights", "training row"),
        lambda run: run.weightless_client(),
        "clients: {client}: class_weights: found {weights}, which is 0 for every training row of "
        "{client}; raise one",
    ),
    "batches_of_one": CompatibilityRule(
        ("batch_size", "model"),
        lambda run: run.batch_of_one(),
        "{key}, but {model} has BatchNorm, which cannot train on batches of one; take 2 or more, or "
        "a model without it",
    ),
    # Secure aggregation
    "secure_sum_of_single_uploads": CompatibilityRule(
        ("algorithm.name", "channel.secure_sum"),
        lambda run: run.secure_sum and run.items_used_singly(),
        "algorithm.name: {run.name} needs single uploads ({found}), but channel.secure_sum tells "
        "only their sum; take a method that needs no more, such as hybrid, fedmd, fedavg or "
        "fedproto, or leave the key out",
    ),
    "secure_sum_compression": CompatibilityRule(
        ("channel.compress", "channel.secure_sum"),
        lambda run: (
            run.secure_sum
            and first(s.kind for s in run.config.channel.compress if s.kind not in ROUNDING)
        ),
        "channel.compress: found {found}, but channel.secure_sum adds whole vectors, in which "
        "nothing is left out; take quantize or half, or leave one of the keys out",
    ),
    "secure_sum_of_few": CompatibilityRule(
        ("channel.secure_sum", "clients.per_round"),
        lambda run: (
            run.secure_sum and run.cohort < FEWEST_IN_SUM and pluralize(run.cohort, "client")
        ),
        "channel.secure_sum: found {found} in a round (clients.per_round); a sum hides a part of "
        f"it among {FEWEST_IN_SUM} or more",
    ),
    "high_threshold": CompatibilityRule(
        ("channel.secure_sum.threshold", "clients.per_round"),
        lambda run: (
            run.secure_sum
            and run.secure_sum.min_survivors(run.cohort) > run.cohort
            and run.secure_sum.min_survivors(run.cohort)
        ),
        "channel.secure_sum.threshold: found {found}, but a round has {run.cohort} clients "
        "(clients.per_round)",
    ),
    "low_threshold": CompatibilityRule(
        ("channel.secure_sum.threshold", "clients.per_round"),
        lambda run: (
            run.secure_sum
            and 2 * run.secure_sum.min_survivors(run.cohort) <= run.cohort
            and {"least": run.secure_sum.min_survivors(run.cohort), "more": run.cohort // 2 + 1}
        ),
        "channel.secure_sum.threshold: found {least}, which is not more than half of the "
        "{run.cohort} clients of a round (clients.per_round); choose {more} or more",
    ),
    "large_range": CompatibilityRule(
        ("channel.secure_sum.range", "clients.per_round"),
        lambda run: run.secure_sum and run.secure_sum.max_fraction_bits(run.cohort) < 1,
        "channel.secure_sum.range: found {run.secure_sum.range:g}; sums over {run.cohort} clients "
        "leave 64-bit integers (clients.per_round)",
    ),
    "many_fraction_bits": CompatibilityRule(
        ("channel.secure_sum.fraction_bits", "channel.secure_sum.range"),
        lambda run: (
            run.secure_sum
            and run.secure_sum.num_fraction_bits(run.cohort)
            > run.secure_sum.max_fraction_bits(run.cohort)
            and {
                "bits": run.secure_sum.num_fraction_bits(run.cohort),
                "most": run.secure_sum.max_fraction_bits(run.cohort),
            }
        ),
        "channel.secure_sum.fraction_bits: found {bits}; with channel.secure_sum.range "
        "{run.secure_sum.range:g} sums over {run.cohort} clients leave 64-bit integers, choose {most} "
        "or fewer",
    ),
    # Robust aggregation
    "robustness_without_uploads": CompatibilityRule(
        ("aggregation.rule", "algorithm.name"),
        lambda run: run.sends_nothing and run.single_uploads(),
        "{found}: {run.name} has no uploads that a federation would combine; take another "
        "algorithm.name",
    ),
    "idle_rule": CompatibilityRule(
        ("aggregation", "algorithm.name"),
        lambda run: run.idle_rule(),
        "aggregation.{key}: found '{value}', but {run.name} combines no {items} that clients send "
        "here; leave it at 'mean', or take another algorithm.name",
    ),
    "rule_beside_model": CompatibilityRule(
        ("aggregation.rule", "algorithm.name"),
        lambda run: (
            "rule" in run.rules
            and first(name for name, how in run.dry_round[1] if how in PARAMETERS)
        ),
        "aggregation.rule: found '{run.config.aggregation.rule}', but algorithm.name: {run.name} "
        "averages '{found}' apart from its model",
    ),
    "exclusive_rule": CompatibilityRule(
        ("aggregation.predictions", "data.name"),
        lambda run: (
            run.task.kind != "multiclass"
            and "predictions" in run.rules
            and prediction_rule[run.rules["predictions"]].exclusive
            and run.rules["predictions"]
        ),
        "aggregation.predictions: {found} is for classes that exclude one another, but data.name "
        "has a {run.task.kind} task",
    ),
    "rule_without_proxy_set": CompatibilityRule(
        ("aggregation.rule", "data.proxy.size"),
        lambda run: (
            run.uses_root
            and not all(run.federation.client_infos[k.first].has_proxy for k in run.profiles)
        ),
        "aggregation.rule: {run.rules[rule]} compares with what the server makes of the proxy set; "
        "found data.proxy.size 0, or a client without",
    ),
    "rule_for_whole_models": CompatibilityRule(
        ("aggregation.rule", "algorithm.name"),
        lambda run: run.uses_root and run.averages_parts(),
        "aggregation.rule: {run.rules[rule]} is for whole models averaged by architecture; take "
        "another rule, or algorithm.name fedavg or hybrid",
    ),
    "outvoted_rule": CompatibilityRule(
        ("aggregation.rule", "aggregation.liars"),
        lambda run: run.outvoted_rule(),
        "aggregation.{key}: {value} bears {malicious} (aggregation.liars: "
        "{run.config.aggregation.liars:g}) among {least} clients or more, but {senders} send "
        "{item}; {advice}",
    ),
    # Attacks
    "attack_on_nothing": CompatibilityRule(
        ("attacks.name", "algorithm.name"),
        lambda run: run.attack and run.missing_targets(),
        "{run.attack} acts on {found}, of which algorithm.name {run.name} sends none here",
    ),
    "attack_on_factors": CompatibilityRule(
        ("attacks.name", "algorithm.name"),
        lambda run: (
            "updates" in run.acts_on and any(spec.ranks for spec in run.algorithm.uploads.values())
        ),
        "{run.attack}: algorithm.name {run.name} sends factors of updates, which it cannot forge; "
        "take label_flip",
    ),
    "attack_on_classes": CompatibilityRule(
        ("attacks.name", "data.name"),
        lambda run: "data" in run.acts_on and run.task.kind == "regression",
        "{run.attack} is for classes, but data.name has a regression task",
    ),
    "trigger_of_other_task": CompatibilityRule(
        ("attacks.name", "data.name"),
        lambda run: run.has_trigger and run.task.kind != "multiclass",
        "{run.attack} is for classes that exclude one another, but data.name has a "
        "{run.task.kind} task",
    ),
    "trigger_without_images": CompatibilityRule(
        ("attacks.name", "data.name"),
        lambda run: run.has_trigger and any(len(k.arch.input_shape) != 3 for k in run.profiles),
        "{run.attack} stamps images, but examples of data.name are none to every client",
    ),
    "attack_after_the_run": CompatibilityRule(
        ("attacks.from_round", "rounds"),
        lambda run: (
            run.config.attacks and run.config.attacks.from_round > run.federation.num_rounds
        ),
        "attacks.from_round: found {run.config.attacks.from_round}, but the run ends with round "
        "{run.federation.num_rounds} (rounds): no client would be malicious",
    ),
    "trigger_larger_than_images": CompatibilityRule(
        ("attacks.trigger", "data.name"),
        lambda run: run.has_trigger and run.small_image(),
        "attacks.trigger: found {run.config.attacks.trigger}, but images have sides of {found} "
        "pixels in data.name",
    ),
    "unknown_class_in_attack": CompatibilityRule(
        ("attacks.target", "data.name"),
        lambda run: run.unknown_class(),
        "attacks.{key}: found class {value}, but there are {run.task.outputs} in data.name, from 0",
    ),
    # Asynchronous runs
    "asynchronous_single_uploads": CompatibilityRule(
        ("runtime.mode", "algorithm.name"),
        lambda run: run.is_async and (run.algorithm.needs.all_clients or run.items_used_singly()),
        "runtime.mode: async cannot be combined with algorithm.name: {run.name}, which needs the "
        "uploads of one cohort side by side; others are weighted by staleness and summed",
    ),
    "asynchronous_proxy_rows": CompatibilityRule(
        ("algorithm.proxy_rows", "runtime.mode"),
        lambda run: run.is_async and run.drawn_proxy_rows(),
        "algorithm.proxy_rows: found {found}, drawn again each round; with runtime.mode=async "
        "predictions of different versions meet, so they have to be of the same rows: leave it "
        "out, or lower data.proxy.size",
    ),
    "buffer_of_one": CompatibilityRule(
        ("runtime.buffer", "algorithm.name"),
        lambda run: run.policy.buffer_size == 1 and run.config.runtime.buffer,
        "runtime.buffer: found {found}, but algorithm.name is {run.name}, which aggregates after "
        "each upload",
    ),
    "two_buffers": CompatibilityRule(
        ("runtime.buffer", "algorithm.buffer"),
        lambda run: run.policy.buffer_size and run.config.runtime.buffer,
        "runtime.buffer: found {found}, but algorithm.name is {run.name}: its own is "
        "algorithm.buffer: {run.policy.buffer_size}",
    ),
    "instant_clients": CompatibilityRule(
        ("devices", "runtime.mode"),
        lambda run: run.is_async and run.instant_client(),
        "{key}: tasks of {client} take no time, so with runtime.mode=async it would have every "
        "turn before all who do take some; give all of them a speed, up or down (`devices`, "
        "`machine`)",
    ),
    "large_buffer": CompatibilityRule(
        ("buffer", "rounds"),
        lambda run: (
            run.is_async
            and run.buffer_size > run.num_uploads
            and ("algorithm.buffer" if run.policy.buffer_size else "runtime.buffer")
        ),
        "{found}: found {run.buffer_size}, but {run.config.rounds} rounds of {run.concurrency} "
        "clients take {run.num_uploads} uploads: there would be no new version; choose "
        "{run.num_uploads} or fewer",
    ),
    # Privacy
    "private_rows_in_one_place": CompatibilityRule(
        ("privacy.unit", "algorithm.name"),
        lambda run: run.unit and run.algorithm.needs.all_clients and not run.algorithm.uploads,
        "privacy.unit: found {run.unit}, but algorithm.name: {run.name} brings all private rows together in one place",
    ),
    "private_statistics": CompatibilityRule(
        ("preprocess.normalize", "privacy.unit"),
        lambda run: (
            run.unit
            and first(k.first for k in run.profiles if k.settings.preprocess.normalize == "own")
        ),
        "clients: {found}: preprocess.normalize: found own, statistics of private rows that are "
        "not noised; give fixed numbers with privacy.unit: found {run.unit}",
    ),
    "private_initial_phase": CompatibilityRule(
        ("algorithm.initial_phase", "privacy.unit"),
        lambda run: (
            run.unit == "record"
            and isinstance(run.algorithm, InitialPhase)
            and run.algorithm.initial_phase
        ),
        "algorithm.initial_phase: found true, with privacy.unit: found {run.unit}: its epochs on private rows are not "
        "accounted; set it to false, or take unit: client or local",
    ),
    "private_rows_sent": CompatibilityRule(
        ("privacy.unit", "algorithm.name"),
        lambda run: (
            run.unit
            and first(
                name
                for name, spec in run.uploadable.items()
                if spec.kind == "rows" and spec.rows_of == "train"
            )
        ),
        "privacy.unit: found {run.unit}, but algorithm.name: {run.name} sends '{found}' of every private row as it is",
    ),
    "private_records_batch_norm": CompatibilityRule(
        ("model", "privacy.unit"),
        lambda run: run.unit == "record" and run.mixing_model(),
        "{key}: found {model}, whose BatchNorm mixes the rows of a batch, with privacy.unit: found {run.unit}; take "
        "{other}",
    ),
    "private_records_in_evaluation": CompatibilityRule(
        ("privacy.unit", "algorithm.name"),
        lambda run: run.unit == "record" and run.trains_before_evaluation(),
        "privacy.unit: found {run.unit}, but algorithm.name: {run.name} trains on private rows before a model is read, "
        "which nothing accounts for",
    ),
    "private_records_unaccounted": CompatibilityRule(
        ("privacy.unit", "algorithm.name"),
        lambda run: run.unit == "record" and run.unaccountable_training(),
        "privacy.unit: found {run.unit}, but algorithm.name: {run.name} {found}",
    ),
    "clip_of_unknown_item": CompatibilityRule(
        ("privacy.clip", "algorithm.name"),
        lambda run: run.unit in BOUNDED and run.unknown_clip(),
        "privacy.clip: algorithm.name {run.name} uploads no '{item}'{hint}",
    ),
    "votes_without_classes": CompatibilityRule(
        ("privacy.votes", "algorithm.name"),
        lambda run: (
            run.privacy
            and run.privacy.votes
            and (
                run.task.kind != "multiclass"
                or not any(spec.says for spec in run.uploadable.values())
            )
        ),
        "privacy.votes: algorithm.name: {run.name} sends no word on classes that exclude one "
        "another here",
    ),
    "bounded_factors": CompatibilityRule(
        ("privacy.unit", "algorithm.name"),
        lambda run: (
            run.unit in BOUNDED
            and first(name for name, spec in run.uploadable.items() if spec.ranks)
        ),
        "privacy.unit: found {run.unit}, but the shape of '{found}' of algorithm.name: {run.name} tells of its values",
    ),
    "private_clients_single_uploads": CompatibilityRule(
        ("privacy.unit", "algorithm.name"),
        lambda run: (
            run.unit == "client"
            and first(name for name, spec in run.uploadable.items() if spec.use == "each")
        ),
        "privacy.unit: found {run.unit}, but algorithm.name: {run.name} needs single uploads ('{found}'); noise is "
        "added to their sum. Take unit: local",
    ),
    "bounded_uploads_share_rarely": CompatibilityRule(
        ("share_every", "privacy.unit"),
        lambda run: run.unit in BOUNDED and run.rare_sender(),
        "clients: {client}: share_every: found {every}, with privacy.unit: found {run.unit}; an update is measured "
        "from what was received in the same round",
    ),
    "noised_batch_norm": CompatibilityRule(
        ("model", "privacy.unit"),
        lambda run: run.unit in BOUNDED and run.noised_statistics(),
        "clients: {client}: model: found {model}, whose BatchNorm statistics would be noised, with "
        "privacy.unit: found {run.unit}; take {other}, or fedbn, where they stay",
    ),
    "parameters_without_start": CompatibilityRule(
        ("privacy.unit", "algorithm.name"),
        lambda run: run.unit in BOUNDED and run.item_without_start(),
        "privacy.unit: found {run.unit}, but '{found}' of algorithm.name: {run.name} is no change of what a client "
        "received",
    ),
}


# What a rule cannot say: code and models are loaded and tried.


def check_compatibility(run: RunFacts) -> None:
    """Check everything about a prepared run before it trains.

    Raises:
        UserError: If it cannot work.
        RunFailedError: If a user's method does not run.
    """
    _load_robustness(run)
    checked = {kind.arch for kind in run.profiles}
    for kind in run.profiles:
        for slot, arch in kind.models.items():
            if arch in checked:
                continue
            try:
                arch.check()
            except ModelError as error:
                raise UserError(f"algorithm.{slot}: {error}") from None
            checked.add(arch)
    check_rules(RULES_AFTER_PREPARATION, run)
    if is_user_method(run.algorithm):
        check_user_method(run.algorithm, run.federation)


def _load_robustness(run: RunFacts) -> None:
    """Load the rules and the attack that the configuration names by `python:`."""
    aggregation = run.config.aggregation
    named: list[tuple[str, str, type]] = [
        ("aggregation.rule", aggregation.rule, Rule),
        ("aggregation.predictions", aggregation.predictions, PredictionRule),
    ]
    if run.config.attacks is not None:
        named.append(("attacks.name", run.config.attacks.name, Attack))
    for key, value, base in named:
        if value.startswith(OWN):
            import_reference(value, key, base)
