"""Keys of nodes: OpenSSH files of the curve P-384, as `ssh-keygen -t ecdsa -b 384` creates them.

Flower's tools accept this format.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)

from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import check_private, write_atomically

PublicKey = EllipticCurvePublicKey
KEY_KIND = "expected an ECDSA key, got another kind; create one with ssh-keygen -t ecdsa -b 384"


def make_node_key(path: Path) -> EllipticCurvePrivateKey:
    """Create the key pair of a node.

    Args:
        path: Path of the private key. The path of the public key has the additional suffix `.pub`.

    Returns:
        The private key.

    Raises:
        UserError: If the file already exists.
    """
    if path.exists():
        raise UserError(f"{path}: already exists; choose another name or delete it")
    key = generate_private_key(SECP384R1())
    openssh = serialization.PrivateFormat.OpenSSH
    private = key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption())
    write_atomically(path, private, private=True)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    write_atomically(path.with_name(path.name + ".pub"), public + b"\n")
    return key


def public_bytes(key: PublicKey) -> bytes:
    """Encode a public key in PEM format."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def load_node_key(path: Path) -> EllipticCurvePrivateKey:
    """Load the private key of a node.

    Args:
        path: Path of the key in PEM or OpenSSH format.

    Raises:
        UserError: If the file cannot be read or is not a private key, the key has a passphrase,
            Flower does not support the key, or other users can read the file.
    """
    data = _read(path, "a node's private key")
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


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {what} cannot be read ({error.strerror})") from None
