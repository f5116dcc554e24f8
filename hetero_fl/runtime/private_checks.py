"""What cannot be had together with `privacy`, refused before anything is computed, in one line that names both keys."""

from __future__ import annotations

import torch

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.initial_phase import InitialPhase
from hetero_fl.architecture import Architecture
from hetero_fl.channel.privacy.accounting import opacus_accountants
from hetero_fl.config import Config
from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.errors import UserError, nearest
from hetero_fl.plan import Plan
from hetero_fl.runtime.dry import Expectations
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.hooks import broadcast, told
from hetero_fl.runtime.plans import carry_out
from hetero_fl.runtime.protection import travelling
from hetero_fl.runtime.robust import single_uploads
from hetero_fl.state import Participant
from model_zoo import is_batch_norm, model_options

PRIVACY = "privacy.unit"


def check_plan(config: Config) -> None:
    """Raises UserError for sections under which more would be spent, or sent, than `privacy` plans for."""
    privacy = config.privacy
    if privacy is None:
        return
    cohort, where = config.cohort, f"{PRIVACY}: found {privacy.unit}"
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
    if privacy.unit == "client" and (key := single_uploads(config)) is not None:
        raise UserError(f"{key}: cannot be had with {where}: noise is added to sums; take unit: record or local")
    if privacy.poisson_cohorts and config.channel.secure_sum is not None:
        raise UserError(
            "privacy.poisson_cohorts: cannot be had with channel.secure_sum, which is agreed on for cohorts of one size; leave "
            "one of them out"
        )
    if privacy.unit == "client" and config.channel.compress:
        raise UserError(
            f"channel.compress: found {config.channel.compress[0].name}, which changes uploads after they were bounded, with "
            f"{where}; take unit: record or local"
        )


def weak_delta(federation: Federation) -> list[str]:
    """A line where δ would allow to give one of those protected away as it is: to publish a random one costs δ = 1/n."""
    privacy = federation.privacy
    if privacy is None:
        return []
    rows = privacy.unit == "record"
    n = min(federation.cards[id].n for id in federation.some) if rows else len(federation.cards)
    if privacy.delta * n < 1:
        return []
    whose = f"the {n} training rows of the smallest client" if rows else f"{n} clients"
    return [f"privacy.delta: {privacy.delta:g} is not below one over {whose}: one of them may be given away whole"]


def check_privacy(name: str, algorithm: Algorithm, federation: Federation) -> None:
    """Raises UserError for what differential privacy cannot be given to."""
    privacy = federation.privacy
    if privacy is None:
        return
    if privacy.unit == "record" or privacy.accountant == "rdp" or privacy.poisson_cohorts:
        opacus_accountants()
    where = f"{PRIVACY}: found {privacy.unit}"
    if algorithm.everybody and not algorithm.uploads:
        raise UserError(f"{where}, but algorithm.name: {name} brings all private rows together in one place")
    for kind in federation.cards.kinds:
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
    items = travelling(algorithm, federation)
    for item, spec in items.items():
        if spec.kind == "rows" and spec.rows_of == "train":
            raise UserError(f"{where}, but algorithm.name: {name} sends '{item}' of every private row as it is")
    if privacy.unit == "record":
        _check_norms(algorithm, federation, where)
        _check_reading(name, algorithm, federation)
    else:
        _check_whole(name, algorithm, federation, where, privacy)


def _check_norms(algorithm: Algorithm, federation: Federation, where: str) -> None:
    """The gradient of one row under BatchNorm is a function of its whole batch."""
    seen: set[Architecture] = set()
    for kind in federation.cards.kinds:
        for slot, arch in {"model": kind.arch, **algorithm.extras(kind.arch)}.items():
            if arch not in seen and has_batch_norm(arch):
                key = f"clients: {kind.first}: model" if slot == "model" else f"algorithm.{slot}"
                raise UserError(
                    f"{key}: found {arch.name}, whose BatchNorm mixes the rows of a batch, with {where}; "
                    f"take {group_norm(arch.name)}"
                )
            seen.add(arch)


def has_batch_norm(arch: Architecture) -> bool:
    """Whether a model has BatchNorm anywhere."""
    with torch.random.fork_rng(devices=[]):
        return any(map(is_batch_norm, arch.build().modules()))


def group_norm(name: str) -> str:
    """The model with GroupNorm in place of a model's BatchNorm, as a configuration names it."""
    if "_bn_" in name:
        return name.replace("_bn_", "_gn_")
    if "norm" in model_options(name):
        return f"{{name: {name}, norm: group}}"
    return "{name: resnet18_small, norm: group}" if "resnet" in name else "cnn_gn_small"


@told()
def _check_reading(name: str, algorithm: Algorithm, federation: Federation) -> None:
    """Only training is noised and accounted: a deployed model that is made from private rows would be known in the clear."""
    expectations, server = Expectations(algorithm, federation), federation.server()
    algorithm.start(server)
    for kind in federation.cards.kinds:
        card = federation.cards[kind.first]
        client, got = expectations.stand_in(card, 0), broadcast(algorithm, server, card)
        for hook in (algorithm.deploy, algorithm.personalise):
            if _reads_rows(expectations, client, hook(client, got)):
                raise UserError(
                    f"{PRIVACY}: found record, but algorithm.name: {name} trains on private rows before a model is read, "
                    "which nothing accounts for"
                )
        try:
            expectations.rehearsed(card, got, 0)
        except UserError as error:
            raise UserError(f"{PRIVACY}: found record, but algorithm.name: {name} {error}") from None


def _reads_rows(expectations: Expectations, client: Participant, plan: Plan[None]) -> bool:
    tally = expectations.protection.tally(expectations.performer)
    assert tally is not None  # records are private
    carry_out(plan, client, tally)
    return bool(tally.charges[client.id])


def _check_whole(name: str, algorithm: Algorithm, federation: Federation, where: str, privacy: PrivacyConfig) -> None:
    """A client's whole upload is bounded: sums, in a form that tells nothing, from what it received the same round."""
    items = travelling(algorithm, federation)
    if isinstance(privacy.clip, dict):
        for item in privacy.clip:
            if item not in algorithm.uploads:
                raise UserError(f"privacy.clip: {name} uploads no '{item}'{nearest(item, algorithm.uploads)}")
    if privacy.votes and (federation.task.kind != "multiclass" or not any(spec.says for spec in items.values())):
        raise UserError(f"privacy.votes: algorithm.name: {name} sends no word on classes that exclude one another here")
    for item, spec in items.items():
        if spec.ranks:
            raise UserError(f"{where}, but the shape of '{item}' of algorithm.name: {name} tells of its values")
        if spec.use == "each" and privacy.unit == "client":
            raise UserError(
                f"{where}, but algorithm.name: {name} needs single uploads ('{item}'); noise is added to their sum. "
                "Take unit: local"
            )
    for kind in federation.cards.kinds:
        if kind.settings.share_every > 1:
            raise UserError(
                f"clients: {kind.first}: share_every: found {kind.settings.share_every}, with {where}; an update is measured "
                "from what was received in the same round"
            )
        sent = algorithm.portion(kind.arch, federation.initial(kind.arch), algorithm.part(kind.settings))
        if any(spec.kind == "params" for spec in items.values()) and set(sent) - kind.arch.parameter_names:
            raise UserError(
                f"clients: {kind.first}: model: found {kind.arch.name}, whose BatchNorm statistics would be noised, with "
                f"{where}; take {group_norm(kind.arch.name)}, or fedbn, where they stay"
            )
    _check_form(name, algorithm, federation, where)


@told()
def _check_form(name: str, algorithm: Algorithm, federation: Federation, where: str) -> None:
    """Only floats can be noised, and parameters are to start from something."""
    expectations, server = Expectations(algorithm, federation), federation.server()
    algorithm.start(server)
    for kind in federation.cards.kinds:
        card = federation.cards[kind.first]
        for item, sent in expectations.of(card, broadcast(algorithm, server, card), 0).items():
            whole = sent.values if isinstance(sent.values, dict) else {item: sent.values}
            if any(not t.is_floating_point() for t in whole.values()):
                raise UserError(
                    f"{where}, but '{item}' of algorithm.name: {name} holds whole numbers, to which no noise fits"
                )
            if sent.kind == "params" and not isinstance(sent.values, dict):
                raise UserError(
                    f"{where}, but '{item}' of algorithm.name: {name} is no change of what a client received"
                )
