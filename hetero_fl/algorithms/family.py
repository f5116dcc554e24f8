"""Which family of widths a federation has: the wide model, and each client's share of its channels."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from hetero_fl.architecture import Architecture
from hetero_fl.config.clients import ModelConfig
from hetero_fl.errors import UserError, nearest
from hetero_fl.order import in_order, natural
from hetero_fl.state import Card, Roster
from model_zoo import can_narrow, share_of

NARROWEST = 1 / 16  # as in Diao et al. 2021
LISTED = 1000  # clients, above which nobody's width is written down by id
WIDE = {  # by the number of dimensions; 0: tokens
    0: ModelConfig(name="text_cnn"),
    1: ModelConfig(name="mlp", hidden=[64]),
    2: ModelConfig(name="mlp", hidden=[64]),
    3: ModelConfig(name="cnn_gn_medium"),
}


def choose_model(cards: Roster) -> ModelConfig:
    """The widest of the kind that most clients run, of the kinds that can be narrowed; the wider kind of equals.

    A model and its narrower copies are one kind. Where no client runs any such, one that suits the examples.
    """
    members = Counter[Architecture]()
    for kind in sorted(cards.kinds, key=lambda kind: natural(kind.first)):
        if can_narrow(kind.arch.name):
            members[kind.arch] += kind.count
    if not members:
        example = cards.kinds[0].arch
        return WIDE[0 if example.vocabulary else len(example.input_shape)]
    widest = {a: sum(n for other, n in members.items() if _share(other, a) is not None) for a in members}
    wide = max(widest, key=lambda a: (widest[a], numbers(a)))
    return ModelConfig(name=wide.name, feature_dim=wide.feature_dim, **dict(wide.options))


def choose_widths(
    given: Mapping[str, float] | Sequence[float] | None, model: ModelConfig, cards: Roster
) -> dict[str, float] | None:
    """Each client's share of the wide model's channels, by id; None where there are more than LISTED and their own models say
    it. Raises UserError for shares that do not fit.

    Not given: as `derived` of the client's own model.
    """
    if not can_narrow(model.name):
        raise UserError(f"algorithm.model: {model.name} has no narrower copies; take mlp, tabular, a cnn or a resnet")
    if len(cards) > LISTED:
        if given is not None:
            raise UserError(
                f"algorithm.widths: found {len(cards):,} clients; by id or in turn they are for up to {LISTED:,}. Leave it "
                "out, and give the groups models of these widths"
            )
        widest = max(cards.kinds, key=lambda kind: derived(kind.arch, model))
        _check_whole(model, derived(widest.arch, model))
        return None
    ids = in_order(cards)
    if given is None:
        widths = {id: derived(cards[id].arch, model) for id in ids}
    elif isinstance(given, Mapping):
        for pattern in given:
            if not any(fnmatchcase(id, pattern) for id in ids):
                raise UserError(f"algorithm.widths: no client is called '{pattern}'{nearest(pattern, ids)}")
        matched = {id: [w for pattern, w in given.items() if fnmatchcase(id, pattern)] for id in ids}
        if missing := [id for id in ids if not matched[id]]:
            raise UserError(f"algorithm.widths: none is given for {missing[0]}; `'*': 1` stands for everybody else")
        widths = {id: matched[id][0] for id in ids}
    else:
        if not given:
            raise UserError("algorithm.widths: found no number; give shares of the width, such as [1, 0.5, 0.25]")
        widths = {id: given[i % len(given)] for i, id in enumerate(ids)}
    for id, width in widths.items():
        if not 0 < width <= 1:
            raise UserError(f"algorithm.widths: {id}: found {width:g}; a share of the width is above 0 and at most 1")
    _check_whole(model, max(widths.values()))
    return widths


def told(model: ModelConfig, widths: Mapping[str, float] | None, cards: Roster) -> list[str]:
    """A line on who trains what."""
    listed: dict[float, str] = {}
    if widths is None:
        kinds = defaultdict(list)
        for kind in cards.kinds:
            kinds[derived(kind.arch, model)].append(kind)
        listed = {width: cards.named(mine, 4) for width, mine in kinds.items()}
    else:
        members = defaultdict(list)
        for id, width in widths.items():
            members[width].append(id)
        for width, ids in members.items():
            listed[width] = ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
    parts = [f"{'all' if w == 1 else f'{w:g}'} of it for {listed[w]}" for w in sorted(listed, reverse=True)]
    return [f"algorithm.model is {model.name}, in place of clients' own models: {'; '.join(parts)}"]


def slice_name(card: Card, wide: Architecture, widths: Mapping[str, float] | Sequence[float] | None) -> str:
    """What a client trains, for a reader: the wide model's name, with the share of its channels where that is written down."""
    if card.arch == wide:
        return wide.name
    return f"{wide.name} at {widths[card.id]:.3g}" if isinstance(widths, Mapping) else f"slice of {wide.name}"


def derived(arch: Architecture, model: ModelConfig) -> float:
    """A client's share by its own model: that of a narrower copy of the wide one; of another the power of two nearest to the
    root of its part of the wide model's parameters, which grow with the square of the width.
    """
    sizes = (arch.outputs, arch.input_shape, model.feature_dim)
    wide = Architecture.of(model.name, *sizes, model.options, vocabulary=arch.vocabulary)
    share = _share(arch, wide)
    if share is not None:
        return share
    level = round(math.log2(numbers(arch) / numbers(wide)) / 2)
    return max(NARROWEST, 2.0 ** min(0, level))


def numbers(arch: Architecture) -> int:
    """How many trainable numbers a model has."""
    return sum(math.prod(shape) for name, shape in arch.shapes.items() if name in arch.parameter_names)


def _share(arch: Architecture, wide: Architecture) -> float | None:
    if arch.feature_dim != wide.feature_dim:
        return None
    return share_of(arch.name, dict(arch.options), wide.name, dict(wide.options))


def _check_whole(model: ModelConfig, widest: float) -> None:
    if widest < 1:
        raise UserError(
            f"algorithm.widths: nobody has the whole of {model.name}, the widest has {widest:g} of it; "
            "give a client width 1, or name a narrower algorithm.model"
        )
