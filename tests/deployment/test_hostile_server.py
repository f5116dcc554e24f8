"""What a hostile server learns from a site, and which requests of it are answered."""

from __future__ import annotations

import copy
import hashlib
import random
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from hetero_fl.communication.named_arrays import decode_arrays
from hetero_fl.communication.secure_aggregation.client import STATE_FIELDS
from hetero_fl.data.federated_data import PublicPack, describe_client_rows
from hetero_fl.deployment import audit_log
from hetero_fl.deployment.audit_log import refused_configurations
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.local import _make_sites
from hetero_fl.deployment.messages import CODES, message
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.server import run_federation
from hetero_fl.deployment.transport import Envelope
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import load_federated_data
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.serialization import as_tensor
from tests.support.cases import each_case
from tests.support.deployments import SITES, small
from tests.support.federations import changed
from tests.support.loopback import LoopbackTransport
from tests.support.marked_sites import MAKERS, Marker, marked_table, mistakes, public_table
from tests.support.node_session import NodeSession
from tests.support.nodes import LONG
from tests.support.recording import RecordingTransport

JOIN = {"reports": {}, "fingerprint": "", "threads": 1, "state": as_tensor(b"x")}


def terms(source: Any, run: str = "r", public: tuple[str, Any] = ("", None)) -> Envelope:
    tree = {"config": source, "public": public[0], "pack": public[1]}
    return message("terms", tree, run=run)


# Private data


@pytest.fixture(scope="module")
def public_sets(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], Any]]:
    """Return configurations of a server, with the hash and the encoding of its public sets."""
    path = tmp_path_factory.mktemp("server") / "public.csv"
    groups = {"groups": [{"name": "site_1", "model": "tabular"}]}
    found = []
    for data, model in (
        (public_table(path), "tabular"),
        ({"name": "digits", "proxy": {"size": 20}}, "linear"),
        ({"name": "phrases", "text": {"tokenizer": "hashing", "vocabulary": 50}}, "gru"),
    ):
        groups["groups"][0]["model"] = model
        source = {**small(), "data": data, "clients": copy.deepcopy(groups)}
        sets = load_federated_data(load_config(source), absent=["site_1"])
        pack = as_tensor(PublicPack.from_data(sets).encode())
        found.append((source, (sets.public_hash(), pack)))
    return found


def check_marked_site(case: int, folder: Path, public_sets: list[tuple[Any, Any]]) -> None:
    """Ask a site with a marker in all of its data; the marker must not leave the site."""
    rng = random.Random(case)
    marker = Marker(rng)
    site_folder = folder / marker.text()
    site_folder.mkdir()
    data = MAKERS[case % len(MAKERS)](site_folder, marker, rng)
    source, public = rng.choice(public_sets)
    source = copy.deepcopy(source)
    if rng.random() < 0.7:
        source = changed(source, **mistakes(rng, folder))
    loopback = LoopbackTransport()
    seen = RecordingTransport(loopback)
    lines: list[str] = []
    site = SiteConfig.model_validate({"client": "site_1", "data": data})
    node = loopback.join(Node(site, site_folder / "state", lines.append).handle)

    answers = [
        seen.ask(node, message("hello")),
        seen.ask(node, terms(source, public=public)),
        seen.ask(node, message("join", JOIN, run="r")),
        seen.ask(node, Envelope({"ask": "do", "run": "r", "task": "t", "kind": "read"})),
    ]
    loopback.close()

    assert None not in answers
    assert not seen.find(marker.word) and not seen.find(marker.digits), case
    assert {why.partition(":")[0] for why in seen.reasons()} <= set(CODES), case


@each_case("case", range(20))
def test_node_sends_no_marker_of_its_data(
    case: int, tmp_path: Path, public_sets: list[tuple[Any, Any]]
) -> None:
    check_marked_site(case, tmp_path, public_sets)


@pytest.mark.slow
@each_case("case", range(20, 200))
def test_node_sends_no_marker_of_its_data_in_many_cases(
    case: int, tmp_path: Path, public_sets: list[tuple[Any, Any]]
) -> None:
    check_marked_site(case, tmp_path, public_sets)


def test_run_sends_no_marker_of_fitting_data(tmp_path: Path) -> None:
    marker = Marker(random.Random(1))
    loopback = LoopbackTransport()
    seen = RecordingTransport(loopback)
    for client in SITES:
        folder = tmp_path / marker.text()
        folder.mkdir()
        # With this seed, the table fits the public one.
        data = marked_table(folder, marker, random.Random(1))
        site = SiteConfig.model_validate({"client": client, "data": data})
        loopback.join(Node(site, folder / "state").handle)
    source = {**small(models="tabular", rounds=1), "data": public_table(tmp_path / "public.csv")}

    run_federation(source, seen, out=tmp_path / "run", wait=LONG)

    assert not seen.reasons() and any(a.head["ask"] == "done" for a in seen.received)
    assert not seen.find(marker.word) and not seen.find(marker.digits)


def test_digests_that_leave_are_keyed(tmp_path: Path) -> None:
    """A digest of private state or rows would confirm a guess of them."""
    source = small(
        "fedper", rounds=1, privacy={"unit": "local", "noise_multiplier": 1.0, "clip": 1.0}
    )
    loopback = LoopbackTransport()
    seen = RecordingTransport(loopback)
    nodes = {c: Node(SiteConfig(client=c), tmp_path / c) for c in SITES}
    for node in nodes.values():
        loopback.join(node.handle)
    rows: list[str] = []

    def keep_hashes(_record: Any) -> None:
        for client, node in nodes.items():
            rows.append(describe_client_rows(node.joined.data, client, False, False).content_hash)

    run_federation(source, seen, out=tmp_path / "run", wait=LONG, callbacks=[keep_hashes])

    states = [
        hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.rglob("states/*/*")
    ]
    assert len(states) >= 3 and len(rows) == 3
    assert any(answer.head.get("state") for answer in seen.received)
    for digest in [*states, *rows]:
        assert not seen.find(digest) and not seen.find(bytes.fromhex(digest))


# Answers


@each_case("errors", [False, True])
def test_reason_is_sent_only_if_the_site_tells_errors(
    errors: bool, tmp_path: Path, public_sets: list[tuple[Any, Any]]
) -> None:
    path = tmp_path / "data.csv"
    path.write_text("age,crp,ill\n1,2,Patient 0\n" + "1,2,yes\n2,1,no\n" * 20)
    data = {"name": "table", "path": str(path), "label": "ill"}
    lines: list[str] = []
    site = SiteConfig.model_validate(
        {"client": "site_1", "data": data, "tells": {"errors": errors}}
    )
    source, public = public_sets[0]

    answer = Node(site, tmp_path / "state", lines.append).handle(terms(source, public=public))

    assert answer.head["ask"] == "refused"
    assert "Patient 0" in lines[-1]
    assert ("Patient 0" in str(answer.head["why"])) == errors
    assert errors or answer.head["why"] == "data"


def test_node_refuses_configurations_after_the_daily_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = SiteConfig.model_validate({"client": "site_1", "allows": {"refusals": 2}})
    node = Node(site, tmp_path)
    wrong = terms({**small(), "rounds": 0})
    reasons = [node.handle(wrong).head["why"] for _ in range(2)]

    answers = [node.handle(terms(small())).head["why"] for _ in range(3)]

    assert reasons == ["malformed", "malformed"] and answers == ["policy"] * 3
    # Configurations that were not read do not count.
    assert refused_configurations(node.audit_log.entries()) == 2
    now = audit_log.time.time()
    monkeypatch.setattr(audit_log.time, "time", lambda: now + 90_000)
    assert refused_configurations(node.audit_log.entries()) == 0


def test_label_comes_from_the_site_file_alone(
    tmp_path: Path, public_sets: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, public = public_sets[0]
    data = {"text": {"public": "/etc/passwd"}, "root": str(tmp_path)}
    source = {**source, "data": {**source["data"], **data}}
    load = Mock(side_effect=UserError("stop"))
    monkeypatch.setattr(PublicPack, "data_of_client", load)
    site = SiteConfig.model_validate({"client": "site_1", "data": {"name": "hf:rows"}})

    Node(site, tmp_path / "state").handle(terms(source, public=public))

    used = load.call_args.args[1]
    assert (used.label, used.text, used.root) == (None, None, site.root)


# Files


@each_case(
    ("key", "changes"),
    [
        ("data", {"data__name": "text", "data__path": "/etc/passwd"}),
        ("data.proxy.source", {"data__proxy__source": {"name": "npz", "path": "/etc/passwd"}}),
        ("data", {"data__name": "phrases", "data__text": {"public": "/etc/passwd"}}),
        ("data", {"data__name": "fashion_mnist"}),
        (
            "clients: 'site_2': data",
            {"clients__overrides": [{"match": "site_2", "data": {"name": "hf:/etc"}}]},
        ),
    ],
)
def test_node_without_data_reads_only_shipped_sets(
    key: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    lines: list[str] = []
    node = Node(SiteConfig(client="site_1"), tmp_path, lines.append)

    answer = node.handle(terms(small(**changes)))

    assert answer.head["why"] == f"policy: {key}"
    assert "is not in this site's allows.data" in lines[-1]


def test_sites_of_federate_may_read_the_sources_of_the_configuration(
    tmp_path: Path,
) -> None:
    data = {**public_table(tmp_path / "public.csv"), "root": str(tmp_path / "downloads")}
    groups = [{"name": "site", "count": 2, "model": "tabular"}]
    config = load_config({"data": data, "clients": {"groups": groups}, "rounds": 1})

    sites = _make_sites(config, tmp_path / "sites")

    for site in sites:
        (source,) = site.allows.data
        assert (source.name, source.path, source.label) == ("table", data["path"], "ill")
        assert site.tells.errors and site.root == data["root"]
        public = (load_federated_data(config).public_hash(), None)
        request = terms(config.model_dump(mode="json"), public=public)
        assert Node(site, Path(site.folder)).handle(request).head["ask"] == "told"


# Policy


CODES_ONLY = {"tells": {"errors": False}}
ASYNCHRONOUS = {"mode": "async", "threads": 1, "executor": "serial"}


def test_steps_of_sampled_rows_are_limited(tmp_path: Path) -> None:
    privacy = {"unit": "record", "noise_multiplier": 1.0, "sample_rate": 0.002}

    run = NodeSession(
        tmp_path, {"allows": {"steps": 20}}, rounds=1, models="linear", privacy=privacy
    ).run

    line = "steps of this task: must be <= 20 (this site's allows.steps), got 500"
    assert run.metrics[0]["failed"] == {"site_1": line}


@each_case(("rounds", "runtime", "tasks"), [(2, {}, 2), (1, ASYNCHRONOUS, 3)])
def test_number_of_training_tasks_is_limited(
    rounds: int, runtime: dict[str, Any], tasks: int, tmp_path: Path
) -> None:
    changes = {"runtime": runtime} if runtime else {}
    session = NodeSession(tmp_path, CODES_ONLY, rounds=rounds, models="linear", **changes)
    left = tasks - len(session.node.joined.usage.trained)

    answers = [session.repeat("train", task=f"new{n}", again=n).head for n in range(10, 15)]

    assert [head["ask"] for head in answers] == ["done"] * left + ["refused"] * (5 - left)
    assert answers[-1]["why"] == "policy: rounds"
    assert session.repeat("read").head["ask"] == "done"
    assert session.refusal_reason("train", task="x", round=rounds) == "policy: rounds"


def test_task_whose_state_is_lost_is_another_task(tmp_path: Path) -> None:
    """With the same noise, two answers from different states would reveal their difference."""
    session = NodeSession(tmp_path, method="fedper", models="mlp", rounds=2)
    for file in session.node.joined.storage.folder.rglob("states/*/*"):
        file.unlink()

    same_name = session.refusal_reason("train")
    new_name = session.refusal_reason("train", task="new")

    assert same_name.endswith("was sent before with different content")
    assert new_name.startswith("training tasks of this run: must be <= 2")


def test_site_of_a_secure_sum_keeps_rounds_but_no_secrets(tmp_path: Path) -> None:
    secure = {"channel": {"secure_sum": {"threshold": 2}}}
    session = NodeSession(tmp_path, CODES_ONLY, rounds=2, models="linear", **secure)
    state = decode_arrays(session.node.joined.storage.read("notes") or b"", STATE_FIELDS)

    answer = session.repeat("shares", b"junk", task="new")

    assert state["rounds"].tolist() == [0, 1] and not state["secrets"].any()
    assert (answer.head["what"], answer.body) == ("refused", b"malformed")
    assert session.federation.log_lines[-1].startswith("refused: ")


@each_case("ask", ["hello", "nothing"])
def test_nothing_leaves_if_the_audit_log_cannot_be_written(
    ask: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback = LoopbackTransport()
    seen = RecordingTransport(loopback)
    node = Node(SiteConfig(client="site_1"), tmp_path)
    number = loopback.join(node.handle)

    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(node.audit_log, "_write", full)

    assert seen.ask(number, Envelope({"ask": ask})) is None
    with pytest.raises(RunFailedError, match=r"audit.jsonl: cannot be written \(No space left"):
        node.handle(Envelope({"ask": ask}))
    loopback.close()


@each_case("clients", [{"count": 10**9}, {"groups": [{"name": "site", "count": 10**8}] * 10}])
def test_number_of_clients_is_limited(clients: dict[str, Any], tmp_path: Path) -> None:
    source = {**small(), "clients": clients}
    lines: list[str] = []

    answer = Node(SiteConfig(client="site_1"), tmp_path, lines.append).handle(terms(source))

    assert answer.head["why"] == "malformed"
    key = "clients.count" if "count" in clients else "clients.groups"
    assert f"{key}: must be <= 10,000,000 clients, got 1,000,000,000" in lines[-1]
