"""Rules that also depend on the data and the models, which are checked before training."""

from __future__ import annotations

from hetero_fl.aggregation.robust_means import PARAMETERS
from hetero_fl.algorithms.base import broadcasts_means, is_user_method
from hetero_fl.algorithms.proxy_distillation import InitialPhase
from hetero_fl.config.communication import num_fraction_bits
from hetero_fl.experiment.compatibility.config_facts import first
from hetero_fl.experiment.compatibility.rule import CompatibilityRule, check_rules
from hetero_fl.experiment.compatibility.run_facts import RunFacts
from hetero_fl.experiment.compatibility.user_code import check_user_method
from hetero_fl.robustness.attacks import import_user_classes
from hetero_fl.robustness.rules import prediction_rule
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.text import pluralize
from model_zoo import ModelError

ROUNDING = ("quantize", "half")
"""Kinds of compression that keep all tensor elements, so that compressed uploads can be summed."""
MIN_CLIENTS_IN_SUM = 3
"""Smallest cohort for secure aggregation.

If two clients are summed, each can compute the upload of the other.
"""
MAX_CLIENTS_IN_SUM = 200
"""Largest cohort for secure aggregation, in which each client shares masks with all others."""
MAX_IN_ONE_PLACE = 10_000
"""Largest number of clients for methods that collect all rows or models in one place."""

BOUNDED = ("client", "local")
"""Values of `privacy.unit` for which the norms of uploaded items are clipped."""

RULES_AFTER_PREPARATION: dict[str, CompatibilityRule[RunFacts]] = {
    "over_selection_without_time": CompatibilityRule(
        ("cohort.over_selection", "devices"),
        lambda run: run.config.cohort.over_selection > 1 and not run.takes_time(),
        "cohort.over_selection: requires devices; without them all uploads arrive at the same time",
    ),
    "patience_without_validation": CompatibilityRule(
        ("evaluation.patience", "validation rows"),
        lambda run: run.config.evaluation.patience is not None and not run.has_validation,
        "evaluation.patience: has no effect without validation rows; set data.validation or "
        "data.split.validation > 0 (Federation, Client: pass validation=...), or remove patience",
    ),
    # Methods
    "task_of_method": CompatibilityRule(
        ("algorithm.name", "data set"),
        lambda run: (
            run.task.kind not in run.algorithm.needs.tasks and ", ".join(run.algorithm.needs.tasks)
        ),
        "algorithm.name={run.name} supports {found} tasks, but the data set has a "
        "{run.task.kind} task",
    ),
    "no_proxy_set": CompatibilityRule(
        ("algorithm.name", "data.proxy.size"),
        lambda run: run.algorithm.needs.has_required_proxy and not run.num_proxy,
        "algorithm.name={run.name} requires a proxy set; set data.proxy.size > 0 to make "
        "training rows public, or data.proxy.source",
    ),
    "no_proxy_labels": CompatibilityRule(
        ("algorithm.initial_phase", "data.proxy.labels"),
        lambda run: (
            run.algorithm.needs.proxy_set == "labeled" and not run.federation.data.has_proxy_labels
        ),
        "algorithm.initial_phase=true makes {run.name} train on labels of the proxy set, but "
        "data.proxy.labels is false; set it to true, or set algorithm.initial_public_epochs=0",
    ),
    "no_shares": CompatibilityRule(
        ("algorithm.name", "shares"),
        lambda run: run.missing_shares(),
        "algorithm.name={run.name} requires clients that share {found}; add it to "
        "shares of some or all clients",
    ),
    "large_population": CompatibilityRule(
        ("algorithm.name", "clients"),
        lambda run: run.algorithm.needs.all_clients and run.num_clients > MAX_IN_ONE_PLACE,
        f"algorithm.name={{run.name}} needs the rows or models of all clients in one place, "
        f"which supports at most {MAX_IN_ONE_PLACE:,} clients, got {{run.num_clients:,}}",
    ),
    "unknown_part": CompatibilityRule(
        ("clients.common", "model"),
        lambda run: run.unknown_prefix(),
        "{key}: no model has a tensor with prefix '{prefix}'{hint}",
    ),
    "part_of_other_model": CompatibilityRule(
        ("algorithm.name", "shares"),
        lambda run: run.part_of_other_model(),
        "shares: the auxiliary model that algorithm.name={run.name} averages has no part "
        "'{found}'; add backbone or parameters",
    ),
    "nothing_to_average": CompatibilityRule(
        ("algorithm.name", "model"),
        lambda run: sum(profile.count for profile in run.clients_alone) == run.num_clients,
        "algorithm.name={run.name} averages parameters, but no two clients upload the same tensor; "
        "give clients the same model, let their shares overlap, or set clients.common",
    ),
    # Training
    "class_weights_of_other_task": CompatibilityRule(
        ("class_weights", "data set"),
        lambda run: (
            run.task.kind != "multiclass"
            and first(
                profile.first
                for profile in run.profiles
                if profile.settings.class_weights is not None
            )
        ),
        "clients: '{found}': class_weights: requires a multiclass task, but the data set has a "
        "{run.task.kind} task",
    ),
    "number_of_class_weights": CompatibilityRule(
        ("class_weights", "class"),
        lambda run: first(
            {"client": client, "count": len(weights)}
            for client, weights in run.class_weights.items()
            if len(weights) != run.task.outputs
        ),
        "clients: '{client}': class_weights: expected {run.task.outputs} numbers, one for each "
        "class, got {count}",
    ),
    "prior_of_other_task": CompatibilityRule(
        ("prior", "data set"),
        lambda run: run.task.kind != "multiclass" and run.prior_option(),
        "{found}: requires a multiclass task, but the data set has a {run.task.kind} task",
    ),
    "correction_of_adjusted_predictions": CompatibilityRule(
        ("prior_correction", "logit_adjustment"),
        lambda run: first(
            profile.first
            for profile in run.profiles
            if profile.settings.prior_correction and profile.settings.logit_adjustment
        ),
        "clients: '{found}': prior_correction cannot be combined with logit_adjustment, after "
        "which predictions contain no prior; set one of them to false",
    ),
    "correction_without_counts": CompatibilityRule(
        ("prior_correction", "shares"),
        lambda run: run.uncorrectable_client(),
        "clients: '{found}': prior_correction requires statistics in shares, because the server of "
        "algorithm.name={run.name} predicts with the client's model",
    ),
    "alignment_of_mixed_predictions": CompatibilityRule(
        ("algorithm.align", "logit_adjustment"),
        lambda run: run.differently_adjusted(),
        "algorithm.align: requires the same logit_adjustment or prior_correction of all clients, "
        "but predictions of {without} do not include its class prior, those of {other} do; set "
        "algorithm.align=0, or the same value for all clients",
    ),
    "negative_class_weights": CompatibilityRule(
        ("class_weights", "weights"),
        lambda run: first(
            {"client": client, "weight": min(weights)}
            for client, weights in run.class_weights.items()
            if min(weights) < 0
        ),
        "clients: '{client}': class_weights: must be >= 0, got {weight:g}",
    ),
    "class_weights_without_effect": CompatibilityRule(
        ("class_weights", "training row"),
        lambda run: run.weightless_client(),
        "clients: '{client}': class_weights: {weights} is 0 for every training row of the "
        "client; increase a weight",
    ),
    "batches_of_one": CompatibilityRule(
        ("batch_size", "model"),
        lambda run: run.batch_of_one(),
        "{key}, but {model} has BatchNorm, which cannot train on batches of one row; choose 2 "
        "or more, or a model without BatchNorm",
    ),
    # Secure aggregation
    "secure_sum_of_single_uploads": CompatibilityRule(
        ("algorithm.name", "channel.secure_sum"),
        lambda run: run.secure_sum and run.items_used_singly(),
        "algorithm.name={run.name} cannot be combined with channel.secure_sum, which reveals "
        "only the sum of uploads, because it needs single uploads ({found}); choose hybrid, "
        "fedmd, fedavg or fedproto, or remove channel.secure_sum",
    ),
    "secure_sum_compression": CompatibilityRule(
        ("channel.compress", "channel.secure_sum"),
        lambda run: (
            run.secure_sum
            and first(s.kind for s in run.config.channel.compress if s.kind not in ROUNDING)
        ),
        "channel.compress={found} cannot be combined with channel.secure_sum, which sums "
        "complete vectors; choose quantize or half, or remove one of them",
    ),
    "secure_sum_of_few": CompatibilityRule(
        ("channel.secure_sum", "clients.per_round"),
        lambda run: (
            run.secure_sum and run.cohort < MIN_CLIENTS_IN_SUM and pluralize(run.cohort, "client")
        ),
        f"channel.secure_sum: requires {MIN_CLIENTS_IN_SUM} or more clients in a round "
        f"(clients.per_round), got {{found}}",
    ),
    "secure_sum_of_many": CompatibilityRule(
        ("channel.secure_sum", "clients.per_round"),
        lambda run: run.secure_sum and run.cohort > MAX_CLIENTS_IN_SUM and f"{run.cohort:,}",
        f"channel.secure_sum: at most {MAX_CLIENTS_IN_SUM} clients in a round "
        f"(clients.per_round), got {{found}}, because each client shares masks with all others; "
        f"set clients.per_round={MAX_CLIENTS_IN_SUM}, or use channel.homomorphic",
    ),
    "high_threshold": CompatibilityRule(
        ("channel.secure_sum.threshold", "clients.per_round"),
        lambda run: (
            run.secure_sum
            and run.secure_sum.min_survivors(run.cohort) > run.cohort
            and run.secure_sum.min_survivors(run.cohort)
        ),
        "channel.secure_sum.threshold: must be <= {run.cohort}, the clients in a round "
        "(clients.per_round), got {found}",
    ),
    "low_threshold": CompatibilityRule(
        ("channel.secure_sum.threshold", "clients.per_round"),
        lambda run: (
            run.secure_sum
            and 2 * run.secure_sum.min_survivors(run.cohort) <= run.cohort
            and {"least": run.secure_sum.min_survivors(run.cohort), "more": run.cohort // 2 + 1}
        ),
        "channel.secure_sum.threshold: must be more than half of the {run.cohort} clients in a "
        "round (clients.per_round), got {least}; choose {more} or more",
    ),
    "large_range": CompatibilityRule(
        ("channel.secure_sum.range", "clients.per_round"),
        lambda run: run.secure_sum and run.secure_sum.max_fraction_bits(run.cohort) < 1,
        "channel.secure_sum.range: {run.secure_sum.range:g} is too large; sums over "
        "{run.cohort} clients (clients.per_round) exceed 64-bit integers",
    ),
    "many_fraction_bits": CompatibilityRule(
        ("channel.secure_sum.fraction_bits", "channel.secure_sum.range"),
        lambda run: (
            run.secure_sum
            and num_fraction_bits(run.secure_sum, run.cohort)
            > run.secure_sum.max_fraction_bits(run.cohort)
            and {
                "bits": num_fraction_bits(run.secure_sum, run.cohort),
                "most": run.secure_sum.max_fraction_bits(run.cohort),
            }
        ),
        "channel.secure_sum.fraction_bits: must be <= {most}, got {bits}; with "
        "channel.secure_sum.range={run.secure_sum.range:g}, sums over {run.cohort} clients "
        "would exceed 64-bit integers",
    ),
    # Homomorphic encryption
    "homomorphic_server_step": CompatibilityRule(
        ("algorithm.name", "channel.homomorphic"),
        lambda run: run.homomorphic and not broadcasts_means(run.algorithm),
        "algorithm.name={run.name} cannot be combined with channel.homomorphic here, because its "
        "broadcasts are not the means of the last uploads; choose fedavg with server_lr=1 and "
        "without weighting=sum, fedmd with align=0, fd or fedproto, or remove channel.homomorphic",
    ),
    "homomorphic_shares": CompatibilityRule(
        ("clients.defaults.shares", "channel.homomorphic"),
        lambda run: run.homomorphic and run.unequal_shares(),
        "clients.defaults.shares: {found} shares other layers than others of its architecture, "
        "but with channel.homomorphic all of them receive one sum; give them the same shares",
    ),
    "homomorphic_compression": CompatibilityRule(
        ("channel.compress", "channel.homomorphic"),
        lambda run: run.homomorphic and run.compressing_setting(),
        "channel.{found} cannot be combined with channel.homomorphic, which encrypts every number; "
        "remove one of them",
    ),
    "homomorphic_server_model": CompatibilityRule(
        ("server.model", "channel.homomorphic"),
        lambda run: run.homomorphic and run.federation.student is not None,
        "server.model cannot be combined with channel.homomorphic, because the server cannot read "
        "a model; remove one of them",
    ),
    "large_homomorphic_range": CompatibilityRule(
        ("channel.homomorphic.range", "clients.per_round"),
        lambda run: run.homomorphic and run.homomorphic.max_fraction_bits(run.cohort) < 1,
        "channel.homomorphic.range: {run.homomorphic.range:g} is too large; sums over "
        "{run.cohort} clients (clients.per_round) exceed the modulus of ciphertexts",
    ),
    "many_homomorphic_fraction_bits": CompatibilityRule(
        ("channel.homomorphic.fraction_bits", "channel.homomorphic.range"),
        lambda run: (
            run.homomorphic
            and num_fraction_bits(run.homomorphic, run.cohort)
            > run.homomorphic.max_fraction_bits(run.cohort)
            and {
                "bits": num_fraction_bits(run.homomorphic, run.cohort),
                "most": run.homomorphic.max_fraction_bits(run.cohort),
            }
        ),
        "channel.homomorphic.fraction_bits: must be <= {most}, got {bits}; with "
        "channel.homomorphic.range={run.homomorphic.range:g}, sums over {run.cohort} clients "
        "would exceed the modulus of ciphertexts",
    ),
    # Robust aggregation
    "robustness_without_uploads": CompatibilityRule(
        ("aggregation.rule", "algorithm.name"),
        lambda run: run.sends_nothing and run.single_uploads(),
        "{found} cannot be combined with algorithm.name={run.name}, which has no uploads to "
        "aggregate; choose another method",
    ),
    "idle_rule": CompatibilityRule(
        ("aggregation", "algorithm.name"),
        lambda run: run.idle_rule(),
        "aggregation.{key}={value} has no effect: {run.name} does not aggregate {items} here; "
        "use mean, or choose another algorithm.name",
    ),
    "rule_beside_model": CompatibilityRule(
        ("aggregation.rule", "algorithm.name"),
        lambda run: (
            "rule" in run.rules
            and first(name for name, how in run.dry_round[1] if how in PARAMETERS)
        ),
        "aggregation.rule={run.config.aggregation.rule} cannot be combined with "
        "algorithm.name={run.name}, which averages '{found}' separately from its model",
    ),
    "exclusive_rule": CompatibilityRule(
        ("aggregation.predictions", "data set"),
        lambda run: (
            run.task.kind != "multiclass"
            and "predictions" in run.rules
            and prediction_rule[run.rules["predictions"]].exclusive
            and run.rules["predictions"]
        ),
        "aggregation.predictions={found} requires a multiclass task, but the data set has a "
        "{run.task.kind} task",
    ),
    "outvoted_rule": CompatibilityRule(
        ("aggregation.rule", "aggregation.malicious"),
        lambda run: run.outvoted_rule(),
        "aggregation.{key}={value} tolerates {malicious} "
        "(aggregation.malicious={run.config.aggregation.malicious:g}) "
        "among {least} or more clients, but {senders} upload {item}; {advice}",
    ),
    # Attacks
    "attack_on_nothing": CompatibilityRule(
        ("attacks.name", "algorithm.name"),
        lambda run: run.attack and run.missing_targets(),
        "{run.attack} changes {found}, which algorithm.name={run.name} does not upload here",
    ),
    "attack_on_factors": CompatibilityRule(
        ("attacks.name", "algorithm.name"),
        lambda run: (
            "updates" in run.acts_on and any(spec.ranks for spec in run.algorithm.uploads.values())
        ),
        "{run.attack} cannot be combined with algorithm.name={run.name}, which uploads "
        "factors of updates; choose label_flip",
    ),
    "attack_on_classes": CompatibilityRule(
        ("attacks.name", "data set"),
        lambda run: "data" in run.acts_on and run.task.kind == "regression",
        "{run.attack} requires a classification task, but the data set has a regression task",
    ),
    "trigger_of_other_task": CompatibilityRule(
        ("attacks.name", "data set"),
        lambda run: run.has_trigger and run.task.kind != "multiclass",
        "{run.attack} requires a multiclass task, but the data set has a {run.task.kind} task",
    ),
    "trigger_without_images": CompatibilityRule(
        ("attacks.name", "images"),
        lambda run: (
            run.has_trigger and any(len(profile.arch.input_shape) != 3 for profile in run.profiles)
        ),
        "{run.attack} requires images, but the data of some clients are not images",
    ),
    "attack_after_the_run": CompatibilityRule(
        ("attacks.from_round", "rounds"),
        lambda run: (
            run.config.attacks and run.config.attacks.from_round > run.federation.num_rounds
        ),
        "attacks.from_round: must be <= {run.federation.num_rounds}, the last round (rounds), "
        "got {run.config.attacks.from_round}",
    ),
    "trigger_larger_than_images": CompatibilityRule(
        ("attacks.trigger", "images"),
        lambda run: run.has_trigger and run.small_image(),
        "attacks.trigger: must be <= {found}, the side length of the images in pixels, got "
        "{run.config.attacks.trigger}",
    ),
    "unknown_class_in_attack": CompatibilityRule(
        ("attacks.target", "classes"),
        lambda run: run.unknown_class(),
        "attacks.{key}: class must be < {run.task.outputs}, the number of classes, got {value}",
    ),
    # Asynchronous runs
    "asynchronous_single_uploads": CompatibilityRule(
        ("runtime.mode", "algorithm.name"),
        lambda run: run.is_async and (run.algorithm.needs.all_clients or run.items_used_singly()),
        "runtime.mode=async cannot be combined with algorithm.name={run.name}, which needs "
        "all uploads of one cohort",
    ),
    "asynchronous_proxy_rows": CompatibilityRule(
        ("algorithm.proxy_rows", "runtime.mode"),
        lambda run: run.is_async and run.drawn_proxy_rows(),
        "algorithm.proxy_rows={found} cannot be combined with runtime.mode=async, because "
        "predictions of different versions must be on the same rows; remove it, or lower "
        "data.proxy.size",
    ),
    "buffer_of_one": CompatibilityRule(
        ("runtime.buffer", "algorithm.name"),
        lambda run: run.policy.buffer_size == 1 and run.config.runtime.buffer,
        "runtime.buffer={found} cannot be combined with algorithm.name={run.name}, which "
        "aggregates after each upload",
    ),
    "two_buffers": CompatibilityRule(
        ("runtime.buffer", "algorithm.buffer"),
        lambda run: run.policy.buffer_size and run.config.runtime.buffer,
        "runtime.buffer={found} cannot be combined with algorithm.name={run.name}, which uses "
        "algorithm.buffer={run.policy.buffer_size}",
    ),
    "instant_clients": CompatibilityRule(
        ("devices", "runtime.mode"),
        lambda run: run.is_async and run.instant_client(),
        "{key}: tasks of {client} take no time, so that with runtime.mode=async it would run "
        "before all other clients; set speed, up or down for all clients (devices, machine)",
    ),
    "large_buffer": CompatibilityRule(
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
    "private_rows_in_one_place": CompatibilityRule(
        ("privacy.unit", "algorithm.name"),
        lambda run: run.unit and run.algorithm.needs.all_clients and not run.algorithm.uploads,
        "privacy.unit={run.unit} cannot be combined with algorithm.name={run.name}, which "
        "collects all private rows in one place",
    ),
    "private_statistics": CompatibilityRule(
        ("preprocess.normalize", "privacy.unit"),
        lambda run: (
            run.unit
            and first(
                profile.first
                for profile in run.profiles
                if profile.settings.preprocess.normalize == "own"
            )
        ),
        "clients: '{found}': preprocess.normalize=own cannot be combined with "
        "privacy.unit={run.unit}, because no noise is added to these statistics; set fixed "
        "numbers",
    ),
    "private_initial_phase": CompatibilityRule(
        ("algorithm.initial_phase", "privacy.unit"),
        lambda run: (
            run.unit == "record"
            and isinstance(run.algorithm, InitialPhase)
            and run.algorithm.initial_phase
        ),
        "algorithm.initial_phase=true cannot be combined with privacy.unit={run.unit}, which "
        "does not account for its epochs on private rows; set it to false, or set "
        "privacy.unit=client or local",
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
        "privacy.unit={run.unit} cannot be combined with algorithm.name={run.name}, which "
        "uploads '{found}' of every private row",
    ),
    "private_records_mixed": CompatibilityRule(
        ("model", "privacy.unit"),
        lambda run: run.unit == "record" and run.mixing_model(),
        "{key}={model} cannot be combined with privacy.unit={run.unit}, because {reason}; choose "
        "{other}",
    ),
    "private_fine_tuning": CompatibilityRule(
        ("fine_tune_epochs", "privacy.unit"),
        lambda run: run.unit == "record" and run.private_fine_tuning(),
        "clients: '{found}': fine_tune_epochs cannot be combined with privacy.unit={run.unit}, "
        "which does not account for training before evaluation; set it to 0",
    ),
    "private_records_in_evaluation": CompatibilityRule(
        ("privacy.unit", "algorithm.name"),
        lambda run: run.unit == "record" and run.trains_before_evaluation(),
        "privacy.unit={run.unit} cannot be combined with algorithm.name={run.name}, which "
        "trains on private rows before evaluation without accounting",
    ),
    "private_records_unaccounted": CompatibilityRule(
        ("privacy.unit", "algorithm.name"),
        lambda run: run.unit == "record" and run.unaccountable_training(),
        "privacy.unit={run.unit} cannot be combined with algorithm.name={run.name}: {found}",
    ),
    "clip_of_unknown_item": CompatibilityRule(
        ("privacy.clip", "algorithm.name"),
        lambda run: run.unit in BOUNDED and run.unknown_clip(),
        "privacy.clip: algorithm.name={run.name} does not upload '{item}'{hint}",
    ),
    "votes_without_classes": CompatibilityRule(
        ("privacy.votes", "algorithm.name"),
        lambda run: (
            run.privacy
            and run.privacy.votes
            and (
                run.task.kind != "multiclass"
                or not any(spec.prediction_type for spec in run.uploadable.values())
            )
        ),
        "privacy.votes: requires a method that uploads class predictions of a multiclass task, "
        "got algorithm.name={run.name}",
    ),
    "bounded_factors": CompatibilityRule(
        ("privacy.unit", "algorithm.name"),
        lambda run: (
            run.unit in BOUNDED
            and first(name for name, spec in run.uploadable.items() if spec.ranks)
        ),
        "privacy.unit={run.unit} cannot be combined with algorithm.name={run.name}, because "
        "the shape of '{found}' depends on private values",
    ),
    "private_clients_single_uploads": CompatibilityRule(
        ("privacy.unit", "algorithm.name"),
        lambda run: (
            run.unit == "client"
            and first(name for name, spec in run.uploadable.items() if spec.use == "each")
        ),
        "privacy.unit={run.unit} cannot be combined with algorithm.name={run.name}, which "
        "needs single uploads ('{found}'); set privacy.unit=local",
    ),
    "bounded_uploads_share_rarely": CompatibilityRule(
        ("share_every", "privacy.unit"),
        lambda run: run.unit in BOUNDED and run.rare_sender(),
        "clients: '{client}': share_every={every} cannot be combined with "
        "privacy.unit={run.unit}, because an update is relative to the broadcast of the same "
        "round",
    ),
    "parameters_without_start": CompatibilityRule(
        ("privacy.unit", "algorithm.name"),
        lambda run: run.unit in BOUNDED and run.item_without_start(),
        "privacy.unit={run.unit} cannot be combined with algorithm.name={run.name}, because "
        "'{found}' is not relative to a broadcast",
    ),
}


def check_compatibility(run: RunFacts) -> None:
    """Check that the data, models, method and settings of a prepared run can be combined.

    The rules in `RULES_AFTER_PREPARATION` are checked, and each auxiliary model is built once.
    User-defined methods are also checked in a dry run.

    Args:
        run: Properties of the run.

    Raises:
        UserError: If a rule is violated, an auxiliary model cannot be built, or user-defined code
            is invalid.
        RunFailedError: If a user-defined method fails in the dry run.
    """
    import_user_classes(run.config.aggregation, run.config.attacks)
    checked = {profile.arch for profile in run.profiles}
    for profile in run.profiles:
        for slot, arch in profile.models.items():
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
