"""A server killed in the middle of rounds resumes to the same bits.

Bytes are counted once for each task of the committed rounds; repeated messages are not counted.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from hetero_fl.deployment.node_storage import MAX_STATES, NodeStorage, StateLostError
from hetero_fl.deployment.transport import Envelope
from hetero_fl.experiment import run
from tests.support.federations import MIXED, TOP, config
from tests.support.nodes import (
    Clock,
    RecordingTransport,
    ServerKilledError,
    Sites,
    federation,
    records,
    same,
)

CLIENTS = ["site_1", "site_2", "site_3"]
KINDS: dict[str, dict[str, Any]] = {
    "hybrid": config("hybrid", MIXED, rounds=3, channel=TOP, algorithm__heads="keep"),
    "fedavg": config("fedavg", rounds=3, clients__per_round=2),
    "changes down": config(
        "fedavg", rounds=3, channel={"compress_down": [{"topk": 0.2}, {"quantize": 6}]}
    ),
    "secure sum": config("fedper", rounds=3, channel={"secure_sum": {"threshold": 2}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_server_killed_at_any_message_resumes_bit_identically(kind: str, tmp_path: Path) -> None:
    run_config, draw = KINDS[kind], random.Random(kind)
    sites = Sites(CLIENTS, tmp_path / "sites")
    # 9 messages until all are ready; then 3 to 12 a round, and 3 to read
    crashes = [11, *(9 + draw.randint(1, 14) for _ in range(3))]
    same(
        federation(run_config, sites, tmp_path / "deployed", crashes),
        run(run_config, out=tmp_path / "simulated"),
    )


@pytest.mark.slow
def test_fallback_checkpoint_finds_its_client_states(tmp_path: Path) -> None:
    run_config = KINDS["hybrid"]
    sites = Sites(CLIENTS, tmp_path / "sites")
    out = tmp_path / "deployed"

    def crash(record: dict[str, Any]) -> None:
        if record["round"] == 2:
            newest = out / "checkpoint" / "round-000002.ckpt"
            newest.write_bytes(newest.read_bytes()[:-1])
            sites.transport.last = 0
            raise ServerKilledError

    with pytest.raises(ServerKilledError):
        federation(run_config, sites, out, callbacks=[crash])
    sites = Sites(CLIENTS, tmp_path / "sites")
    deployed = federation(run_config, sites, out)
    assert "damaged" in (out / "log.txt").read_text() and not any(
        "anew" in record  # style: ok (file key)
        for record in records(deployed)  # style: ok (file key)
    )
    same(deployed, run(run_config, out=tmp_path / "simulated"))


@pytest.mark.parametrize("kind", ["hybrid", "changes down"])
def test_client_with_lost_state_is_reset_and_counted(kind: str, tmp_path: Path) -> None:
    sites = Sites(CLIENTS, tmp_path / "sites")

    def delete_states(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            for file in (tmp_path / "sites" / "site_2").rglob("state-*"):
                file.unlink()

    deployed = federation(KINDS[kind], sites, tmp_path / "deployed", callbacks=[delete_states])
    reset = [record.get("anew") for record in records(deployed)]  # style: ok (file key)
    assert reset == [None, ["site_2"], None]
    assert all(record["counts"]["arrived"] == 3 for record in records(deployed))


def test_resumed_server_continues_without_lost_nodes(tmp_path: Path, clock: Clock) -> None:
    run_config, sites = KINDS["fedavg"], Sites(CLIENTS, tmp_path / "sites")
    run_config = {**run_config, "output": {**run_config["output"], "best_models": False}}
    # all are ready, a round and its reading, and one task of the next
    sites.transport.last = 9 + 2 + 3 + 1
    with pytest.raises(ServerKilledError):
        federation(run_config, sites, tmp_path / "deployed", closing=False)
    sites.stop("site_3")
    back = [lambda record: sites.start("site_3") if record["round"] == 2 else None]
    deployed = records(
        federation(run_config, sites, tmp_path / "deployed", log=clock.after(2, []), callbacks=back)
    )
    assert [record.get("unread") for record in deployed] == [
        None,
        {"site_3": "its node is not connected"},
        None,
    ]


@pytest.mark.slow
def test_nodes_keep_states_of_the_newest_checkpoints(tmp_path: Path) -> None:
    """From the second round on, these are the states of the two newest checkpoints."""
    transport = RecordingTransport()
    federation(
        KINDS["hybrid"],
        Sites(CLIENTS, tmp_path / "sites", transport=transport),
        tmp_path / "deployed",
    )
    for node in {node for node, _ in transport.tasks}:
        heads = [envelope.head for to, envelope in transport.tasks if to == node]
        bases = [str(head["base"]) for head in heads]
        assert bases[0] == "" and len(set(bases)) == 3
        assert [set(str(head["spare"]).split(",")) for head in heads] == [
            {""},
            {bases[1]},
            {bases[1], bases[2]},
        ]


@pytest.mark.slow
def test_number_of_kept_states_is_limited(tmp_path: Path) -> None:
    """Without the limit, a server could fill a node's disk."""
    every: dict[str, list[str]] = {}

    class Greedy(RecordingTransport):
        def push(self, node: int, envelope: Envelope, within: float) -> str:
            if envelope.head["ask"] == "do":
                known = every.setdefault(str(node), [])
                known.append(str(envelope.head["base"]))
                envelope = Envelope({**envelope.head, "spare": ",".join(known)}, envelope.body)
            return super().push(node, envelope, within)

    run_config = {
        **KINDS["hybrid"],
        "rounds": 3 * MAX_STATES,
        "evaluation": {"every": 3 * MAX_STATES},
    }
    federation(
        run_config, Sites(CLIENTS, tmp_path / "sites", transport=Greedy()), tmp_path / "deployed"
    )
    (folder,) = (tmp_path / "sites" / "site_1" / "runs").iterdir()
    assert len(list(folder.glob("state-*"))) <= 2 * MAX_STATES


def test_states_named_by_checkpoints_are_kept(tmp_path: Path) -> None:
    storage = NodeStorage(tmp_path)
    first = storage.save_state(b"first")
    names = [storage.save_state(bytes([i]), protected=[first]) for i in range(2 * MAX_STATES)]
    assert storage.load_state(first) == b"first" and storage.load_state(
        names[-MAX_STATES]
    ) == bytes([MAX_STATES])
    with pytest.raises(StateLostError, match="is missing or damaged"):
        storage.load_state(names[0])
    for i in range(MAX_STATES):
        storage.save_state(bytes([i]))
    with pytest.raises(StateLostError):
        storage.load_state(first)
