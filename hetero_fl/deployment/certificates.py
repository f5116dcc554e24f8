"""Creation and validation of certificates and keys, and templates of server and site files.

All keys use the curve P-384. The keys of nodes are OpenSSH files (`ssh-keygen -t ecdsa -b 384`),
because Flower's tools accept this format. The keys of the server are PEM files.
"""

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

from hetero_fl.utils.errors import ArgumentError, UserError
from hetero_fl.utils.serialization import check_private, write_atomically

PublicKey = EllipticCurvePublicKey
# Some TLS clients reject server certificates with a longer validity period.
VALIDITY = datetime.timedelta(days=825)
# Certificates are valid from this time before their creation, because other clocks may be slow.
CLOCK_TOLERANCE = datetime.timedelta(hours=1)
SERVER = "server"
AUTHORITY = "authority"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
PORT = 9092
KEY_KIND = "expected an ECDSA key, got another kind; create one with ssh-keygen -t ecdsa -b 384"

SERVER_FILE = """\
# The server of a federation: its address and the nodes that may connect.
host: 0.0.0.0
port: {port}
certificates: {{authority: authority.pem, certificate: server.pem, key: server.key}}
nodes:
{nodes}
wait: 600        # seconds to wait for all clients
deadline: 3600   # seconds that a node may take for a task
# For `hetero-fl status 127.0.0.1:9464`, Prometheus and health checks:
# metrics: {{host: 127.0.0.1, port: 9464}}
# logs: json
"""

SITE_FILE = """\
# A site of a federation. The server cannot override these settings.
client: {client}
server: {{address: "{host}:{port}", authority: authority.pem, key: key}}
folder: state    # private models and secrets

# The site's data. Without it, the site gets its part of the data in the server's configuration.
# data: {{name: npz, path: data.npz}}

# What the server may learn besides uploads, the number of rows and scores.
tells: {{labels: false, details: false, model: false}}
# logs: json
"""


@dataclass(frozen=True)
class ServerFiles:
    """Paths of the certificates and the key of a server.

    Args:
        authority: Certificate of the authority that signed the server's certificate.
        certificate: The server's certificate.
        key: The server's private key.
    """

    authority: Path
    certificate: Path
    key: Path


def make_server_files(folder: Path, hosts: Sequence[str], name: str = "hetero_fl") -> ServerFiles:
    """Create a certificate authority and a server certificate.

    Nodes need `authority.pem`. The file `authority.key` can sign more certificates. Store this file
    on another machine.

    Args:
        folder: Output folder.
        hosts: Host names and addresses at which nodes reach the server.
        name: Prefix of the name of the authority.

    Returns:
        Paths of the certificates and of the server's key.

    Raises:
        UserError: If a file already exists or `hosts` is empty.
    """
    files = ServerFiles(folder / "authority.pem", folder / "server.pem", folder / "server.key")
    for path in (files.authority, files.certificate, files.key):
        if path.exists():
            raise UserError(f"{path}: already exists; choose another folder or delete it")
    if not hosts:
        raise ArgumentError(
            "hosts: missing; expected the host name or address under which nodes reach the server"
        )
    root = generate_private_key(SECP384R1())
    key = generate_private_key(SECP384R1())
    issuer = _name(f"{name} authority")
    root_certificate = _certificate_builder(issuer, issuer, root.public_key()).add_extension(
        x509.BasicConstraints(True, 0), critical=True
    )
    root_certificate = root_certificate.add_extension(_key_usage(signs=True), critical=True)
    certificate = _certificate_builder(_name(hosts[0]), issuer, key.public_key())
    certificate = certificate.add_extension(
        x509.SubjectAlternativeName([_general_name(h) for h in hosts]), critical=False
    )
    certificate = certificate.add_extension(x509.BasicConstraints(False, None), critical=True)
    certificate = certificate.add_extension(_key_usage(signs=False), critical=True)
    certificate = certificate.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
    )
    certificate = certificate.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), critical=False
    )
    _write_secret(folder / "authority.key", _pem(root))
    _write_secret(files.key, _pem(key))
    for path, unsigned in ((files.authority, root_certificate), (files.certificate, certificate)):
        signed = unsigned.sign(root, hashes.SHA384())
        write_atomically(path, signed.public_bytes(serialization.Encoding.PEM))
    return files


def make_node_key(path: Path, comment: str = "") -> EllipticCurvePrivateKey:
    """Create the key pair of a node.

    Args:
        path: Path of the private key. The path of the public key has the additional suffix `.pub`.
        comment: Comment in the file of the public key. If empty, there is no comment.

    Returns:
        The private key.

    Raises:
        UserError: If the file already exists.
    """
    if path.exists():
        raise UserError(f"{path}: already exists; choose another name or delete it")
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
    """Encode a public key in PEM format."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def load_node_key(path: Path, whose: str = "a node's") -> EllipticCurvePrivateKey:
    """Load the private key of a node.

    Args:
        path: Path of the key in PEM or OpenSSH format.
        whose: Owner of the key, for error messages.

    Raises:
        UserError: If the file cannot be read or is not a private key, the key has a passphrase,
            Flower does not support the key, or other users can read the file.
    """
    data = _read(path, f"{whose} private key")
    if b"PRIVATE" not in data and data.startswith((b"ecdsa-", b"ssh-", b"-----BEGIN PUBLIC")):
        raise UserError(
            f"{path}: expected a private key, got the public key; use the file without .pub"
        )
    check_private(path, "private key")
    try:
        load = (
            serialization.load_ssh_private_key
            if b"OPENSSH" in data
            else serialization.load_pem_private_key
        )
        key = load(data, None)
    except TypeError:
        raise UserError(f"{path}: the key has a passphrase; create a key without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(
            f"{path}: not a private key; create one with ssh-keygen -t ecdsa -b 384"
        ) from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise UserError(f"{path}: {KEY_KIND}")
    return key


def load_public_key(path: Path) -> PublicKey:
    """Load the public key of a node (`*.pub`).

    Raises:
        UserError: If the file cannot be read or is not a public key, or if Flower does not support
            the key.
    """
    data = _read(path, "a node's public key")
    try:
        load = (
            serialization.load_pem_public_key
            if data.startswith(b"-----")
            else serialization.load_ssh_public_key
        )
        key = load(data)
    except (ValueError, UnsupportedAlgorithm):
        found = "the private key; use the file ….pub" if b"PRIVATE" in data else "another file"
        raise UserError(f"{path}: expected a public key, got {found}") from None
    if not isinstance(key, EllipticCurvePublicKey):
        raise UserError(f"{path}: {KEY_KIND}")
    return key


def check_server_files(files: ServerFiles, hosts: Sequence[str] = ()) -> None:
    """Check that the server's certificates and key are valid and match.

    Args:
        files: Paths of the certificates and of the key.
        hosts: Host names and addresses for which the certificate must be valid. If empty, hosts
            are not checked.

    Raises:
        UserError: If a file is invalid, a certificate has expired or is not valid yet, the server's
            certificate is not valid for a host, or the key or the authority does not match this
            certificate.
    """
    authority = _read_certificate(files.authority, "the authority's certificate")
    certificate = _read_certificate(files.certificate, "the server's certificate")
    _check_dates(files.authority, authority)
    _check_dates(files.certificate, certificate)
    private = _read(files.key, "the server's private key")
    try:
        key = serialization.load_pem_private_key(private, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(
            f"{files.key}: expected a private key in PEM without a passphrase"
        ) from None
    if _public_key_info(key.public_key()) != _public_key_info(certificate.public_key()):
        raise UserError(f"{files.key}: does not match the certificate {files.certificate}")
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise UserError(f"{files.certificate}: not signed by {files.authority}") from None
    names = _host_names(certificate)
    for host in hosts:
        if host not in names and f"*.{host.partition('.')[2]}" not in names:
            raise UserError(
                f"{files.certificate}: not valid for {host}; "
                f"its hosts are {', '.join(names) or '[]'}"
            )


def check_authority(path: Path) -> None:
    """Check the certificate with which a node verifies the server.

    Raises:
        UserError: If the file is not a certificate, or the certificate has expired or is not valid
            yet.
    """
    _check_dates(path, _read_certificate(path, "the authority's certificate"))


def _read_certificate(path: Path, what: str) -> x509.Certificate:
    data = _read(path, what)
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError:
        raise UserError(f"{path}: expected a certificate in PEM") from None


def _check_dates(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    if certificate.not_valid_after_utc < now:
        raise UserError(
            f"{path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}; create a new one"
        )
    if certificate.not_valid_before_utc > now:
        raise UserError(
            f"{path}: not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        )


def _host_names(certificate: x509.Certificate) -> list[str]:
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
        raise UserError(f"{path}: {what} cannot be read ({error.strerror})") from None


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
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(
        now - CLOCK_TOLERANCE
    )
    builder = builder.not_valid_after(now - CLOCK_TOLERANCE + VALIDITY)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(signs: bool) -> x509.KeyUsage:
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


def provision(folder: Path, hosts: Sequence[str], clients: Sequence[str]) -> list[Path]:
    """Create folders with keys and configuration files for the server and all sites.

    The key of the certificate authority is written to a separate folder.

    Args:
        folder: Output folder, which must be new or empty.
        hosts: Host names and addresses at which nodes reach the server.
        clients: Names of the clients.

    Returns:
        Paths of the written files.

    Raises:
        UserError: If the folder is not empty, `hosts` is empty, or a client name occurs twice or is
            not a valid folder name.
    """
    for client in clients:
        if not NAME.fullmatch(client) or client in (SERVER, AUTHORITY):
            raise ArgumentError(
                f"clients: '{client}' cannot be a folder name; use letters, digits, '_', '.' and "
                f"'-', but not {SERVER} or {AUTHORITY}"
            )
    for client in clients:
        if list(clients).count(client) > 1:
            raise ArgumentError(f"clients: duplicate client '{client}'")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already exists; choose another folder or delete it")
    server = folder / SERVER
    files = make_server_files(server, hosts)
    authority = folder / AUTHORITY
    authority.mkdir(mode=0o700)
    # The server does not need the key of the authority.
    os.replace(server / "authority.key", authority / "authority.key")
    _write(authority / "authority.pem", files.authority.read_text())
    for client in clients:
        site = folder / client
        make_node_key(site / "key", client)
        _write(server / "nodes" / f"{client}.pub", (site / "key.pub").read_text())
        _write(site / "authority.pem", files.authority.read_text())
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
