"""Refuse combinations with privacy, robust rules and attacks that cannot work."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import download_part, shareable_tensors, shared_part
from hetero_fl.algorithms.distillation import InitialPhase
from hetero_fl.config import Config
from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.config.robustness import AggregationConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Item, Payload
from hetero_fl.core.plan import Plan
from hetero_fl.engine.driver import run_plan
from hetero_fl.federation.dry_run import ExpectedUploads
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.sampling import sample_cohort
from hetero_fl.federation.user_methods import call_broadcast, translate_user_errors
from hetero_fl.privacy.accounting import opacus_accountants
from hetero_fl.privacy.client import uploadable_items
from hetero_fl.robustness.attacks import Attack
from hetero_fl.robustness.robust_means import PARAMETERS, AggregationRules, RobustModelMeans
from hetero_fl.robustness.rules import PredictionRule, Rule, prediction_rule, rule
from hetero_fl.utils.code_permission import OWN
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.registry import import_reference
from model_zoo import is_batch_norm, model_options

# What cannot be had together with `privacy`, refused before anything is computed, in one line that
# names both keys.

PRIVACY = "privacy.unit"


def check_plan(config: Config) -> None:
    """Raises UserError for sections under which more would be spent, or sent, than `privacy` plans for."""
    privacy = config.privacy
    if privacy is None:
        return
    cohort = config.cohort
    where = f"{PRIVACY}: found {privacy.unit}"
    if config.runtime.mode == "async":
        raise UserError(
            f"runtime.mode: found async, with {where}; what is spent is planned for cohorts, round by round"
        )
    if config.init_from is not None:
        raise UserError(
            f"init_from: found {config.init_from}, with {where}; what those models know of private rows is not counted in ε; "
            "leave one of them out"
        )
    more = {
        "cohort.sampling": cohort.sampling if cohort.sampling != "uniform" else None,
        "cohort.over_selection": cohort.over_selection if cohort.over_selection > 1 else None,
        "cohort.too_few": cohort.too_few if cohort.too_few == "repeat" else None,
    }
    for name, value in more.items():
        if value is not None:
            raise UserError(
                f"{name}: found {value}, with {where}; who takes part has to be known before the run, to be accounted"
            )
    if privacy.distributed and config.channel.secure_sum is None:
        raise UserError(
            "privacy.distributed: needs channel.secure_sum: of a single upload the server would see all but a little noise"
        )
    if privacy.unit == "client" and (key := single_upload_reason(config)) is not None:
        raise UserError(
            f"{key}: cannot be had with {where}: noise is added to sums; take unit: record or local"
        )
    if privacy.poisson_cohorts and config.channel.secure_sum is not None:
        raise UserError(
            "privacy.poisson_cohorts: cannot be had with channel.secure_sum, which is agreed on for cohorts of one size; leave "
            "one of them out"
        )
    if privacy.unit == "client" and config.channel.compress:
        raise UserError(
            f"channel.compress: found {config.channel.compress[0].kind}, which changes uploads after they were bounded, with "
            f"{where}; take unit: record or local"
        )


def weak_delta_note(federation: FederationSpec) -> list[str]:
    """A line where δ would allow to give one of those protected away as it is: to publish a random one costs δ = 1/n."""
    privacy = federation.privacy
    if privacy is None:
        return []
    rows = privacy.unit == "record"
    n = (
        min(federation.client_infos[id].num_rows for id in federation.num_evaluated)
        if rows
        else len(federation.client_infos)
    )
    if privacy.delta * n < 1:
        return []
    whose = f"the {n} training rows of the smallest client" if rows else f"{n} clients"
    return [
        f"privacy.delta: {privacy.delta:g} is not below one over {whose}: one of them may be given away whole"
    ]


def check_privacy(name: str, algorithm: Algorithm, federation: FederationSpec) -> None:
    """Raises UserError for what differential privacy cannot be given to."""
    privacy = federation.privacy
    if privacy is None:
        return
    if privacy.unit == "record" or privacy.accountant == "rdp" or privacy.poisson_cohorts:
        opacus_accountants()
    where = f"{PRIVACY}: found {privacy.unit}"
    if algorithm.needs.all_clients and not algorithm.uploads:
        raise UserError(
            f"{where}, but algorithm.name: {name} brings all private rows together in one place"
        )
    for kind in federation.client_infos.profiles:
        if kind.settings.preprocess.normalize == "own":
            raise UserError(
                f"clients: {kind.first}: preprocess.normalize: found own, statistics of private rows that nobody noised; "
                f"give fixed numbers with {PRIVACY}"
            )
    if privacy.unit == "record" and isinstance(algorithm, InitialPhase) and algorithm.initial_phase:
        raise UserError(
            f"algorithm.initial_phase: found true, with {where}: its epochs on private rows are not accounted; set it to "
            "false, or take unit: client or local"
        )
    items = uploadable_items(algorithm, federation)
    for item, spec in items.items():
        if spec.kind == "rows" and spec.rows_of == "train":
            raise UserError(
                f"{where}, but algorithm.name: {name} sends '{item}' of every private row as it is"
            )
    if privacy.unit == "record":
        _check_norms(algorithm, federation, where)
        _check_evaluation(name, algorithm, federation)
    else:
        _check_client_unit(name, algorithm, federation, where, privacy)


def _check_norms(algorithm: Algorithm, federation: FederationSpec, where: str) -> None:
    """The gradient of one row under BatchNorm is a function of its whole batch."""
    seen: set[ModelSpec] = set()
    for kind in federation.client_infos.profiles:
        for slot, arch in kind.models.items():
            if arch not in seen and has_batch_norm(arch):
                key = f"clients: {kind.first}: model" if slot == "model" else f"algorithm.{slot}"
                raise UserError(
                    f"{key}: found {arch.name}, whose BatchNorm mixes the rows of a batch, with {where}; "
                    f"take {group_norm_variant(arch.name)}"
                )
            seen.add(arch)


def has_batch_norm(arch: ModelSpec) -> bool:
    """Whether a model has BatchNorm anywhere."""
    with torch.random.fork_rng(devices=[]):
        return any(map(is_batch_norm, arch.build().modules()))


def group_norm_variant(name: str) -> str:
    """The model with GroupNorm in place of a model's BatchNorm, as a configuration names it."""
    if "_bn_" in name:
        return name.replace("_bn_", "_gn_")
    if "norm" in model_options(name):
        return f"{{name: {name}, norm: group}}"
    return "{name: resnet18_small, norm: group}" if "resnet" in name else "cnn_gn_small"


@translate_user_errors()
def _check_evaluation(name: str, algorithm: Algorithm, federation: FederationSpec) -> None:
    """Only training is noised and accounted: a deployed model that is made from private rows would be known in the clear."""
    expectations = ExpectedUploads(algorithm, federation)
    server = federation.server()
    algorithm.setup(server)
    for kind in federation.client_infos.profiles:
        card = federation.client_infos[kind.first]
        client = expectations.placeholder_client(card, 0)
        got = call_broadcast(algorithm, server, card)
        for hook in (algorithm.deploy, algorithm.personalize):
            if _reads_private_rows(expectations, client, hook(client, got)):
                raise UserError(
                    f"{PRIVACY}: found record, but algorithm.name: {name} trains on private rows before a model is read, "
                    "which nothing accounts for"
                )
        try:
            expectations.dry_run_upload(card, got, 0)
        except UserError as error:
            raise UserError(
                f"{PRIVACY}: found record, but algorithm.name: {name} {error}"
            ) from None


def _reads_private_rows(
    expectations: ExpectedUploads, client: Participant, plan: Plan[None]
) -> bool:
    tally = expectations.protection.make_ledger(expectations.backend)
    assert tally is not None  # records are private
    run_plan(plan, client, tally)
    return bool(tally.charges[client.participant_id])


def _check_client_unit(
    name: str, algorithm: Algorithm, federation: FederationSpec, where: str, privacy: PrivacyConfig
) -> None:
    """A client's whole upload is bounded: sums, in a form that tells nothing, from what it received the same round."""
    items = uploadable_items(algorithm, federation)
    if isinstance(privacy.clip, dict):
        for item in privacy.clip:
            if item not in algorithm.uploads:
                raise UserError(
                    f"privacy.clip: {name} uploads no '{item}'{suggest_or_list(item, algorithm.uploads)}"
                )
    if privacy.votes and (
        federation.task.kind != "multiclass" or not any(spec.says for spec in items.values())
    ):
        raise UserError(
            f"privacy.votes: algorithm.name: {name} sends no word on classes that exclude one another here"
        )
    for item, spec in items.items():
        if spec.ranks:
            raise UserError(
                f"{where}, but the shape of '{item}' of algorithm.name: {name} tells of its values"
            )
        if spec.use == "each" and privacy.unit == "client":
            raise UserError(
                f"{where}, but algorithm.name: {name} needs single uploads ('{item}'); noise is added to their sum. "
                "Take unit: local"
            )
    for kind in federation.client_infos.profiles:
        if kind.settings.share_every > 1:
            raise UserError(
                f"clients: {kind.first}: share_every: found {kind.settings.share_every}, with {where}; an update is measured "
                "from what was received in the same round"
            )
        part = shared_part(algorithm, kind.settings)
        sent = shareable_tensors(algorithm, kind.arch, federation.initial_tensors(kind.arch), part)
        if (
            any(spec.kind == "params" for spec in items.values())
            and set(sent) - kind.arch.parameter_names
        ):
            raise UserError(
                f"clients: {kind.first}: model: found {kind.arch.name}, whose BatchNorm statistics would be noised, with "
                f"{where}; take {group_norm_variant(kind.arch.name)}, or fedbn, where they stay"
            )
    _check_form(name, algorithm, federation, where)


@translate_user_errors()
def _check_form(name: str, algorithm: Algorithm, federation: FederationSpec, where: str) -> None:
    """Only floats can be noised, and parameters are to start from something."""
    expectations = ExpectedUploads(algorithm, federation)
    server = federation.server()
    algorithm.setup(server)
    for kind in federation.client_infos.profiles:
        card = federation.client_infos[kind.first]
        for item, sent in expectations.expected_items(
            card, call_broadcast(algorithm, server, card), 0
        ).items():
            whole = sent.values if isinstance(sent.values, dict) else {item: sent.values}
            if any(not t.is_floating_point() for t in whole.values()):
                raise UserError(
                    f"{where}, but '{item}' of algorithm.name: {name} holds whole numbers, to which no noise fits"
                )
            if sent.kind == "params" and not isinstance(sent.values, dict):
                raise UserError(
                    f"{where}, but '{item}' of algorithm.name: {name} is no change of what a client received"
                )


# Rules and attacks held against the method and the federation before anything is computed: what
# would have no effect, and rules that could not bear their liars, are refused in one line.

KEYS = {"rule": "parameters", "predictions": "predictions", "statistics": "class sums"}
DESCRIPTIONS = {"data": "labelled rows", "updates": "updates", "rows": "predictions"}


def single_upload_reason(config: Config) -> str | None:
    """The key, with its value, for whose sake the server has to see single uploads; None if sums will do."""
    for key in KEYS:
        if (value := getattr(config.aggregation, key)) != "mean":
            return f"aggregation.{key}: {value}"
    return None if config.attacks is None else f"attacks.name: {config.attacks.name}"


@dataclass
class DryRound:
    """A round without computing, by kind of client: what a client of each sends, and what the server asked for in one piece."""

    uploads: dict[str, Mapping[str, Item]]  # by the kind's first client
    combined: set[tuple[str, str]]
    ranks: bool  # whether something is sent as factors


def check_robustness(
    name: str, config: Config, algorithm: Algorithm, federation: FederationSpec
) -> list[str]:
    """Raises UserError for rules and attacks that cannot work here; returns lines that tell what is not covered."""
    key = single_upload_reason(config)
    if key is None:
        return []
    if federation.channel.secure_sum is not None:
        raise UserError(
            f"{key}: needs single uploads, but channel.secure_sum tells only their sum; leave one of them out"
        )
    _check_names(config, federation)
    if algorithm.needs.all_clients or not algorithm.uploads:
        raise UserError(
            f"{key}: {name} has no uploads that a federation would combine; take another algorithm.name"
        )
    held = _dry_round(algorithm, federation)
    notes = (
        []
        if config.aggregation.is_plain_mean
        else _check_rules(name, config, algorithm, federation, held)
    )
    return [*notes, *_check_attacks(name, federation, held)]


def _check_names(config: Config, federation: FederationSpec) -> None:
    found: list[tuple[str, str, type]] = []
    if config.aggregation.rule.startswith(OWN):
        found.append(("aggregation.rule", config.aggregation.rule, Rule))
    if config.aggregation.predictions.startswith(OWN):
        found.append(("aggregation.predictions", config.aggregation.predictions, PredictionRule))
    if config.attacks is not None and config.attacks.name.startswith(OWN):
        found.append(("attacks.name", config.attacks.name, Attack))
    for key, value, base in found:
        import_reference(value, key, base)


@translate_user_errors()
def _dry_round(algorithm: Algorithm, federation: FederationSpec) -> DryRound:
    """The first round in which everybody sends, with one client of each kind."""
    intervals = {kind.settings.share_every for kind in federation.client_infos.profiles}
    index = min(math.lcm(*intervals), federation.num_rounds) - 1
    server = federation.server()
    expectations = ExpectedUploads(algorithm, federation)
    server.round_context = federation.round_context(index)
    algorithm.setup(server)
    sent = {}
    uploads = []
    for kind in federation.client_infos.profiles:
        card = federation.client_infos[kind.first]
        sent[card.client_id] = expectations.expected_items(
            card, call_broadcast(algorithm, server, card), index
        )
        uploads.append(Upload(card, Payload(dict(sent[card.client_id]))))
    round = Uploads(uploads, algorithm.uploads, federation.common)
    run_plan(algorithm.aggregate(server, round), server, expectations.backend)
    return DryRound(sent, round.combined, any(spec.ranks for spec in algorithm.uploads.values()))


# Rules ---------------------------------------------------------------------------------------------------------------
def _check_rules(
    name: str, config: Config, algorithm: Algorithm, federation: FederationSpec, dry_round: DryRound
) -> list[str]:
    terms = config.aggregation
    kinds = {"rule": "models", "predictions": "rows", "statistics": "class_sums"}
    asked = {
        key: sorted(n for n, how in dry_round.combined if how == kind)
        for key, kind in kinds.items()
    }
    values = {key: str(getattr(terms, key)) for key in KEYS}
    summed = {n for n, how in dry_round.combined if how == "counts"}
    for key, items in asked.items():
        if values[key] != "mean" and not items:
            raise UserError(
                f"aggregation.{key}: found '{values[key]}', but {name} combines no {KEYS[key]} that clients send here; "
                "leave it at 'mean'"
            )
    apart = [n for n, how in dry_round.combined if how in PARAMETERS]
    if terms.rule != "mean" and apart:
        raise UserError(
            f"aggregation.rule: found '{terms.rule}', but {name} averages '{apart[0]}' apart from its model"
        )
    if (
        terms.predictions != "mean"
        and prediction_rule[terms.predictions].exclusive
        and federation.task.kind != "multiclass"
    ):
        raise UserError(
            f"aggregation.predictions: {terms.predictions} is for classes that exclude one another, but data.name has a "
            f"{federation.task.kind} task"
        )
    if terms.rule != "mean" and rule[terms.rule].uses_root:
        _check_root(terms, algorithm, federation, asked["rule"])
    hows: dict[str, Rule | PredictionRule] = {}
    if terms.rule != "mean":
        hows["rule"] = rule[terms.rule](terms)
    if terms.predictions != "mean":
        hows["predictions"] = prediction_rule[terms.predictions](terms)
    if terms.statistics != "mean":
        hows["statistics"] = Rule(terms)  # the median's needs
    for count in _cohorts(config, federation):
        for key, how in hows.items():
            for item in asked[key]:
                for who, senders in _owners(item, key, dry_round, count, algorithm, federation):
                    _check_tolerance(f"aggregation.{key}: {values[key]}", how, terms, who, senders)
    return [
        f"aggregation.{key} is mean: a liar among the senders of {', '.join(items)} is not held back"
        for key, items in asked.items()
        if items and values[key] == "mean"
    ] + [
        f"{item} are summed as they are told: a liar's are not held back" for item in sorted(summed)
    ]


def _check_root(
    terms: AggregationConfig, algorithm: Algorithm, federation: FederationSpec, items: list[str]
) -> None:
    """The server's own update is made of whole models on the proxy set."""
    where = f"aggregation.rule: {terms.rule}"
    cards = [federation.client_infos[kind.first] for kind in federation.client_infos.profiles]
    if not all(card.has_proxy for card in cards):
        raise UserError(
            f"{where} compares with what the server makes of the proxy set; found data.proxy.size 0, or a client without"
        )
    whole = all(
        shared_part(algorithm, c.settings) is None
        and download_part(algorithm, c.settings, 0) is None
        for c in cards
    )
    if (
        items != ["model"]
        or not whole
        or federation.common
        or any(c.arch.group_id != c.arch.spec_id for c in cards)
    ):
        raise UserError(
            f"{where} is for whole models averaged by architecture; take another rule, or FedAvg, Hybrid"
        )


def _cohorts(config: Config, federation: FederationSpec) -> Iterator[Counter[str]]:
    """Of every round's cohort that is unlike the ones before, how many are of each kind (by its first client)."""
    seen: set[frozenset[tuple[str, int]]] = set()
    per_round = config.clients.per_round
    for index in range(federation.num_rounds if per_round is not None else 1):
        count = Counter(
            federation.client_infos.profile(id).first
            for id in sample_cohort(federation, per_round, index)
        )
        if (mark := frozenset(count.items())) not in seen:
            seen.add(mark)
            yield count


def _owners(
    item: str,
    key: str,
    dry_round: DryRound,
    count: Counter[str],
    algorithm: Algorithm,
    federation: FederationSpec,
) -> Iterator[tuple[str, int]]:
    """How many of a cohort send an item, or for models each block of it; with words for whose it is."""
    senders = [first for first in dry_round.uploads if item in dry_round.uploads[first]]
    if key != "rule":
        spec = algorithm.uploads.get(item)
        # predictions that the server makes of models are voices, too
        made = spec is not None and spec.use == "each"
        yield item, sum(count[first] for first in (dry_round.uploads if made else senders))
        return
    cards = [federation.client_infos[first] for first in senders]
    models = RobustModelMeans(
        item, AggregationRules(federation.aggregation, federation.task), cards, federation.common
    )
    for first, card in zip(senders, cards, strict=True):
        values = dry_round.uploads[first][item].values
        across = algorithm.uploads[item].across
        models.add(
            "" if across else card.arch.spec_id, values if isinstance(values, dict) else {}, 1.0
        )
    for (group, places), owners in models.blocks().items():
        if total := sum(count[senders[place]] for place in places):
            yield f"{owners[0][0]} of {group}" if group else owners[0][0], total


def _check_tolerance(
    key: str, rule: Rule | PredictionRule, terms: AggregationConfig, description: str, senders: int
) -> None:
    liars = terms.num_malicious(senders)
    if senders < (least := rule.min_clients(liars)):
        most = max((f for f in range(senders) if rule.min_clients(f) <= senders), default=0)
        help = "give a model to more clients, or leave the rule out"
        if most:
            help = f"aggregation.liars may be {most} at most"
        raise UserError(
            f"{key} bears {liars} liar{'s' if liars != 1 else ''} (aggregation.liars: {terms.liars:g}) among {least} clients or "
            f"more, but {senders} send {description}; {help}"
        )


# Attacks -------------------------------------------------------------------------------------------------------------
def _check_attacks(name: str, federation: FederationSpec, dry_round: DryRound) -> list[str]:
    liars = federation.malicious
    task = federation.task
    if liars is None:
        return []
    config = liars.config
    acts_on = liars.attack.acts_on
    where = f"attacks.name: {config.name}"
    items = [item for sent in dry_round.uploads.values() for item in sent.values()]
    rows = [
        i
        for i in items
        if i.kind == "rows" and isinstance(i.values, Tensor) and i.values.is_floating_point()
    ]
    updates = [i for i in items if i.kind in ("params", "update", "class_sums")]
    there = {"data": True, "rows": bool(rows), "updates": bool(updates)}
    if acts_on and not any(there[what] for what in acts_on):
        raise UserError(
            f"{where} acts on {' and '.join(DESCRIPTIONS[w] for w in sorted(acts_on))}, of which {name} sends none here"
        )
    if "updates" in acts_on and dry_round.ranks:
        raise UserError(
            f"{where}: {name} sends factors of updates, which it cannot forge; take label_flip"
        )
    if "data" in acts_on and task.kind == "regression":
        raise UserError(f"{where} is for classes, but data.name has a regression task")
    if liars.has_trigger and task.kind != "multiclass":
        raise UserError(
            f"{where} is for classes that exclude one another, but data.name has a {task.kind} task"
        )
    if liars.has_trigger and any(
        len(kind.arch.input_shape) != 3 for kind in federation.client_infos.profiles
    ):
        raise UserError(
            f"{where} stamps images, but examples of data.name are none to every client"
        )
    if config.from_round > federation.num_rounds:
        raise UserError(
            f"attacks.from_round: found {config.from_round}, but the run ends with round {federation.num_rounds}: nobody would lie"
        )
    sides = (
        [side for kind in federation.client_infos.profiles for side in kind.arch.input_shape[1:]]
        if liars.has_trigger
        else []
    )
    if sides and config.trigger > min(sides):
        raise UserError(
            f"attacks.trigger: found {config.trigger}, but images have sides of {min(sides)} pixels"
        )
    classes = [config.target, *(config.pairs or {}), *(config.pairs or {}).values()]
    if task.kind == "multiclass" and max(classes) >= task.outputs:
        key = "target" if config.target >= task.outputs else "pairs"
        raise UserError(
            f"attacks.{key}: found class {max(classes)}, but there are {task.outputs}, from 0"
        )
    listed = liars.sorted_ids
    shown = ", ".join(listed[:6]) + (f" and {len(listed) - 6:,} more" if len(listed) > 6 else "")
    return [
        f"{len(listed):,} of {len(federation.client_infos):,} clients lie ({config.name}, from round {config.from_round}): {shown}; all "
        "figures are means over the honest"
    ]
