"""Slips in a method of one's own: each is one line that says where, what, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hetero_fl.algorithms import FedAvg
from hetero_fl.errors import UserError
from hetero_fl.plan import Fit, Predict, Rows
from hetero_fl.runtime.rounds import Rounds
from tests.small import config, rounds_of


def own(**hooks: Callable[..., Any]) -> Rounds:
    """A federation with a FedAvg of which some hooks are the author's."""
    rounds = rounds_of(config("fedavg", "mlp"), held=0)
    method = type("Mine", (FedAvg,), hooks)()
    rounds.algorithm = rounds.site.algorithm = rounds.expectations.algorithm = method
    return rounds


def line_of(function: Callable[..., Any], below: int) -> str:
    return f"({__file__}, line {function.__code__.co_firstlineno + below})"


def fit_forgotten(self: Any, client: Any, got: Any) -> Any:
    yield from self.deploy(client, got)
    self.fit(client)
    return self.share(client)


def fit_spelt_out(self: Any, client: Any, got: Any) -> Any:
    yield from self.deploy(client, got)
    replace(self.fit(client), epochs=1)
    return self.share(client)


def sub_plan_forgotten(self: Any, client: Any, got: Any) -> Any:
    self.deploy(client, got)
    yield self.fit(client)
    return self.share(client)


def super_forgotten(self: Any, client: Any, got: Any) -> Any:
    yield self.fit(client)
    FedAvg.train(self, client, got)
    return self.share(client)


@pytest.mark.parametrize(
    ("train", "below", "what"),
    [
        (fit_forgotten, 2, "a Fit is made but never yielded, so nothing is computed; write `yield …`"),
        (fit_spelt_out, 2, "a Fit is made but never yielded"),
        (
            sub_plan_forgotten,
            1,
            "the plan deploy(…) is made but never yielded, so nothing is computed; write `yield from",
        ),
        (super_forgotten, 2, "the plan train(…) is made"),
    ],
)
def test_a_step_or_plan_that_is_made_and_not_yielded(train: Callable[..., Any], below: int, what: str) -> None:
    with pytest.raises(UserError) as error:
        own(train=train).round()
    assert str(error.value).startswith(f"Mine.{train.__name__} {line_of(train, below)}: {what}")


def test_the_servers_plan_and_a_helper_are_watched_too() -> None:
    def helper(server: Any) -> None:
        Fit({next(iter(server.models)): None}, None, Rows("proxy"))  # type: ignore[arg-type]

    def aggregate(self: Any, server: Any, uploads: Any) -> Any:
        yield from FedAvg.aggregate(self, server, uploads)
        helper(server)

    with pytest.raises(UserError, match=r"^helper \(.*test_slips\.py, line \d+\): a Fit is made"):
        own(aggregate=aggregate).round()


def test_steps_may_be_made_early_changed_in_a_list_or_elsewhere() -> None:
    elsewhere = Predict("model", Rows("proxy"))

    def train(self: Any, client: Any, got: Any) -> Any:
        later, plan = Predict("model"), self.deploy(client, got)
        yield from plan
        first = self.fit(client)
        yield replace(first, epochs=1)
        yield [later, elsewhere]
        return self.share(client)

    rounds = own(train=train)
    assert rounds.round()["failed"] == {}
    assert elsewhere.made is None and elsewhere == Predict("model", Rows("proxy"), made=None)


@pytest.mark.parametrize(
    ("yielded", "words"),
    [
        (lambda self, c, got: self.deploy(c, got), r"yields the plan deploy\(…\); write `yield from`"),
        (lambda self, c, got: {"model": None}, "yields dict, which is no step"),
        (lambda self, c, got: [self.fit(c), None], "yields NoneType, which is no step"),
    ],
)
def test_yielding_what_is_no_step(yielded: Callable[..., Any], words: str) -> None:
    def train(self: Any, client: Any, got: Any) -> Any:
        yield yielded(self, client, got)

    with pytest.raises(UserError, match=rf"^Mine\.train \(.*test_slips\.py, line \d+\): {words}"):
        own(train=train).round()
