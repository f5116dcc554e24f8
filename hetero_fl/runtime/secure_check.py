"""What cannot be summed in secret, refused before anything is computed; and what a sum would tell all the same, said."""

from __future__ import annotations

from collections import Counter

from hetero_fl.algorithms import Algorithm
from hetero_fl.channel.secure.graph import degree
from hetero_fl.channel.secure.layout import Layout, Place
from hetero_fl.config.secure import SecureSumConfig
from hetero_fl.errors import UserError
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.secure import Derived

ROUNDING = ("quantize", "half")  # stages that change numbers only
FEWEST = 3  # clients: of a sum of two, each knows the other's part
KEY = "channel.secure_sum"


def check_secure_sum(name: str, algorithm: Algorithm, federation: Federation) -> list[str]:
    """Raises UserError for what is impossible; returns lines on what is possible but perhaps not meant."""
    config, cohort = federation.channel.secure_sum, federation.cohort
    if config is None or not algorithm.uploads:
        return []
    if single := [item for item, spec in algorithm.uploads.items() if spec.use == "each"]:
        raise UserError(
            f"algorithm.name: {name} needs single uploads ({', '.join(single)}), but {KEY} tells only their sum; take a method "
            "that needs no more, such as hybrid, fedmd, fedavg or fedproto, or leave the key out"
        )
    if cut := [stage.name for stage in federation.channel.compress if stage.name not in ROUNDING]:
        raise UserError(
            f"channel.compress: found {cut[0]}, but {KEY} adds whole vectors, in which nothing is left out; take "
            f"{' or '.join(ROUNDING)}, or leave one of the keys out"
        )
    if cohort < FEWEST:
        many = f"{cohort} client{'s' if cohort != 1 else ''}"
        raise UserError(f"{KEY}: found {many} in a round; a sum hides a part of it among {FEWEST} or more")
    _check_threshold(config, cohort)
    _check_range(config, cohort)
    needed = degree(cohort, config.survivors(cohort))
    notes = []
    if config.neighbours is not None and config.neighbours < needed:
        notes.append(
            f"{KEY}.neighbours: {config.neighbours} are fewer than the {needed} that keep an upload hidden though a fifth "
            "of all clients tell the server what they know"
        )
    if federation.channel.compress:
        notes.append(f"channel.compress rounds what clients add up; under {KEY} it makes no message shorter")
    return [*notes, *_alone(algorithm, federation)]


def _check_threshold(config: SecureSumConfig, cohort: int) -> None:
    least = config.survivors(cohort)
    if least > cohort:
        raise UserError(f"{KEY}.threshold: found {least}, but a round has {cohort} clients (clients.per_round)")
    if 2 * least <= cohort:
        raise UserError(
            f"{KEY}.threshold: found {least}, which is not more than half of the {cohort} clients of a round; choose "
            f"{cohort // 2 + 1} or more"
        )


def _check_range(config: SecureSumConfig, cohort: int) -> None:
    most = config.most_bits(cohort)
    if most < 1:
        raise UserError(f"{KEY}.range: found {config.range:g}; sums over {cohort} clients leave 64-bit integers")
    if config.bits(cohort) > most:
        raise UserError(
            f"{KEY}.fraction_bits: found {config.bits(cohort)}; with {KEY}.range {config.range:g} sums over {cohort} clients "
            f"leave 64-bit integers, choose {most} or fewer"
        )


def _alone(algorithm: Algorithm, federation: Federation) -> list[str]:
    """The clients of which a sum holds something that no other client sends: it tells that as it is."""
    derived, owners = Derived(algorithm, federation), Counter[Place]()
    layout, sent = Layout(derived.expectations.protection.specs, federation.common), []
    for kind in federation.cards.kinds:
        form = derived.form(kind.first, kind.settings.share_every - 1)  # a round in which it shares
        sent.append((kind, layout.places(kind.arch.id, form)))
        owners.update(dict.fromkeys(sent[-1][1], kind.count))
    alone = [kind for kind, places in sent if any(owners[place] == 1 for place in places)]
    who = f"for {federation.cards.named(alone)}: nobody else sends such tensors, and their sum is what the client has"
    return [f"{KEY} hides nothing of some items {who}"] if alone else []
