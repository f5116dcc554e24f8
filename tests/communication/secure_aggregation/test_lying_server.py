"""A server that lies about dropouts, survivors and partners learns no upload."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from hetero_fl.communication.protocol import Message
from hetero_fl.communication.secure_aggregation import client
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.seeding import stream_key
from tests.support.cases import each_case
from tests.support.lying_server import LyingServer
from tests.support.secure_aggregation import Party


def threshold_of(count: int, chosen: int | None) -> dict[str, int]:
    return {} if chosen is None else {"threshold": chosen}


def few_partners(server: LyingServer, victim: int) -> tuple[dict, list[int]]:
    """Give the victim as few partners as it accepts, and everyone else all partners."""
    partners = {number: list(server.everyone) for number in server.everyone}
    least = server.party.protocol.threshold - 1
    mates = [number for number in server.everyone if number != victim][:least]
    return {**partners, victim: mates}, mates


def rotating_dropouts(server: LyingServer, victim: int, mates: list[int]) -> dict[int, list[int]]:
    """Tell each client that other partners of the victim dropped out, and that it survived."""
    count = len(server.everyone) - server.party.protocol.threshold
    survivors = {}
    for place, number in enumerate(server.everyone):
        gone = {mates[(place * count + step) % len(mates)] for step in range(count)}
        survivors[number] = [m for m in server.everyone if m not in gone or m == number]
    return survivors


def without_partners(server: LyingServer, victim: int, mates: list[int]) -> dict[int, list[int]]:
    """Tell everyone alike that partners of the victim dropped out."""
    count = len(server.everyone) - server.party.protocol.threshold
    stayed = [m for m in server.everyone if m not in mates[:count]]
    return {number: stayed for number in server.everyone if number in stayed}


STORIES = {"rotating": rotating_dropouts, "the same": without_partners}


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize(
    ("count", "chosen"),
    [(5, 3), (9, 5), (7, None), pytest.param(150, None, marks=pytest.mark.slow)],
)
def test_lies_about_partners_and_dropouts_reveal_no_upload(
    count: int, chosen: int | None, story: str
) -> None:
    server = LyingServer(Party(count, size=1, **threshold_of(count, chosen)))
    partners, mates = few_partners(server, 1)
    survivors = STORIES[story](server, 1, mates)

    for signed in (True, False):
        assert server.attack(partners, survivors, signed) == []
        assert server.attack(dict.fromkeys(server.everyone, server.everyone), survivors) == []


@each_case(("count", "chosen"), [(5, 3), (9, 5)])
def test_the_attack_works_without_signatures(
    count: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the attack itself: if clients do not check signatures, it reveals an upload."""
    monkeypatch.setattr(client, "check_signatures", lambda *_about: None)
    server = LyingServer(Party(count, size=1, threshold=chosen))
    partners, mates = few_partners(server, 1)

    assert server.attack(partners, rotating_dropouts(server, 1, mates), signed=False) == [1]


def test_round_is_summed_over_one_set_of_clients() -> None:
    """Training is reproducible, so the difference of two sums is an upload."""
    party = Party(5)
    total = party.run_round().total

    # A server that crashed may repeat the round.
    assert np.array_equal(party.run_round(again=True).total, total)
    for exchange in ("keys", "shares", "train"):
        with pytest.raises(RunFailedError, match="this round has been summed over other clients"):
            party.run_round({"site_5": exchange}, again=True)

    def unmask_as_another_round(_client: str, message: Message) -> Message:
        party.round_idx += message.kind == "unmask"
        return message

    with pytest.raises(RunFailedError, match="this round has been summed over other clients"):
        party.run_round({"site_5": "keys"}, down=unmask_as_another_round, again=True)
    for _ in range(client.KEPT_ROUNDS):
        assert len(party.run_round({"site_5": "keys"}).clients) == 4
    party.round_idx = 1
    with pytest.raises(RunFailedError, match="this round has been summed over other clients"):
        party.run_round({"site_5": "keys"}, again=True)


@pytest.mark.parametrize(
    ("count", "chosen", "combinations"),
    [
        (3, 2, 27),
        (3, None, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((4, None, 256), (5, None, 3125), (5, 3, 161_051))
        ),
    ],
)
def test_no_combination_of_survivors_reveals_an_upload(
    count: int, chosen: int | None, combinations: int
) -> None:
    server = LyingServer(Party(count, size=1, **threshold_of(count, chosen)))
    server.train(dict.fromkeys(server.everyone, server.everyone))
    sets = [
        set(them)
        for size in range(server.party.protocol.threshold, count + 1)
        for them in itertools.combinations(server.everyone, size)
    ]
    stories = list(itertools.product(*([s for s in sets if n in s] for n in server.everyone)))
    draw = random.Random(stream_key("stories", count))

    assert len(stories) == combinations
    for story in stories if combinations < 4000 else draw.sample(stories, 3000):
        assert server.unmask(dict(zip(server.everyone, story, strict=True))) == []


@pytest.mark.parametrize(
    ("count", "variants"),
    [
        (6, 40),
        (7, 30),
        (9, 20),
        (12, 10),
        *(
            pytest.param(n, variants, marks=pytest.mark.slow)
            for n, variants in ((6, 350), (8, 250), (11, 200), (20, 80), (50, 17), (150, 3))
        ),
    ],
)
def test_random_lies_reveal_no_upload(count: int, variants: int) -> None:
    draw = random.Random(stream_key("lies", count, variants))
    server = LyingServer(Party(count, size=1, threshold=draw.choice([count // 2 + 1, 0.67])))
    threshold = server.party.protocol.threshold
    answered = 0

    for _ in range(variants):
        victim = draw.randint(1, count)
        partners = {number: list(server.everyone) for number in server.everyone}
        for number in (victim, *draw.sample(server.everyone, draw.choice([0, 0, 1, count]))):
            others = [m for m in server.everyone if m != number]
            partners[number] = draw.sample(others, draw.randint(threshold - 1, count - 1))
        survivors = {}
        common = draw.sample(server.everyone, draw.randint(threshold, count))
        for number in server.everyone:
            size = draw.randint(threshold, count)
            own = common if draw.random() < 0.7 else draw.sample(server.everyone, size)
            survivors[number] = {victim, *own} & {number, *partners[number]}
        assert server.attack(partners, survivors, signed=draw.random() < 0.7) == []
        answered += bool(server.seeds)
    assert answered > 0 or count > 9
