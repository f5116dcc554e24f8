"""Certificates, keys and configuration files: what is created, and one line for mistakes."""

from __future__ import annotations

import datetime
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from hetero_fl.cli import main
from hetero_fl.deployment import certificates
from hetero_fl.deployment.certificates import (
    ServerFiles,
    check_server_files,
    load_node_key,
    load_public_key,
    make_node_key,
    make_server_files,
    public_bytes,
)
from hetero_fl.deployment.config import load_server_config, load_site_config
from hetero_fl.deployment.server import run_federation
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ServerFiles:
    return make_server_files(tmp_path_factory.mktemp("server"), ["fl.example.org", "10.0.0.7"])


def test_created_certificates_are_valid(files: ServerFiles) -> None:
    check_server_files(files, ["fl.example.org", "10.0.0.7"])
    assert files.key.stat().st_mode & 0o777 == 0o600
    assert (files.key.parent / "authority.key").stat().st_mode & 0o777 == 0o600
    context = ssl.create_default_context(cafile=files.authority)
    context.load_cert_chain(files.certificate, files.key)


def test_existing_files_are_not_overwritten(files: ServerFiles, tmp_path: Path) -> None:
    before = files.key.read_bytes()
    with pytest.raises(UserError, match=r"authority.pem: already exists"):
        make_server_files(files.key.parent, ["fl.example.org"])
    assert files.key.read_bytes() == before
    make_node_key(tmp_path / "a")
    with pytest.raises(UserError, match="a: already exists"):
        make_node_key(tmp_path / "a")


def test_certificate_of_another_host_is_refused(files: ServerFiles) -> None:
    with pytest.raises(
        UserError,
        match=r"server.pem: not valid for fl.example.com; its hosts are fl.example.org, 10.0.0.7",
    ):
        check_server_files(files, ["fl.example.com"])


def test_expired_and_future_certificates_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "CLOCK_TOLERANCE", datetime.timedelta(days=10))
    monkeypatch.setattr(certificates, "VALIDITY", datetime.timedelta(days=3))
    with pytest.raises(UserError, match=r"authority.pem: expired on \d{4}-"):
        check_server_files(make_server_files(tmp_path / "old", ["a"]))
    monkeypatch.setattr(certificates, "CLOCK_TOLERANCE", -datetime.timedelta(days=1))
    with pytest.raises(UserError, match=r"authority.pem: not valid before \d{4}-"):
        check_server_files(make_server_files(tmp_path / "new", ["a"]))


@each_case(
    ("choose", "message"),
    [
        (
            lambda own, other: (own.authority, own.certificate, other.key),
            r"server.key: does not match the certificate .*server.pem",
        ),
        (
            lambda own, other: (other.authority, own.certificate, own.key),
            r"server.pem: not signed by .*authority.pem",
        ),
        (
            lambda own, other: (own.authority, other.key.with_name("none.pem"), own.key),
            r"none.pem: the server's certificate cannot be read \(No such file",
        ),
        (
            lambda own, other: (own.authority, own.key, own.key),
            r"server.key: expected a certificate in PEM",
        ),
        (
            lambda own, other: (own.authority, own.certificate, own.certificate),
            r"server.pem: expected a private key in PEM",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(
    choose: Callable[[ServerFiles, ServerFiles], tuple[Path, Path, Path]],
    message: str,
    files: ServerFiles,
    tmp_path: Path,
) -> None:
    other = make_server_files(tmp_path, ["fl.example.org"])

    with pytest.raises(UserError, match=message):
        check_server_files(ServerFiles(*choose(files, other)))


def test_node_key_round_trip(tmp_path: Path) -> None:
    key = make_node_key(tmp_path / "keys" / "north", "north")
    path = tmp_path / "keys" / "north"
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_node_key(path).private_numbers() == key.private_numbers()
    public = path.with_name("north.pub")
    assert public_bytes(load_public_key(public)) == public_bytes(key.public_key())
    assert public.read_text().startswith("ecdsa-sha2-nistp384 ") and public.read_text().endswith(
        " north\n"
    )
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


def test_generated_files_are_consistent(tmp_path: Path) -> None:
    net = tmp_path / "net"
    hosts = ["--host", "fl.example.org", "--host", "10.0.0.7"]
    assert main(["certificates", str(net), *hosts, "--clients", "north, south"]) == 0

    server = load_server_config(net / "server" / "server.yaml")
    assert (server.host, server.port, list(server.nodes)) == ("0.0.0.0", 9092, ["north", "south"])
    files = ServerFiles(
        *(
            Path(server.certificates.model_dump()[name])
            for name in ("authority", "certificate", "key")
        )
    )
    check_server_files(files, ["fl.example.org", "10.0.0.7"])
    for client, public in server.nodes.items():
        site, folder = load_site_config(net / client / "site.yaml")
        assert (
            site.client == client
            and folder == (net / client / "state").resolve()
            and site.server is not None
        )
        assert site.server.address == "fl.example.org:9092"
        key = load_node_key(Path(site.server.key))
        assert public_bytes(key.public_key()) == public_bytes(load_public_key(Path(public)))
        assert (
            Path(site.server.authority).read_bytes()
            == (net / "server" / "authority.pem").read_bytes()
        )
    secret = [path for path in net.rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()]
    assert {str(path.relative_to(net)) for path in secret} == {
        "authority/authority.key", "server/server.key", "north/key", "south/key",
    }  # fmt: skip
    assert all(path.stat().st_mode & 0o077 == 0 for path in secret)


SITE: dict[str, Any] = {"client": "north", "server": {"address": "here:1"}}


@each_case(
    ("change", "line"),
    [
        (
            {"data": {"name": "npz", "path": "dta.npz"}},
            "{site}: data.path: file or folder '{folder}/dta.npz' not found",
        ),
        (
            {"data": {"name": "nzp", "path": "site.yaml"}},
            "{site}: data.name: unknown source 'nzp'; did you mean 'npz'?",
        ),
        (
            {"authority": "nope.pem"},
            "{folder}/nope.pem: the authority's certificate cannot be read (No such file",
        ),
        ({"authority": "key"}, "{folder}/key: expected a certificate in PEM"),
        (
            {"key": "key.pub"},
            "{folder}/key.pub: expected a private key, got the public key; "
            "use the file without .pub",
        ),
    ],
)
def test_node_checks_its_files_before_connecting(
    change: dict[str, Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")
    folder = tmp_path.resolve()
    make_node_key(folder / "key")
    about = {
        "address": "127.0.0.1:1",
        "key": "key",
        **{k: v for k, v in change.items() if k != "data"},
    }
    path = folder / "site.yaml"
    path.write_text(
        yaml.safe_dump(
            {**SITE, "server": about, **{k: v for k, v in change.items() if k == "data"}}
        )
    )
    assert main(["node", "--site", str(path)]) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("error: " + line.format(site=path, folder=folder)) and err.count("\n") == 1
    )
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
    path.write_text(yaml.safe_dump({**SITE, **section}))

    site, _ = load_site_config(path)

    ((name, place),) = expected.items()
    owner = site if name == "encrypt" else site.data
    assert getattr(owner, name) == place.format(site=root / "site", home=root / "home")


def test_client_without_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(yaml.safe_dump({"nodes": {"north": "north.pub", "suoth": "south.pub"}}))
    server = load_server_config(path)
    server.check_clients(["north"], path)  # others may be there for other runs
    with pytest.raises(
        UserError,
        match=r"nodes: no key for 'south', a client of the configuration; did you mean 'suoth'\?",
    ):
        server.check_clients(["north", "south"], path)


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
