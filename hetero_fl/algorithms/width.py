"""Methods that compare or exchange features: all clients need features of one width."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import ClassVar

from pydantic import Field, PositiveInt

from hetero_fl.algorithms.base import Algorithm
from hetero_fl.architecture import Architecture
from hetero_fl.errors import UserError
from hetero_fl.state import Card, Roster


class CommonWidth(Algorithm):
    """A model whose features have another width ends in a projection to the common one; the others are as they were."""

    requires = ("one feature width",)
    features_leave: ClassVar[bool] = True  # the clients', row by row or as means of classes

    feature_dim: PositiveInt | None = Field(
        None, description="common width of the features; none: the most frequent of the clients', the widest of equals"
    )

    def resolve(self, cards: Roster) -> tuple[Algorithm, list[str]]:
        widths = Counter[int]()
        for kind in cards.kinds:
            widths[kind.arch.width] += kind.count
        width = self.feature_dim or max(widths, key=lambda w: (widths[w], w))
        for kind in cards.kinds if self.features_leave else []:
            need_features(kind.first, kind.arch, width)
        other = [kind for kind in cards.kinds if kind.arch.width != width]
        listed = cards.named(other)
        notes = [f"algorithm.feature_dim is {width}: the models of {listed} end in a projection to it"] if other else []
        return self.model_copy(update={"feature_dim": width}), notes

    def architecture(self, card: Card) -> Architecture:
        return card.arch if card.arch.width == self.feature_dim else replace(card.arch, feature_dim=self.feature_dim)


class CommonHead(CommonWidth):
    """Features of one width, and heads that fit one another: each a single linear layer."""

    requires = ("linear heads",)

    def resolve(self, cards: Roster) -> tuple[Algorithm, list[str]]:
        for kind in cards.kinds:
            need_linear_head(kind.first, kind.arch)
        return super().resolve(cards)


def need_features(id: str, arch: Architecture, width: int) -> None:
    """Raises UserError for a model whose features are the example itself: sent, they would be the client's data."""
    if arch.width == width and not any(name.startswith("backbone.") for name in arch.parameter_names):
        raise UserError(
            f"clients: {id}: model: the features of '{arch.name}' are the example itself, and this method sends features; "
            "choose one that learns its own, such as mlp, or set algorithm.feature_dim to another width"
        )


def need_linear_head(id: str, arch: Architecture) -> None:
    """Raises UserError for a model whose head is anything but a linear layer with a bias."""
    head = sorted(n for n in arch.parameter_names if n.startswith("head."))
    if head != ["head.bias", "head.weight"]:
        found = ", ".join(head) or "no parameters"
        raise UserError(f"clients: {id}: model: its head has {found}; this method needs a linear layer with a bias")
