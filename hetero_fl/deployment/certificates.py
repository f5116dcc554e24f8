"""Create certificates and keys, and write the files that a site edits."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import write_atomically

# Who is who between machines: a certificate for the server, a pair of keys for each node; made
# here, or given and checked.
#
# Keys are on the curve P-384. A node's are files as OpenSSH writes them (`ssh-keygen -t ecdsa -b
# 384`), which is what Flower's own tools take too; the server's are PEM.

PublicKey = EllipticCurvePublicKey
VALID = datetime.timedelta(days=825)  # for longer some clients refuse a server's certificate
EARLIER = datetime.timedelta(hours=1)  # clocks of other machines may be a little behind


@dataclass(frozen=True)
class ServerFiles:
    """Where a server's certificate lies, its key, and the certificate of who vouches for it."""

    authority: Path
    certificate: Path
    key: Path


# --- made here ---------------------------------------------------------------------------------------------------------------


def make_server_files(folder: Path, hosts: Sequence[str], name: str = "hetero_fl") -> ServerFiles:
    """An authority of one's own and a certificate of the server's for these host names and addresses, in a folder.

    `authority.pem` is what nodes are given; `authority.key` makes further certificates and belongs elsewhere. Raises UserError
    if the folder has them already.
    """
    files = ServerFiles(folder / "authority.pem", folder / "server.pem", folder / "server.key")
    if there := [f for f in (files.authority, files.certificate, files.key) if f.exists()]:
        raise UserError(f"{there[0]} is there already; another folder, or take it away first")
    if not hosts:
        raise UserError(
            "a server's certificate needs the names under which nodes reach it; none is given"
        )
    root = generate_private_key(SECP384R1())
    key = generate_private_key(SECP384R1())
    issuer = _name(f"{name} authority")
    own = _certificate_builder(issuer, issuer, root.public_key()).add_extension(
        x509.BasicConstraints(True, 0), critical=True
    )
    own = own.add_extension(_usage(signs=True), critical=True)
    vouched = _certificate_builder(_name(hosts[0]), issuer, key.public_key())
    vouched = vouched.add_extension(
        x509.SubjectAlternativeName([_host(h) for h in hosts]), critical=False
    )
    vouched = vouched.add_extension(x509.BasicConstraints(False, None), critical=True)
    vouched = vouched.add_extension(_usage(signs=False), critical=True)
    vouched = vouched.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
    )
    vouched = vouched.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), critical=False
    )
    _write_secret(folder / "authority.key", _pem(root))
    _write_secret(files.key, _pem(key))
    for path, certificate in ((files.authority, own), (files.certificate, vouched)):
        signed = certificate.sign(root, hashes.SHA384())
        write_atomically(path, signed.public_bytes(serialization.Encoding.PEM))
    return files


def make_node_key(path: Path, comment: str = "") -> EllipticCurvePrivateKey:
    """A node's pair of keys: the private one at `path`, the public one, which the server is given, at `path`.pub.

    Raises UserError if there is a file.
    """
    if path.exists():
        raise UserError(f"{path} is there already; another name, or take it away first")
    key = generate_private_key(SECP384R1())
    openssh = serialization.PrivateFormat.OpenSSH
    _write_secret(
        path, key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption())
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    write_atomically(
        path.with_name(path.name + ".pub"),
        public + (f" {comment}" if comment else "").encode() + b"\n",
    )
    return key


def public_bytes(key: PublicKey) -> bytes:
    """A public key as it travels: PEM."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


# --- given -------------------------------------------------------------------------------------------------------------------


def load_node_key(path: Path, whose: str = "a node's") -> EllipticCurvePrivateKey:
    """A node's private key, or the server's. Raises UserError if it is none that Flower takes, or others here can read it."""
    data = _read(path, f"{whose} private key")
    if b"PRIVATE" not in data and data.startswith((b"ecdsa-", b"ssh-", b"-----BEGIN PUBLIC")):
        raise UserError(f"{path}: this is the public key; the private one is the file without .pub")
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise UserError(f"{path}: others can read this private key; chmod 600 {path}")
    try:
        load = (
            serialization.load_ssh_private_key
            if b"OPENSSH" in data
            else serialization.load_pem_private_key
        )
        key = load(data, None)
    except TypeError:
        raise UserError(
            f"{path}: the key is locked with a passphrase; a node needs one without"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(
            f"{path}: no private key is found here; make_node_key or ssh-keygen -t ecdsa makes one"
        ) from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise UserError(
            f"{path}: found another kind of key; a node's is of the kind ecdsa (ssh-keygen -t ecdsa -b 384)"
        )
    return key


def load_public_key(path: Path) -> PublicKey:
    """A node's public key (`….pub`). Raises UserError if it is none that Flower takes."""
    data = _read(path, "a node's public key")
    try:
        load = (
            serialization.load_pem_public_key
            if data.startswith(b"-----")
            else serialization.load_ssh_public_key
        )
        key = load(data)
    except (ValueError, UnsupportedAlgorithm):
        hint = (
            "this is the private one; the server is given the file ….pub"
            if b"PRIVATE" in data
            else "no public key"
        )
        raise UserError(f"{path}: {hint}") from None
    if not isinstance(key, EllipticCurvePublicKey):
        raise UserError(
            f"{path}: found another kind of key; a node's is of the kind ecdsa (ssh-keygen -t ecdsa -b 384)"
        )
    return key


def check_server_files(files: ServerFiles, hosts: Sequence[str] = ()) -> None:
    """Raises UserError with what is wrong: a file, a date, a host name, a key or an authority of something else."""
    authority = _read_certificate(files.authority, "the authority's certificate")
    certificate = _read_certificate(files.certificate, "the server's certificate")
    for path, one in ((files.authority, authority), (files.certificate, certificate)):
        _check_dates(path, one)
    try:
        key = serialization.load_pem_private_key(_read(files.key, "the server's private key"), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(
            f"{files.key}: no private key in PEM without a passphrase is found here"
        ) from None
    if _public_key_info(key.public_key()) != _public_key_info(certificate.public_key()):
        raise UserError(f"{files.key}: this key does not belong to {files.certificate}")
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise UserError(f"{files.certificate}: not vouched for by {files.authority}") from None
    named = _hosts(certificate)
    for host in hosts:
        if host not in named and f"*.{host.partition('.')[2]}" not in named:
            raise UserError(
                f"{files.certificate}: made out to {', '.join(named) or 'nobody'}, not to {host}"
            )


def check_authority(path: Path) -> None:
    """Raises UserError if the certificate that a node was given is none, or is no longer valid."""
    _check_dates(path, _read_certificate(path, "the authority's certificate"))


def _read_certificate(path: Path, what: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path, what))
    except ValueError:
        raise UserError(f"{path}: no certificate in PEM is found here") from None


def _check_dates(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    if certificate.not_valid_after_utc < now:
        raise UserError(
            f"{path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}; a new one is needed"
        )
    if certificate.not_valid_before_utc > now:
        raise UserError(
            f"{path}: not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        )


def _hosts(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [
        *names.get_values_for_type(x509.DNSName),
        *map(str, names.get_values_for_type(x509.IPAddress)),
    ]


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {what} can not be read ({error.strerror})") from None


def _public_key_info(key: object) -> bytes:
    return key.public_bytes(  # type: ignore
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_secret(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _certificate_builder(
    subject: x509.Name, issuer: x509.Name, key: PublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    begun = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    begun = begun.serial_number(x509.random_serial_number()).not_valid_before(now - EARLIER)
    begun = begun.not_valid_after(now - EARLIER + VALID)
    return begun.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


# What the machines of a federation need to know each other: certificates, keys, and files that are
# ready to be edited.

SERVER = "server"
AUTHORITY = "authority"  # folders
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
PORT = 9092

SERVER_FILE = """\
# The server of a federation. It listens here, and these nodes may come.
host: 0.0.0.0
port: {port}
certificates: {{authority: authority.pem, certificate: server.pem, key: server.key}}
nodes:
{nodes}
wait: 600        # seconds until all clients of a configuration have to be there
deadline: 3600   # seconds that a node may take for a task
# metrics: {{host: 127.0.0.1, port: 9464}}   # `hetero-fl status 127.0.0.1:9464`, Prometheus, health checks
# logs: json
"""

SITE_FILE = """\
# One site of a federation. What stands here the server cannot override.
client: {client}
server: {{address: "{host}:{port}", authority: authority.pem, key: key}}
folder: state    # private models and secrets: nobody else's business

# Its own data; without it the site gets the part that the server's configuration deals it, for rehearsals.
# data: {{path: data.npz}}

# What others may know of it, besides what the method sends, the number of its rows and its models' scores.
tells: {{labels: false, details: false, model: false}}
# logs: json
"""


def provision(folder: Path, hosts: Sequence[str], clients: Sequence[str]) -> list[Path]:
    """Make a folder for the server, one for each site, and one for the authority's key. Returns what was written.

    Raises UserError if there is anything in the way, or a name is none of a folder.
    """
    for client in clients:
        if not NAME.fullmatch(client) or client in (SERVER, AUTHORITY):
            raise UserError(
                f"--clients: found '{client}', which cannot be the name of a folder here"
            )
    if twice := [client for client in clients if list(clients).count(client) > 1]:
        raise UserError(f"--clients: '{twice[0]}' is named twice")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; name a new folder")
    server = folder / SERVER
    made = make_server_files(server, hosts)
    authority = folder / AUTHORITY
    authority.mkdir(mode=0o700)
    os.replace(server / "authority.key", authority / "authority.key")  # the server runs without it
    _write(authority / "authority.pem", made.authority.read_text())
    for client in clients:
        site = folder / client
        make_node_key(site / "key", client)
        _write(server / "nodes" / f"{client}.pub", (site / "key.pub").read_text())
        _write(site / "authority.pem", made.authority.read_text())
        _write(
            site / "site.yaml",
            SITE_FILE.format(client=client, host=_bracketed(hosts[0]), port=PORT),
        )
    nodes = "\n".join(f"  {client}: nodes/{client}.pub" for client in clients)
    _write(server / "server.yaml", SERVER_FILE.format(port=PORT, nodes=nodes))
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
