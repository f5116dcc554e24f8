"""Nodes killed in each exchange of a round come back to the same bits, or miss one round's sum."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hetero_fl.experiment import run
from tests.support.federations import MIXED, TOP, config
from tests.support.nodes import LONG, Point, Sites, federation, records, same

CLIENTS = ["site_1", "site_2", "site_3", "site_4"]
EXCHANGES = ["keys", "shares", "train", "consistency", "unmask"]


def hybrid(rounds: int) -> dict[str, Any]:
    """Configure private heads, and residuals of what a round did not send."""
    return config("hybrid", MIXED, clients=4, rounds=rounds, channel=TOP, algorithm__heads="keep")


def secret(rounds: int) -> dict[str, Any]:
    """Configure private heads, which exchanges before and after training must not change."""
    return config("fedper", clients=4, rounds=rounds, channel={"secure_sum": {"threshold": 3}})


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 1.0], ids=["at once", "after a while"])
def test_killed_nodes_do_not_change_results(
    tmp_path: Path,
    trained: Counter[tuple[str, int]],
    delay: float,
) -> None:
    kills: dict[Point, str] = {
        ("site_1", 0, "train"): "before",
        ("site_2", 1, "train"): "during",
        ("site_3", 2, "train"): "after",
        ("site_4", 2, "read"): "before",
    }
    sites = Sites(CLIENTS, tmp_path / "sites", kills, delay)
    deployed = federation(hybrid(4), sites, tmp_path / "deployed", patience=30.0)
    assert not sites.kills
    counted, simulated = dict(trained), run(hybrid(4), out=tmp_path / "simulated")
    same(deployed, simulated)
    twice = {("site_2", 1)}  # it had trained, and nothing of it had left the house
    assert counted == {(c, r): 1 + ((c, r) in twice) for c in CLIENTS for r in range(4)}
    assert all(
        record["counts"] == {"invited": 4, "arrived": 4, "failed": 0, "late": 0}
        for record in records(deployed)
    )


@pytest.mark.slow
def test_secure_sum_is_unchanged_by_restarts(tmp_path: Path) -> None:
    kills = {
        (f"site_{i % 4 + 1}", i, ask): ("before", "after")[i % 2] for i, ask in enumerate(EXCHANGES)
    }
    kills |= {
        (f"site_{4 - i % 4}", i + 5, ask): ("after", "before")[i % 2]
        for i, ask in enumerate(EXCHANGES)
    }
    sites = Sites(CLIENTS, tmp_path / "sites", kills)
    deployed = federation(secret(11), sites, tmp_path / "deployed", patience=30.0)
    assert not sites.kills
    same(deployed, run(secret(11), out=tmp_path / "simulated"))


@pytest.mark.slow
def test_secure_sum_excludes_node_killed_before_answering(tmp_path: Path) -> None:
    """The node cannot know if its answer was sent, so it gives no other."""
    kills = {(f"site_{i % 4 + 1}", i, ask): "during" for i, ask in enumerate(EXCHANGES)}
    sites = Sites(CLIENTS, tmp_path / "sites", kills)
    deployed = federation(secret(6), sites, tmp_path / "deployed", patience=30.0)
    counts = [(record["counts"]["arrived"], list(record["failed"])) for record in records(deployed)]
    # keys: drawn again, as no one has seen the first; then its vector is in the sum already
    assert counts == [(4, []), (3, ["site_2"]), (3, ["site_3"]), (4, []), (4, []), (4, [])]
    assert "out of order" in records(deployed)[1]["failed"]["site_2"]


@pytest.mark.slow
def test_lost_messages_are_resent_without_retraining(
    tmp_path: Path,
    trained: Counter[tuple[str, int]],
) -> None:
    kills = {
        ("site_1", 0, "train"): "unheard",
        ("site_2", 0, "train"): "lost",
        ("site_3", 1, "train"): "slow",
    }
    sites = Sites(CLIENTS, tmp_path / "sites", kills)
    deployed = federation(hybrid(2), sites, tmp_path / "deployed", patience=LONG)
    assert not sites.kills and set(trained.values()) == {1}
    assert (
        sites.request_counts["site_1", 0, "train"]
        == sites.request_counts["site_2", 0, "train"]
        == 2
    )
    assert sites.request_counts["site_3", 1, "train"] == 1  # it was there all the time
    same(deployed, run(hybrid(2), out=tmp_path / "simulated"))


@pytest.mark.slow
def test_secure_sum_survives_lost_answers(tmp_path: Path) -> None:
    kills = {(f"site_{i % 4 + 1}", i, ask): "lost" for i, ask in enumerate(EXCHANGES)}
    sites = Sites(CLIENTS, tmp_path / "sites", kills)
    deployed = federation(secret(5), sites, tmp_path / "deployed", patience=LONG)
    assert not sites.kills
    same(deployed, run(secret(5), out=tmp_path / "simulated"))
