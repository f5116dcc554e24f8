"""Node storage: encrypted or readable by its owner alone, and the secrets that noise comes from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.messages import RequestRefusedError
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.node_files import NodeStorage, load_or_create_key
from hetero_fl.deployment.transport import Envelope
from hetero_fl.federation.store import PrivateState
from hetero_fl.utils.errors import UserError
from tests.support.calls import record_calls
from tests.support.cases import each_case
from tests.support.deployments import Federation, small
from tests.support.federations import TOP

PIECE = 64  # bytes of a tensor that are looked for


def pieces(node: Node) -> list[bytes]:
    """Return bytes from the middle of each private tensor of a node's state and rows."""
    private: PrivateState = node.joined.worker.runtime.store.get(node.site.client)
    rows = node.joined.data.client_rows[node.site.client]["train"].copy_rows()
    found = []
    for tensor in filter(torch.is_tensor, tree_leaves([private.models, private.state, rows.x])):
        raw = tensor.contiguous().numpy().tobytes()
        for at in range(0, max(1, len(raw) - PIECE), max(1, len(raw) // 8)):
            if len(set(raw[at : at + PIECE])) > 8:  # a run of zeros would be found anywhere
                found.append(raw[at : at + PIECE])
    return found


def record_tasks(patch: pytest.MonkeyPatch, note: Callable[[Node], Any]) -> list[Any]:
    """Record a note of the node of site_1 after each task."""
    notes: list[Any] = []
    plain = Node._log_answer

    def log_answer(node: Node, answer: Envelope) -> None:
        if node.site.client == "site_1" and answer.head["ask"] == "done":
            notes.append(note(node))
        plain(node, answer)

    patch.setattr(Node, "_log_answer", log_answer)
    return notes


def stored_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("encrypted", [True, False])
def test_private_tensors_are_encrypted_on_disk(
    encrypted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FedPer with top-k has a private head and residuals that were not sent."""
    site = {"encrypt": str(tmp_path / "keys" / "site_1")} if encrypted else {}
    seen = record_tasks(monkeypatch, pieces)

    run = Federation(tmp_path, {"site_1": site}).serve(small("fedper", channel=TOP))

    kept = seen[-1]
    assert run.summary["rounds_completed"] == 2 and len(kept) > 20
    on_disk = [path.read_bytes() for path in stored_files(tmp_path / "site_1")]
    found = [piece for piece in kept if any(piece in data for data in on_disk)]
    assert bool(found) != encrypted


def test_encrypted_storage_is_private_and_reopens_with_its_key(tmp_path: Path) -> None:
    key = tmp_path / "keys" / "site_1"
    Federation(tmp_path, {"site_1": {"encrypt": str(key)}}).serve(small(rounds=1))

    for top in (tmp_path / "site_1", tmp_path / "keys" / "site_1", tmp_path / "run" / "secrets"):
        for path in [top, *top.rglob("*")]:
            assert path.stat().st_mode & 0o077 == 0, path
    folder = next((tmp_path / "site_1" / "runs").iterdir())
    secret = NodeStorage(folder, load_or_create_key(key)).read("noise")
    assert secret is not None and len(secret) == 32
    assert NodeStorage(folder, bytes(32)).read("noise") is None


@each_case("length", [0, 5, 30, None])
def test_damaged_files_are_noticed_and_secrets_not_replaced(
    length: int | None, tmp_path: Path
) -> None:
    """A new secret would draw fresh noise for what was released under the first."""
    storage = NodeStorage(tmp_path, bytes(32))
    storage.secret("noise")
    name = storage.save_state(b"state")
    if length is None:
        storage.key = bytes(range(32))
    for path in (tmp_path / "noise", tmp_path / "states" / name[:2] / name):
        path.write_bytes(path.read_bytes()[:length])

    with pytest.raises(UserError, match="noise: cannot be decrypted"):
        storage.secret("noise")
    with pytest.raises((UserError, RequestRefusedError), match=r"missing or damaged|decrypted"):
        storage.load_state(name)


@each_case(
    ("length", "mode", "message"),
    [
        (32, 0o644, "other users can read this key; run chmod 600"),
        (31, 0o600, "expected a key of 32 bytes, got 31 bytes"),
    ],
)
def test_key_that_is_short_or_readable_by_others_is_refused(
    length: int, mode: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(bytes(length))
    (tmp_path / "key").chmod(mode)
    with pytest.raises(UserError, match=message):
        Node(SiteConfig(client="a", encrypt=str(tmp_path / "key")), tmp_path / "site")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are in /proc")
def test_key_is_synced_before_encrypted_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure must not leave encrypted data whose key was only in memory."""
    done = record_calls(monkeypatch, os, "fsync", lambda f: os.readlink(f"/proc/self/fd/{f}"))
    record_calls(monkeypatch, os, "replace", lambda source, target: str(target), done)
    key = tmp_path / "safe" / "keys" / "a"
    node = Node(SiteConfig(client="a", encrypt=str(key)), tmp_path / "site")
    NodeStorage(tmp_path / "site" / "runs" / "r", node.storage_key).secret("noise")

    sealed = done.index(str(tmp_path / "site" / "runs" / "r" / "noise"))
    for path in (key, key.parent, key.parent.parent, tmp_path):
        assert str(path) in done[:sealed], path


# Noise


def server_noise(folder: Path) -> Any:
    """Return the final loss of a run whose server adds noise to sums."""
    privacy = {"unit": "client", "noise_multiplier": 1.0, "clip": 1.0}
    run = Federation(folder).serve(small(rounds=1, privacy=privacy, evaluation__every=1))
    return run.summary["global"]["last"]["loss"]


def test_server_noise_does_not_depend_on_seed(tmp_path: Path) -> None:
    """Two equal runs differ in their secrets, and so in their noise."""
    assert server_noise(tmp_path / "one") != server_noise(tmp_path / "other")
    secrets = [
        (tmp_path / name / "run" / "secrets" / "noise").read_bytes() for name in ("one", "other")
    ]
    assert len(secrets[0]) == 32 and secrets[0] != secrets[1]


@pytest.mark.slow
def test_site_noise_differs_between_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two different tasks in one round must not get the same noise."""
    tasks = record_tasks(monkeypatch, lambda node: node.joined.worker.runtime.privacy.noise.task)
    private = small(privacy={"unit": "record", "noise_multiplier": 1.0}, output__best_models=False)
    Federation(tmp_path).serve(private)
    assert len(tasks) == 4 and len(set(tasks)) == 4  # two rounds, two readings
