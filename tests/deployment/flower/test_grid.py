"""Inside Flower's processes: the transport over its grid, the ClientApp and the worker."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

import hetero_fl
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.flower import server_app
from hetero_fl.deployment.flower.client_app import (
    SMALL_BODY_BYTES,
    from_message,
    handle_query,
    to_content,
)
from hetero_fl.deployment.flower.server_app import GridTransport, run_in_app
from hetero_fl.deployment.flower.worker import WorkerError, forward, receive, send, socket_path
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.node_files import make_node_key, public_bytes
from hetero_fl.deployment.transport import Envelope, Handle, UnreadableAnswer
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.support.cases import each_case
from tests.support.federations import config
from tests.support.flower_federation import worker_processes
from tests.support.nodes import ALL, LONG, Clock, models, until

pytestmark = pytest.mark.usefixtures("flower_task")


@dataclass
class FakeNode:
    """A SuperNode as the grid lists it."""

    node_id: int
    handle: Handle
    last_activated_at: str = "first"
    public_key: bytes = b""


class FakeGrid:
    """The used part of a grid, whose nodes answer at once, in this process."""

    def __init__(self) -> None:
        self.members: dict[int, FakeNode] = {}
        self.answers: dict[str, Any] = {}
        self.unreadable: set[str] = set()
        self.slow: dict[str, threading.Event] = {}
        self.failure: BaseException | None = None

    def join(self, handle: Handle) -> FakeNode:
        node = FakeNode(100 + len(self.members), handle)
        self.members[node.node_id] = node
        return node

    def get_nodes(self) -> Any:
        self._check_up()
        return list(self.members.values())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[Any]:
        self._check_up()
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._check_up()
        found = [(n, self.answers.pop(n)) for n in message_ids if n in self.answers]
        if self.unreadable & {number for number, _ in found}:
            raise ValueError("a chunk that names itself")
        for number, _ in found:
            if number in self.slow:
                self.slow[number].wait(60.0)
        return [answer for _, answer in found]

    def _push(self, message: Message) -> str | None:
        if message.metadata.dst_node_id not in self.members:
            return None
        number = message.object_id
        message.metadata.__dict__["_message_id"] = number
        envelope = from_message(message)
        try:
            answer = self.members[message.metadata.dst_node_id].handle(envelope)
            self.answers[number] = Message(to_content(answer), reply_to=message)
        except ArithmeticError:
            self.answers[number] = Message(Error(1, "the ClientApp failed"), reply_to=message)
        return number

    def _check_up(self) -> None:
        if self.failure is not None:
            raise self.failure


def echo(envelope: Envelope) -> Envelope:
    return Envelope({**envelope.head, "answered": True}, envelope.body[::-1])


def pull_all(transport: GridTransport, numbers: list[str]) -> dict[str, Envelope | None]:
    """Pull until all of these messages are answered."""
    answers: dict[str, Envelope | None] = {}
    while left := [number for number in numbers if number not in answers]:
        answers |= transport.pull(left, 1.0)
    return answers


@pytest.fixture
def grid() -> Any:
    return FakeGrid()


@pytest.fixture
def node(grid: Any, transport: GridTransport) -> int:
    """Let a node that answers join the grid."""
    grid.join(echo)
    (number,) = transport.nodes()
    return number


@pytest.fixture
def transport(grid: Any) -> GridTransport:
    return GridTransport(grid)


@pytest.fixture
def numbers(grid: Any, transport: GridTransport) -> list[str]:
    """Send a message to each of two nodes."""
    for _ in range(2):
        grid.join(echo)
    return [transport.push(node, Envelope(), 60.0) for node in transport.nodes()]


@pytest.mark.parametrize("size", [0, 1, SMALL_BODY_BYTES, SMALL_BODY_BYTES + 1])
def test_message_and_answer_arrive_unchanged(
    grid: Any, transport: GridTransport, node: int, size: int
) -> None:
    head = {"ask": "do", "round": 3, "work": 0.5, "details": False, "key": b"\0\xff"}
    body = bytes(i % 251 for i in range(size))

    number = transport.push(node, Envelope(head, body), 60.0)
    answers = transport.pull([number], 1.0)

    assert answers == {number: Envelope({**head, "answered": True}, body[::-1])}


def test_unknown_nodes_and_failed_client_app_have_no_answer(
    grid: Any, transport: GridTransport, node: int
) -> None:
    failing = FakeNode(200, lambda envelope: Envelope({"ask": str(1 // 0)}))
    grid.members = {200: failing}

    lost = [transport.push(number, Envelope(), 60.0) for number in (node, 77, 200)]

    assert transport.pull(lost, 1.0) == dict.fromkeys(lost)


def test_restarted_node_is_another_node_whose_late_answers_are_deleted(
    grid: Any, transport: GridTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_app, "NODES_SECONDS", 0.0)
    first = grid.join(echo)
    grid.join(echo)
    before = list(transport.nodes())
    number = transport.push(before[0], Envelope(), 60.0)
    late = dict(grid.answers)
    grid.answers.clear()

    first.last_activated_at = "second"  # it restarts before it answers

    assert pull_all(transport, [number]) == {number: None}
    after = set(transport.nodes())
    assert before[1] in after and before[0] not in after and len(after) == 2
    grid.answers |= late
    # Flower deletes an answer that is pulled.
    until(lambda: not grid.answers)


def test_unreadable_answer_does_not_hide_others(
    grid: Any, transport: GridTransport, numbers: list[str]
) -> None:
    grid.unreadable.add(numbers[0])

    answers = pull_all(transport, numbers)

    assert isinstance(answers[numbers[0]], UnreadableAnswer)
    assert "a chunk that names itself" in str(answers[numbers[0]])
    assert answers[numbers[1]] == Envelope({"answered": True})


class RunNotRunningException(BaseException):
    """Stand in for Flower's exception of this name."""


@each_case(
    ("error", "message"),
    [
        (ConnectionError("connection refused"), "SuperLink does not answer"),
        (RunNotRunningException(), "Flower has stopped the run"),
    ],
)
def test_failure_of_flower_ends_the_run(error: BaseException, message: str) -> None:
    grid = FakeGrid()
    transport = GridTransport(grid)  # type: ignore[arg-type]
    grid.join(echo)
    (node,) = transport.nodes()
    number = transport.push(node, Envelope(), 60.0)
    grid.failure = error

    for call in (
        transport.nodes,
        lambda: transport.push(node, Envelope(), 60.0),
        lambda: transport.pull([number], 1.0),
    ):
        with pytest.raises(RunFailedError, match=message):
            call()


def test_slow_answer_does_not_block_others(
    grid: Any, transport: GridTransport, numbers: list[str]
) -> None:
    grid.slow[numbers[0]] = threading.Event()

    assert transport.pull(numbers, 10.0) == {numbers[1]: Envelope({"answered": True})}
    assert transport.pull(numbers[:1], 0.1) == {}
    grid.slow[numbers[0]].set()
    assert transport.pull(numbers[:1], 10.0) == {numbers[0]: Envelope({"answered": True})}


def test_answers_are_kept_until_pulled_or_expired(
    grid: Any, transport: GridTransport, node: int
) -> None:
    transport.push(node, Envelope({"n": 0}), -1.0)  # nobody asks for its answer
    first, second = (transport.push(node, Envelope({"n": n}), 60.0) for n in (1, 2))

    assert pull_all(transport, [first]) == {first: Envelope({"n": 1, "answered": True})}
    assert pull_all(transport, [second]) == {second: Envelope({"n": 2, "answered": True})}
    assert transport.pull([first], 0.0) == {first: None}
    until(lambda: not grid.answers)


def test_run_in_app_equals_simulation_and_is_resumed(grid: Any, tmp_path: Path) -> None:
    source = config("fedmd", "cnn_gn_small", runtime={"executor": "serial", "threads": 1})
    for client in ("site_1", "site_2", "site_3"):
        grid.join(Node(SiteConfig(client=client, tells=ALL), tmp_path / client).handle)
    out = str(tmp_path / "run")

    run = run_in_app(grid, {"out": out, "overrides": "seed=3"}, source)

    simulated = hetero_fl.run(source, overrides=["seed=3"], out=tmp_path / "simulated")
    assert models(run) == models(simulated) and models(run)
    # The configuration of the run is kept.
    again = run_in_app(grid, {"out": out, "resume": True}, source)
    assert again.summary["seed"] == 3


def test_nodes_file_binds_clients_to_keys(
    grid: Any, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    # Admission closes after the run's folder, two clients and a refusal.
    log = clock.after(4, lines)
    monkeypatch.setattr(server_app, "EventLog", lambda _: log)
    for client in ("site_1", "site_2", "site_3"):
        key = make_node_key(tmp_path / client)
        member = grid.join(Node(SiteConfig(client=client), tmp_path / f"{client}_state").handle)
        member.public_key = public_bytes(key.public_key())
    nodes = tmp_path / "nodes.yaml"
    nodes.write_text("site_1: site_1.pub\nsite_2: site_2.pub\nsite_3: site_1.pub\n")
    settings = {"out": str(tmp_path / "run"), "nodes": str(nodes), "wait": LONG}

    with pytest.raises(RunFailedError, match="no node connected within 300 s for site_3"):
        run_in_app(grid, settings, config("fedavg", "cnn_gn_small"))

    assert any("its key is not the key of client 'site_3'" in line for line in lines)
    nodes.write_text("site_1: 7\n")
    with pytest.raises(UserError, match="site_1: expected a file with a public key, got 7"):
        run_in_app(grid, settings, config("fedavg", "cnn_gn_small"))


@each_case(
    ("settings", "line"),
    [
        ({"logs": "jsn"}, "run-config: logs: expected text or json, got 'jsn'"),
        ({"wait": "soon"}, "run-config: wait: expected float, got 'soon'"),
        ({"resume": 1}, "run-config: resume: expected bool, got 1"),
        ({"resume": True}, "run-config: resume requires out, the directory of the run"),
    ],
)
def test_invalid_run_config_is_named(grid: Any, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        run_in_app(grid, settings, config("fedavg", "cnn_gn_small"))


HELLO = Envelope({"ask": "hello"})


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a site's file."""
    path = tmp_path / "site.yaml"
    path.write_text("client: north\n")
    return path


@pytest.fixture
def supernode(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in the role of the one that starts ClientApps; workers end with it."""
    with (
        # a short path, as the length of socket paths is limited
        tempfile.TemporaryDirectory() as sockets,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process,
    ):
        monkeypatch.setattr(tempfile, "tempdir", sockets)
        monkeypatch.setattr(os, "getppid", lambda: process.pid)
        yield process
        process.kill()


def query(envelope: Envelope | RecordDict, **node_config: str) -> Envelope:
    """Send a message through the ClientApp."""
    content = to_content(envelope) if isinstance(envelope, Envelope) else envelope
    message = Message(content, 1, "query")
    message.metadata.__dict__["_message_id"] = message.object_id
    context = Context(1, 1, dict(node_config), RecordDict(), {})
    return from_message(handle_query(message, context))


def test_client_app_does_not_import_torch() -> None:
    code = (
        "import sys; import hetero_fl.deployment.flower.client_app; "
        "assert not {'torch', 'numpy.random', 'pydantic'} & set(sys.modules), 'slow imports'"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


def test_messages_between_processes_are_not_pickled() -> None:
    values = {"text": "\ud800é", "bytes": b"\xff", "whole": 3, "real": 0.1, "flag": True}
    envelope = Envelope(values, b"body" * 1000)
    left, right = multiprocessing.Pipe()

    send(left, envelope)
    send(left, envelope)

    assert receive(right) == envelope
    assert json.loads(right.recv_bytes())["whole"] == 3


def test_worker_answers_and_ends_with_its_parent(
    site: Path, supernode: subprocess.Popen[bytes]
) -> None:
    answers: list[Envelope] = []
    both = [threading.Thread(target=lambda: answers.append(forward(HELLO, site))) for _ in range(2)]

    for thread in both:
        thread.start()
    for thread in both:
        thread.join()

    assert [(a.head["ask"], a.head["client"]) for a in answers] == [("here", "north")] * 2
    assert query(HELLO, site=str(site)).head["ask"] == "here"
    (worker,) = worker_processes([site])

    os.kill(worker, signal.SIGKILL)  # it is started again
    until(lambda: not Path(f"/proc/{worker}").exists())
    assert forward(HELLO, site).head["ask"] == "here"
    (again,) = worker_processes([site])
    assert again != worker

    supernode.kill()
    supernode.wait()
    until(lambda: not worker_processes([site]))
    assert not socket_path(site).exists()


def test_worker_killed_while_computing_fails_the_message(
    site: Path, supernode: subprocess.Popen[bytes]
) -> None:
    forward(HELLO, site)
    (worker,) = worker_processes([site])
    os.kill(worker, signal.SIGSTOP)
    failures: list[BaseException] = []

    def call() -> None:
        try:
            forward(HELLO, site)
        except (EOFError, OSError) as error:
            failures.append(error)

    waiting = threading.Thread(target=call)
    waiting.start()
    os.kill(worker, signal.SIGKILL)
    waiting.join()

    assert len(failures) == 1


def test_invalid_site_file_is_reported_at_the_site(
    site: Path, supernode: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    site.write_text("client: north\nfoldr: state\n")

    answer = query(HELLO, site=str(site))

    assert answer.head["ask"] == "refused"
    reason = "its worker did not start; the log of its SuperNode says why"
    assert answer.head["why"] == reason
    line = f"{site}: foldr: unknown key; did you mean 'folder'?"
    assert capsys.readouterr().err.splitlines() == [line, f"refused: {reason}"]


FOREIGN = [
    RecordDict(),
    RecordDict({"head": ConfigRecord({"a": 1})}),
    RecordDict({"head": ConfigRecord({"a": [1]}), "body": ConfigRecord({"body": b""})}),
    RecordDict({"head": ConfigRecord({"a": 1}), "body": ConfigRecord({"body": "text"})}),
]


@each_case(
    ("content", "expected"),
    [
        (HELLO, "--node-config has no site; expected 'site=\"/path/to/site.yaml\"'"),
        *((content, "not a message of hetero_fl") for content in FOREIGN),
    ],
)
def test_message_without_a_site_or_of_another_app_is_refused(
    content: Envelope | RecordDict, expected: str
) -> None:
    answer = query(content)

    assert answer.head == {"ask": "refused", "why": expected}


def test_socket_folder_of_another_user_is_refused(
    site: Path, supernode: subprocess.Popen[bytes]
) -> None:
    socket_path(site).parent.chmod(0o755)

    with pytest.raises(WorkerError, match="others can enter it"):
        forward(HELLO, site)
