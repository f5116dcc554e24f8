"""The secure sum equals the plain sum of quantized items for any dropouts above the threshold."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.seeding import stream_key
from tests.support.cases import each_case
from tests.support.secure_aggregation import EXCHANGES, Party

STAYS = "stays"


def held_or_given_up(party: Party, leaves: dict[str, str]) -> bool:
    """Run the round, check its result, and return whether it produced a sum."""
    least = party.protocol.threshold
    present = {
        e: [c for c in party.clients if leaves.get(c, STAYS) not in EXCHANGES[: i + 1]]
        for i, e in enumerate(EXCHANGES)
    }
    short = [e for e in EXCHANGES if len(present[e]) < least]
    if short:
        with pytest.raises(RunFailedError, match=f"secure aggregation stopped at '{short[0]}'"):
            party.run_round(leaves)
        return False
    summed = party.run_round(leaves)
    assert summed.clients == present["train"]
    assert set(summed.dropouts) == set(party.clients) - set(present["train"])
    assert np.array_equal(summed.total, party.plain(present["train"]))
    return True


@pytest.mark.parametrize(
    "first", [STAYS, *(pytest.param(e, marks=pytest.mark.slow) for e in EXCHANGES)]
)
def test_every_dropout_pattern_of_four_clients(first: str) -> None:
    party, sums = Party(4), 0
    for others in itertools.product((*EXCHANGES, STAYS), repeat=3):
        sums += held_or_given_up(party, dict(zip(party.clients, (first, *others), strict=True)))
    # Threshold 3: no client leaves, or one in one of five exchanges.
    assert sums == (1 + 3 * 5 if first == STAYS else 1)


@pytest.mark.slow
@each_case(("count", "threshold"), [(5, 0.51), (6, 0.6)])
def test_every_number_of_dropouts_in_each_exchange(count: int, threshold: float) -> None:
    party, draw, sums = (
        Party(count, threshold=threshold),
        random.Random(stream_key("leaving", count)),
        0,
    )
    for at in itertools.combinations_with_replacement((*EXCHANGES, STAYS), count):
        who = draw.sample(party.clients, count)
        sums += held_or_given_up(party, dict(zip(who, at, strict=True)))
    assert sums > 10


@pytest.mark.slow
def test_random_dropouts_of_twenty_clients() -> None:
    party, draw = Party(20), random.Random(stream_key("twenty"))
    for leaving in (0, 1, 3, 6, 6, 6, 9):
        who = draw.sample(party.clients, leaving)
        held_or_given_up(party, {c: draw.choice(EXCHANGES) for c in who})


def test_masked_upload_is_uniform() -> None:
    """Compare bytes by chi-square over rounds of one upload: 400 is 6 sigma of 255 degrees."""
    party, seen, plain = Party(4, size=60), [], []
    for _ in range(40):
        party.seen.clear()
        party.run_round()
        (reply,) = [m for ask, client, m in party.seen if (ask, client) == ("train", "site_2")]
        seen.append(np.frombuffer(reply.body[-8 * party.layout(0).size :], np.uint8).reshape(-1, 8))
        plain.append(party.plain(["site_2"]).view(np.uint8).reshape(-1, 8))
    # Masks are new in each round.
    assert len({s.tobytes() for s in seen}) == 40

    def chi_square(data: np.ndarray) -> float:
        found, expected = np.bincount(data.ravel(), minlength=256), data.size / 256
        return float(((found - expected) ** 2 / expected).sum())

    # Including the high bytes of small numbers.
    for column in range(8):
        assert chi_square(np.concatenate(seen)[:, column]) < 400
        differences = seen[0][:, column] - seen[1][:, column]
        assert len(set(differences.tolist())) > 50
    # An unmasked vector fails the test.
    assert chi_square(np.concatenate(plain)[:, 7]) > 400


def test_client_with_out_of_range_value_is_dropped() -> None:
    party = Party(4, range=64)
    party.uploads["site_2"]["model"]["b"][0] = 1e4
    summed = party.run_round()
    assert summed.clients == ["site_1", "site_3", "site_4"]
    assert "channel.secure_sum.range: values must be <= 64, got 8750" in summed.dropouts["site_2"]
    assert np.array_equal(summed.total, party.plain(summed.clients))
