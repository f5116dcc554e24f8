"""Rules that depend on the configuration only, which are checked before data is loaded."""

from __future__ import annotations

from hetero_fl.config.base import StalenessConfig
from hetero_fl.experiment.compatibility.config_facts import ConfigFacts, first
from hetero_fl.experiment.compatibility.rule import CompatibilityRule

RULES_ON_LOADING: dict[str, CompatibilityRule[ConfigFacts]] = {
    # Cohorts
    "cohort_larger_than_population": CompatibilityRule(
        ("clients.per_round", "clients"),
        lambda run: (run.config.clients.per_round or 0) > len(run.clients) and len(run.clients),
        "clients.per_round: must be <= {found}, the number of clients, got "
        "{run.config.clients.per_round}",
    ),
    "sampled_clients_share_rarely": CompatibilityRule(
        ("clients.per_round", "share_every"),
        lambda run: run.config.clients.per_round is not None and run.rare_sender(),
        "clients.per_round: cannot be combined with share_every ({client}), because sampled "
        "clients may not share in that round",
    ),
    # Synchronous and asynchronous runs
    "synchronous_buffer": CompatibilityRule(
        ("runtime.buffer", "runtime.mode"),
        lambda run: not run.is_async and run.config.runtime.buffer,
        "runtime.buffer={found} requires runtime.mode=async; set it, or remove the buffer",
    ),
    "synchronous_staleness": CompatibilityRule(
        ("runtime.staleness", "runtime.mode"),
        lambda run: not run.is_async and run.config.runtime.staleness != StalenessConfig(),
        "runtime.staleness: requires runtime.mode=async; set it, or remove the staleness",
    ),
    "asynchronous_secure_sum": CompatibilityRule(
        ("runtime.mode", "channel.secure_sum"),
        lambda run: run.is_async and run.config.channel.secure_sum,
        "runtime.mode=async cannot be combined with channel.secure_sum, which sums the "
        "uploads of one cohort",
    ),
    "asynchronous_homomorphic": CompatibilityRule(
        ("runtime.mode", "channel.homomorphic"),
        lambda run: run.is_async and run.config.channel.homomorphic,
        "runtime.mode=async cannot be combined with channel.homomorphic, which sums the "
        "uploads of one cohort",
    ),
    "asynchronous_robustness": CompatibilityRule(
        ("runtime.mode", "aggregation.rule"),
        lambda run: run.is_async and run.single_uploads(),
        "runtime.mode=async cannot be combined with {found}, which needs the uploads of one cohort",
    ),
    "asynchronous_clients_share_rarely": CompatibilityRule(
        ("runtime.mode", "share_every"),
        lambda run: run.is_async and run.rare_sender(),
        "runtime.mode=async cannot be combined with share_every ({client}), because there are "
        "no rounds",
    ),
    "two_staleness_settings": CompatibilityRule(
        ("runtime.staleness", "algorithm.staleness"),
        lambda run: (
            run.policy.staleness is not None and run.config.runtime.staleness != StalenessConfig()
        ),
        "runtime.staleness: not used by {run.name}; set algorithm.staleness instead",
    ),
    "asynchronous_cohort": CompatibilityRule(
        ("cohort", "runtime.mode"),
        lambda run: run.is_async and run.waiting_setting(),
        "cohort.{found}: cannot be combined with runtime.mode=async, which has no cohorts",
    ),
    # Settings without effect
    "unused_partition": CompatibilityRule(
        ("data.partition", "clients"),
        lambda run: run.unused_partition(),
        "data.partition: has no effect, because all clients have data of their own; remove it",
    ),
    "unused_size": CompatibilityRule(
        ("clients", "size"),
        lambda run: run.unused_size(),
        "clients: '{found}': size: has no effect, because the client has data of its own; remove "
        "it",
    ),
    "unused_partition_setting": CompatibilityRule(
        ("data.partition", "data.partition.kind"),
        lambda run: run.unused_partition_setting(),
        "data.partition.{found}: has no effect with kind={run.config.data.partition.kind}; remove "
        "it, or set another kind",
    ),
    "unused_proxy_setting": CompatibilityRule(
        ("data.proxy", "data.proxy.size"),
        lambda run: run.unused_proxy_setting(),
        "data.proxy.{found}: has no effect without a proxy set; set data.proxy.size",
    ),
    # Methods
    "unused_client_option": CompatibilityRule(
        ("clients", "algorithm.name"),
        lambda run: run.unused_option(),
        "{found}: not used by algorithm.name={run.name}; remove it",
    ),
    # Privacy
    "private_asynchronous_run": CompatibilityRule(
        ("runtime.mode", "privacy.unit"),
        lambda run: run.unit and run.is_async,
        "runtime.mode=async cannot be combined with privacy.unit={run.unit}, whose budget is "
        "planned for the cohorts of rounds",
    ),
    "private_run_from_other_models": CompatibilityRule(
        ("init_from", "privacy.unit"),
        lambda run: run.unit and run.given_models(),
        "{found} cannot be combined with privacy.unit={run.unit}, because ε does not include what "
        "these models reveal; {advice}",
    ),
    "private_sampling": CompatibilityRule(
        ("cohort.sampling", "privacy.unit"),
        lambda run: run.unit and run.config.cohort.sampling != "uniform",
        "cohort.sampling={run.config.cohort.sampling} cannot be combined with "
        "privacy.unit={run.unit}, whose accounting needs the cohorts in advance",
    ),
    "private_over_selection": CompatibilityRule(
        ("cohort.over_selection", "privacy.unit"),
        lambda run: run.unit and run.config.cohort.over_selection > 1,
        "cohort.over_selection={run.config.cohort.over_selection} cannot be combined with "
        "privacy.unit={run.unit}, whose accounting needs the cohorts in advance",
    ),
    "distributed_noise_in_plain_sum": CompatibilityRule(
        ("privacy.distributed", "channel.secure_sum"),
        lambda run: (
            run.privacy and run.privacy.distributed and run.config.channel.secure_sum is None
        ),
        "privacy.distributed: requires channel.secure_sum, because the noise of a single "
        "upload is too small",
    ),
    "private_clients_robustness": CompatibilityRule(
        ("aggregation.rule", "privacy.unit"),
        lambda run: run.unit == "client" and run.single_uploads(),
        "{found} cannot be combined with privacy.unit={run.unit}, which adds noise to sums; "
        "set privacy.unit=record or local",
    ),
    "poisson_cohorts_secure_sum": CompatibilityRule(
        ("privacy.poisson_cohorts", "channel.secure_sum"),
        lambda run: run.privacy and run.privacy.poisson_cohorts and run.config.channel.secure_sum,
        "privacy.poisson_cohorts: cannot be combined with channel.secure_sum, which needs "
        "cohorts of a fixed size; remove one of them",
    ),
    "private_clients_homomorphic": CompatibilityRule(
        ("privacy.unit", "channel.homomorphic"),
        lambda run: run.unit == "client" and run.config.channel.homomorphic,
        "privacy.unit=client cannot be combined with channel.homomorphic, because the server "
        "cannot add noise to a sum that it cannot read; set privacy.unit=record or local, or use "
        "channel.secure_sum",
    ),
    "private_clients_compression": CompatibilityRule(
        ("channel.compress", "privacy.unit"),
        lambda run: run.unit == "client" and first(run.config.channel.compress),
        "channel.compress={found.kind} cannot be combined with privacy.unit={run.unit}, "
        "because it changes uploads after clipping; set privacy.unit=record or local",
    ),
    # Robustness
    "secure_sum_robustness": CompatibilityRule(
        ("aggregation.rule", "channel.secure_sum"),
        lambda run: run.config.channel.secure_sum and run.single_uploads(),
        "{found} cannot be combined with channel.secure_sum, which reveals only the sum of "
        "uploads; remove one of them",
    ),
    "homomorphic_robustness": CompatibilityRule(
        ("aggregation.rule", "channel.homomorphic"),
        lambda run: run.config.channel.homomorphic and run.single_uploads(),
        "{found} cannot be combined with channel.homomorphic, with which nobody reads single "
        "uploads; remove one of them",
    ),
    # Cohorts
    "choice_among_all_clients": CompatibilityRule(
        ("cohort.over_selection", "clients.per_round"),
        lambda run: run.config.clients.per_round is None and run.config.cohort.over_selection > 1,
        "cohort.over_selection: requires clients.per_round; without it all clients are sampled",
    ),
    "least_above_sampled": CompatibilityRule(
        ("cohort.least", "clients.per_round"),
        lambda run: run.config.cohort.least > run.num_wanted() and run.num_wanted(),
        "cohort.least: must be <= {found}, the clients in a round (clients.per_round), got "
        "{run.config.cohort.least}",
    ),
    "over_selection_secure_sum": CompatibilityRule(
        ("cohort.over_selection", "channel.secure_sum"),
        lambda run: (
            run.config.clients.per_round is not None
            and run.min_survivors() > run.num_wanted()
            and {"sampled": run.num_sampled(), "survivors": run.min_survivors()}
        ),
        "cohort.over_selection={run.config.cohort.over_selection:g} is too large: only the first "
        "{run.config.clients.per_round} of {sampled} sampled clients are used, but "
        "channel.secure_sum.threshold requires {survivors}; choose a smaller over_selection or "
        "threshold",
    ),
}
