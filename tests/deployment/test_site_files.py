"""Keys and site files: paths, and one line for mistakes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from hetero_fl.deployment.config import load_site_config
from hetero_fl.deployment.flower.worker import run_worker
from hetero_fl.deployment.node_files import (
    load_node_key,
    load_public_key,
    make_node_key,
    public_bytes,
)
from hetero_fl.deployment.server import run_federation
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case


def test_node_key_round_trip(tmp_path: Path) -> None:
    key = make_node_key(tmp_path / "keys" / "north")
    path = tmp_path / "keys" / "north"
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_node_key(path).private_numbers() == key.private_numbers()
    public = path.with_name("north.pub")
    assert public_bytes(load_public_key(public)) == public_bytes(key.public_key())
    assert public.read_text().startswith("ecdsa-sha2-nistp384 ")
    with pytest.raises(
        UserError, match=r"north: expected a public key, got the private key; use the file ….pub"
    ):
        load_public_key(path)
    with pytest.raises(
        UserError,
        match=r"north.pub: expected a private key, got the public key; use the file without .pub",
    ):
        load_node_key(public)
    path.chmod(0o644)
    with pytest.raises(
        UserError, match="north: other users can read this private key; run chmod 600"
    ):
        load_node_key(path)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
def test_keys_of_openssh(tmp_path: Path) -> None:
    def create_key(kind: str, *more: str) -> Path:
        path = tmp_path / f"{kind}{len(more)}"
        subprocess.run(
            ["ssh-keygen", "-q", "-t", kind, *more, "-f", path],
            check=True,
            stdin=subprocess.DEVNULL,
        )
        return path

    good = create_key("ecdsa", "-b", "384", "-N", "")
    assert public_bytes(load_node_key(good).public_key()) == public_bytes(
        load_public_key(Path(f"{good}.pub"))
    )
    with pytest.raises(UserError, match="has a passphrase"):
        load_node_key(create_key("ecdsa", "-N", "secret"))
    other = create_key("ed25519", "-N", "")
    with pytest.raises(UserError, match="got another kind"):
        load_node_key(other)
    with pytest.raises(UserError, match="got another kind"):
        load_public_key(Path(f"{other}.pub"))


@each_case(
    ("change", "line"),
    [
        (
            {"data": {"name": "npz", "path": "dta.npz"}},
            "{site}: data.path: file or folder '{folder}/dta.npz' not found",
        ),
        (
            {"data": {"name": "npzz", "path": "site.yaml"}},
            "{site}: data.name: unknown source 'npzz'; did you mean 'npz'?",
        ),
        (
            {"key": "key.pub"},
            "{folder}/key.pub: expected a private key, got the public key; "
            "use the file without .pub",
        ),
        (
            {"server": {"address": "fl.example.org:9092", "key": "key"}},
            "{site}: server was removed; use --superlink and --root-certificates of "
            "flower-supernode, and the key `key` for the private key",
        ),
    ],
)
def test_worker_checks_the_site_file_before_it_listens(
    change: dict[str, Any], line: str, tmp_path: Path
) -> None:
    folder = tmp_path.resolve()
    make_node_key(folder / "key")
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump({"client": "north", "key": "key", **change}))

    with pytest.raises(UserError) as caught:
        run_worker(path, folder / "socket", parent=os.getpid())

    assert str(caught.value) == line.format(site=path, folder=folder)
    assert not (folder / "state").exists()


@each_case(
    ("section", "expected"),
    [
        ({"data": {"name": "hf:rows"}}, {"name": "hf:{site}/rows"}),
        ({"data": {"name": "hf:./missing"}}, {"name": "hf:{site}/missing"}),
        ({"data": {"name": "hf:~/rows"}}, {"name": "hf:{home}/rows"}),
        ({"data": {"name": "hf:ylecun/mnist"}}, {"name": "hf:ylecun/mnist"}),
        ({"data": {"name": "digits"}}, {"name": "digits"}),
        ({"data": {"name": "npz", "path": "~/rows.npz"}}, {"path": "{home}/rows.npz"}),
        ({"encrypt": "keys/a"}, {"encrypt": "{site}/keys/a"}),
        ({"key": "keys/a"}, {"key": "{site}/keys/a"}),
    ],
)
def test_paths_are_relative_to_the_site_file(
    section: dict[str, Any],
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path.resolve()
    monkeypatch.setenv("HOME", str(root / "home"))
    (root / "site" / "rows").mkdir(parents=True)
    path = root / "site" / "site.yaml"
    path.write_text(yaml.safe_dump({"client": "north", **section}))

    site, _ = load_site_config(path)

    ((name, place),) = expected.items()
    owner = site.data if "data" in section else site
    assert getattr(owner, name) == place.format(site=root / "site", home=root / "home")


def test_simulation_cannot_be_resumed_on_nodes(tmp_path: Path) -> None:
    choice = {"executor": "serial", "threads": 1, "device": "cpu"}
    run = RunDirectory.create(
        tmp_path / "run", config={"name": "a"}, environment={"choice": choice}
    )
    transport = Mock()
    with pytest.raises(
        UserError,
        match=r"the run was started on one machine; resume it with `hetero-fl train`",
    ):
        run_federation({"name": "a"}, transport, out=run.path, resume=True, wait=0.1)
    transport.close.assert_called_once_with()
    transport.push.assert_not_called()
