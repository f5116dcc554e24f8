"""Certificates and keys: new ones are valid, and faults in given ones are one-line errors."""

from __future__ import annotations

import datetime
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

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
