"""The ClientApp and the worker process of a site."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from flwr.app import ConfigRecord, Context, Message, RecordDict

from hetero_fl.deployment.flower.client_app import handle_query
from hetero_fl.deployment.flower.grid import from_message, to_content
from hetero_fl.deployment.flower.worker_socket import WorkerError, forward, socket_path
from hetero_fl.deployment.transport import Envelope
from tests.support.cases import each_case
from tests.support.flower_federation import until, worker_processes

pytestmark = pytest.mark.usefixtures("flower_task")
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


@each_case(
    ("content", "expected"),
    [
        (HELLO, "--node-config has no site; expected 'site=\"/path/to/site.yaml\"'"),
        (RecordDict({"other": ConfigRecord({"a": 1})}), "not a message of hetero_fl"),
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
