"""Slow, absent, killed and returning nodes and servers: rounds go on and report them.

The bits after kills at random moments are tested in tests/contracts/test_kills.py.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hetero_fl.communication.named_arrays import decode_arrays
from hetero_fl.communication.secure_aggregation.client import REQUESTS
from hetero_fl.deployment import sites as server_sites
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.messages import RequestRefusedError
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.node_files import MAX_STATES, NodeStorage
from hetero_fl.deployment.transport import Envelope
from hetero_fl.experiment import run
from hetero_fl.federation.client_runtime import ClientRuntime
from hetero_fl.reporting.report import write_report
from tests.support.calls import record_calls
from tests.support.federations import MIXED, TOP, config
from tests.support.loopback import LoopbackTransport
from tests.support.nodes import (
    LONG,
    Clock,
    EventLines,
    Point,
    RecordingTransport,
    ServerKilledError,
    Sites,
    federation,
    records,
    same,
    until,
)

CLIENTS = ["site_1", "site_2", "site_3"]


EXCHANGES = ["keys", "shares", "train", "consistency", "unmask"]


@pytest.mark.slow
def test_secure_sum_excludes_node_killed_before_answering(tmp_path: Path) -> None:
    """The node cannot know if its answer was sent, so it gives no other."""
    clients = [*CLIENTS, "site_4"]
    kills = {(clients[i % 4], i, ask): "during" for i, ask in enumerate(EXCHANGES)}
    source = config("fedper", clients=4, rounds=6, channel={"secure_sum": {"threshold": 3}})
    sites = Sites(clients, tmp_path / "sites", kills)
    lines = records(federation(source, sites, tmp_path / "deployed", patience=30.0))
    counts = [(record["counts"]["arrived"], list(record["failed"])) for record in lines]
    # keys: drawn again, as no one has seen the first; then its vector is in the sum already
    assert counts == [(4, []), (3, ["site_2"]), (3, ["site_3"]), (4, []), (4, []), (4, [])]
    assert "out of order" in lines[1]["failed"]["site_2"]


@pytest.mark.slow
def test_lost_messages_are_resent_without_retraining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills: dict[Point, str] = {
        ("site_1", 0, "train"): "unheard",
        ("site_2", 0, "train"): "lost",
        ("site_3", 1, "train"): "slow",
        ("site_1", 1, "train"): "after",
        ("site_2", 2, "train"): "during",
    }
    sites = Sites(CLIENTS, tmp_path / "sites", kills)
    uploads = record_calls(
        monkeypatch,
        ClientRuntime,
        "_send",
        lambda _, client, upload, received, request, training: (
            client.participant_id,
            request.round_idx,
        ),
    )
    deployed = federation(KINDS["hybrid"], sites, tmp_path / "deployed", patience=LONG)
    assert not sites.kills
    # It had trained, and nothing of it had left the site.
    trained = Counter(uploads)
    assert trained.pop(("site_2", 2)) == 2 and set(trained.values()) == {1}
    requests = sites.request_counts
    assert requests["site_1", 0, "train"] == requests["site_2", 0, "train"] == 2
    assert requests["site_3", 1, "train"] == 1  # it was there all the time
    same(deployed, run(KINDS["hybrid"], out=tmp_path / "simulated"))


KINDS: dict[str, dict[str, Any]] = {
    "hybrid": config("hybrid", MIXED, rounds=3, channel=TOP, algorithm__heads="keep"),
    "fedavg": config("fedavg", rounds=3, clients__per_round=2),
}


def test_node_may_restart_before_every_message(tmp_path: Path) -> None:
    """Its connection stays, as that of a SuperNode whose worker was killed."""
    run_config = config("hybrid", MIXED, rounds=2, channel=TOP, algorithm__heads="keep")
    sites = Sites([], tmp_path / "sites")
    for client in CLIENTS:
        site, folder = sites.site(client), tmp_path / "sites" / client
        sites.transport.join(lambda e, site=site, folder=folder: Node(site, folder).handle(e))

    deployed = federation(run_config, sites, tmp_path / "deployed")

    same(deployed, run(run_config, out=tmp_path / "simulated"))


def test_restarted_node_continues_from_its_own_disk(tmp_path: Path) -> None:
    sites = Sites(CLIENTS, tmp_path / "sites")

    def restart(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            sites.stop("site_2")
            sites.start("site_2")

    deployed = federation(KINDS["fedavg"], sites, tmp_path / "deployed", callbacks=[restart])

    counts = sites.request_counts
    assert [counts[client, -1, "hello"] for client in CLIENTS] == [1, 2, 1]
    assert {counts[c, -1, ask] for c in CLIENTS for ask in ("terms", "join")} == {1}
    same(deployed, run(KINDS["fedavg"], out=tmp_path / "simulated"))


def test_restarted_node_with_damaged_session_joins_again(tmp_path: Path) -> None:
    sites = Sites(CLIENTS[1:], tmp_path / "sites")
    folder, lines = tmp_path / "sites" / "site_1", EventLines()
    # Its connection stays, and it restarts before every message.
    sites.transport.join(lambda envelope: Node(sites.site("site_1"), folder).handle(envelope))

    def damage(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            (session,) = folder.glob("runs/*/session")
            session.write_bytes(session.read_bytes()[:-1])

    more: dict[str, Any] = {"callbacks": [damage], "log": lines, "patience": LONG}
    deployed = federation(KINDS["hybrid"], sites, tmp_path / "deployed", **more)

    assert lines.count("site_1 reconnected") == 1
    same(deployed, run(KINDS["hybrid"], out=tmp_path / "simulated"))


def test_node_refused_by_another_server_remains_in_its_run(tmp_path: Path) -> None:
    sites = Sites(CLIENTS[1:], tmp_path / "sites")
    lines, node_lines = EventLines(), EventLines()
    node = Node(sites.site("site_1"), tmp_path / "sites" / "site_1", node_lines)
    sites.transport.join(node.handle)

    def meet_another_server(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            transport = LoopbackTransport()
            transport.join(node.handle)
            other = server_sites.Sites(transport, ["another"], EventLines())
            farewell = "disconnected by the server: the configuration has no such client"
            until(lambda: other.refresh() or farewell in node_lines)
            transport.close()

    deployed = federation(
        KINDS["hybrid"], sites, tmp_path / "deployed", callbacks=[meet_another_server], log=lines
    )

    assert "site_1 disconnected" not in lines
    assert node.joined is None and node_lines[-1] == "disconnected by the server"
    same(deployed, run(KINDS["hybrid"], out=tmp_path / "simulated"))


def test_absent_node_is_given_up_while_another_joins(tmp_path: Path, clock: Clock) -> None:
    sites = Sites(CLIENTS, tmp_path / "sites")

    def join_again() -> None:
        """Start the node without its session; it joins after `site_3` is given up."""
        (session,) = (tmp_path / "sites" / "site_2").glob("runs/*/session")
        session.unlink()
        node = Node(sites.site("site_2"), tmp_path / "sites" / "site_2")

        def handle(envelope: Envelope) -> Envelope:
            if envelope.head["ask"] == "terms":
                sites.transport._working.release()
                until(lambda: "site_3" in clock.late)
                sites.transport._working.acquire()
            return node.handle(envelope)

        sites.transport.join(handle)

    def change(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            sites.stop("site_2")
            sites.stop("site_3")
            join_again()

    run_config = config("fedavg", "linear", rounds=2, evaluation={"every": 2})
    deployed = federation(run_config, sites, tmp_path / "deployed", callbacks=[change])

    assert records(deployed)[1]["failed"] == {"site_3": "its node is not connected"}


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
    assert "damaged" in (out / "log.txt").read_text()
    assert not any("reset" in record for record in records(deployed))
    same(deployed, run(run_config, out=tmp_path / "simulated"))


@pytest.mark.parametrize("kind", ["hybrid"])
def test_client_with_lost_state_is_reset_and_counted(kind: str, tmp_path: Path) -> None:
    sites = Sites(CLIENTS, tmp_path / "sites")

    lose = [lambda record: sites.lose_state("site_2") if record["round"] == 1 else None]
    deployed = federation(KINDS[kind], sites, tmp_path / "deployed", callbacks=lose)
    reset = [record.get("reset") for record in records(deployed)]
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
    assert [record.get("absent") for record in deployed] == [
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
    assert len(list(folder.glob("states/*/*"))) <= 2 * MAX_STATES


def test_states_named_by_checkpoints_are_kept(tmp_path: Path) -> None:
    storage = NodeStorage(tmp_path)
    first = storage.save_state(b"first")
    names = [storage.save_state(bytes([i]), protected=[first]) for i in range(2 * MAX_STATES)]
    assert storage.load_state(first) == b"first" and storage.load_state(
        names[-MAX_STATES]
    ) == bytes([MAX_STATES])
    with pytest.raises(RequestRefusedError, match="is missing or damaged"):
        storage.load_state(names[0])
    for i in range(MAX_STATES):
        storage.save_state(bytes([i]))
    with pytest.raises(RequestRefusedError):
        storage.load_state(first)


@pytest.mark.slow
def test_run_continues_with_five_of_twenty_nodes_down(tmp_path: Path) -> None:
    """Five nodes are down from the second round on; one of them is back for the last."""
    clients = [f"site_{i:02}" for i in range(1, 21)]
    run_config = config(
        "fedavg", "linear", clients=20, rounds=3, data__partition={"kind": "iid", "min_size": 5}
    )
    sites = Sites(clients, tmp_path / "sites")
    down = clients[3:8]

    def stop_sites(record: dict[str, Any]) -> None:
        for client in down if record["round"] == 1 else ():
            sites.stop(client)
        if record["round"] == 2:
            sites.start(down[0])

    deployed = federation(
        run_config, sites, tmp_path / "deployed", callbacks=[stop_sites], patience=0.5
    )
    first, second, last = records(deployed)
    assert (
        first["counts"] == {"invited": 20, "arrived": 20, "failed": 0, "late": 0}
        and "absent" not in first
    )
    assert second["counts"] == {"invited": 20, "arrived": 15, "failed": 5, "late": 0}
    assert second["absent"] == second["failed"] == dict.fromkeys(down, "its node is not connected")
    assert last["counts"]["failed"] == len(last["absent"]) == 4 and down[0] not in last["absent"]
    assert sorted(last["clients"]) == sorted(set(clients) - set(down[1:]))
    read = [scores["personal"]["accuracy"] for scores in last["clients"].values()]
    assert last["personal"]["accuracy"] == pytest.approx(sum(read) / 16)
    assert len(deployed.directory.model_files()) == 17  # and the server's
    assert deployed.summary["wall"]["failed"] == 9 and deployed.summary["rounds_completed"] == 3
    write_report(deployed.path)  # of those who were read


@pytest.mark.slow
@pytest.mark.parametrize("secret", [False, True], ids=["direct", "secure sum"])
def test_late_answers_are_not_used(tmp_path: Path, secret: bool, clock: Clock) -> None:
    """Compare with a run in which the late node is down for that round."""
    kills: dict[Point, str] = {("site_2", 1, "train"): "late"}
    run_config = config(
        "fedavg", "linear", rounds=3, cohort={"deadline": LONG}, evaluation={"every": 3}
    )
    if secret:
        run_config["channel"] = {"secure_sum": {"threshold": 2}}
    late = records(
        federation(
            run_config, Sites(CLIENTS, tmp_path / "a", kills, clock=clock), tmp_path / "late"
        )
    )
    assert [r["counts"]["late"] for r in late] == [0, 1, 0] and not any(r["failed"] for r in late)
    assert [r["counts"]["arrived"] for r in late] == [3, 2, 3]
    assert [row[0] for row in late[1]["tasks"] if row[3] == "late"] == ["site_2"]
    kills = {("site_2", 1, "train"): "before"}
    sites = Sites(CLIENTS, tmp_path / "b", kills, away=None)
    back = [lambda record: sites.start("site_2") if record["round"] == 2 else None]
    down = records(federation(run_config, sites, tmp_path / "down", patience=0.1, callbacks=back))
    assert down[1]["counts"] == {"invited": 3, "arrived": 2, "failed": 1, "late": 0}
    assert down[2]["counts"]["arrived"] == 3 and down[2]["global"] == late[2]["global"]


def test_first_arrivals_are_aggregated(tmp_path: Path) -> None:
    kills: dict[Point, str] = {("site_1", 0, "train"): "last"}
    run_config = config(
        "fedavg",
        "linear",
        rounds=2,
        clients__per_round=2,
        cohort={"over_selection": 1.5},
    )
    deployed = records(
        federation(run_config, Sites(CLIENTS, tmp_path / "sites", kills), tmp_path / "deployed")
    )
    assert [r["counts"] for r in deployed] == [
        {"invited": 3, "arrived": 2, "failed": 0, "late": 1}
    ] * 2
    assert [row[3] for row in deployed[0]["tasks"]] == ["late", "arrived", "arrived"]


@pytest.mark.slow
def test_round_with_too_few_nodes_waits_or_is_skipped(tmp_path: Path, clock: Clock) -> None:
    run_config = config("fedavg", "linear", rounds=3, cohort={"least": 3}, evaluation={"every": 3})
    run_config["devices"] = {"up": 1e6}
    kills: dict[Point, str] = {("site_1", 0, "train"): "before", ("site_2", 1, "train"): "before"}
    sites = Sites(CLIENTS, tmp_path / "sites", kills, away=1.5)
    deployed = federation(run_config, sites, tmp_path / "deployed", patience=0.1)
    assert [r["counts"]["arrived"] for r in records(deployed)] == [3, 3, 3]
    assert (
        "devices: no effect, because time is not simulated"
        in (deployed.path / "log.txt").read_text()
    )
    sites = Sites(CLIENTS, tmp_path / "others", {("site_1", 0, "train"): "missing"}, clock=clock)
    back = [lambda record: sites.start("site_1") if record["round"] == 1 else None]
    deployed = federation(run_config, sites, tmp_path / "skipped", patience=0.1, callbacks=back)
    assert records(deployed)[0].get("skipped") and records(deployed)[2]["counts"]["arrived"] == 3


def test_available_sampling_waits_for_enough_nodes(tmp_path: Path) -> None:
    cohort = {"sampling": "available", "least": 2}
    run_config = config(
        "fedavg", "linear", rounds=3, clients__per_round=3, cohort=cohort, evaluation={"every": 3}
    )
    sites = Sites(CLIENTS, tmp_path / "sites")

    def stop_sites(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            sites.stop("site_1")
            sites.stop("site_2")
            threading.Timer(1.0, sites.start, ["site_2"]).start()

    deployed = records(
        federation(run_config, sites, tmp_path / "deployed", patience=0.1, callbacks=[stop_sites])
    )
    assert [record["cohort"] for record in deployed] == [CLIENTS, CLIENTS[1:], CLIENTS[1:]]
    assert not any(record["failed"] for record in deployed) and list(deployed[2]["absent"]) == [
        "site_1"
    ]


CONFIG = config(
    "fedavg",
    "linear",
    rounds=3,
    channel={"secure_sum": {"threshold": 2}},
    # Each evaluation takes place once.
    output__best_models=False,
)


@pytest.fixture
def transport() -> Iterator[RecordingTransport]:
    transport = RecordingTransport()
    yield transport
    transport.last = None
    transport.close()


def tag(envelope: Envelope) -> bytes:
    what = str(envelope.head["what"])
    return bytes(decode_arrays(envelope.body, REQUESTS[what])["tag"].tobytes())


@pytest.mark.slow
def test_exchanges_of_another_sum_are_refused(
    transport: RecordingTransport, tmp_path: Path
) -> None:
    """Kill the server in round 2, restart that round, then repeat the first requests."""
    sites = Sites(CLIENTS, tmp_path / "sites", transport=transport)

    def run_until(envelopes: int) -> None:
        transport.last = envelopes
        with pytest.raises(ServerKilledError):
            federation(CONFIG, sites, tmp_path / "deployed", closing=False)

    # until all are ready, a round and its reading, keys and shares and two of train
    run_until(9 + 18 + 8)
    first = [(node, envelope) for node, envelope in transport.tasks if envelope.head["round"] == 1]
    assert {str(envelope.head["what"]) for _, envelope in first} == {"keys", "shares", "train"}
    transport.tasks.clear()
    run_until(9 + 8)
    second = [(node, envelope) for node, envelope in transport.tasks if envelope.head["round"] == 1]
    assert {tag(e) for _, e in first}.isdisjoint(tag(e) for _, e in second)
    answers = {
        str(e.head["what"]): transport.repeat(node, e)
        for node, e in first
        if e.head["what"] != "keys"
    }
    assert {what: answer.head.get("what") for what, answer in answers.items()} == dict.fromkeys(
        answers, "refused"
    )
    assert all(b"another round" in answer.body for answer in answers.values())
    # Training of the current round is not repeated under another task name.
    node, train = next((node, e) for node, e in second if e.head["what"] == "train")
    assert b"out of order" in transport.repeat(node, train).body
    done = federation(CONFIG, sites, tmp_path / "deployed")
    assert [r["counts"]["arrived"] for r in records(done)] == [3, 3, 3]


class ReservedSites(Sites):
    """Nodes whose site files permit parameters only."""

    def site(self, client: str) -> SiteConfig:
        return super().site(client).model_copy(update={"shares": ["parameters"]})


def test_run_with_settings_of_sites_is_resumed(tmp_path: Path) -> None:
    source = config("fedavg", "mlp", 2, rounds=2)
    expected = federation(
        source, ReservedSites(["site_1", "site_2"], tmp_path / "a"), tmp_path / "x"
    )

    # Six messages until all are ready, then the first round.
    sites = ReservedSites(["site_1", "site_2"], tmp_path / "b")
    resumed = federation(source, sites, tmp_path / "y", [6 + 2 + 1])

    same(resumed, expected)
