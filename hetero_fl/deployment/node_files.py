"""Files of a node: its keys, and the private states, the last answer and secrets of its runs.

The keys that identify nodes are OpenSSH files of the curve P-384, as `ssh-keygen -t ecdsa -b 384`
creates them. Flower's tools accept this format. The files of runs may be encrypted. Each task names
the state from which it starts, so the server and the node remain consistent after a crash or a
repeated round.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)

from hetero_fl.communication.authenticated_encryption import KEY_LENGTH, decrypt, encrypt
from hetero_fl.core.payload import PayloadError
from hetero_fl.deployment.messages import RequestRefusedError
from hetero_fl.federation.store import BlobStore
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import (
    CodecError,
    check_private,
    sync_folder,
    write_atomically,
)

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


# Number of stored states of a run. The server's two checkpoints may refer to one state each, and a
# running task adds one.
MAX_STATES = 4


def load_or_create_key(path: Path) -> bytes:
    """Return the key in a file, which is created with a new key if it does not exist.

    Raises:
        UserError: If the file cannot be read, is not a key or can be read by other users.
    """
    if not path.exists():
        new_folders = [folder for folder in path.parents if not folder.exists()]
        write_atomically(path, secrets.token_bytes(KEY_LENGTH), private=True)
        for folder in new_folders:
            sync_folder(folder.parent)
    key = _read(path, "the key")
    if len(key) != KEY_LENGTH:
        raise UserError(f"{path}: expected a key of 32 bytes, got {len(key)} bytes")
    check_private(path)
    return key


class NodeStorage:
    """Files in a folder that only the owner can read.

    Args:
        folder: The folder, which is created if it does not exist.
        key: Key that encrypts the files, 32 bytes. The name of a file is authenticated as well, so
            that files cannot be swapped. If None, files are not encrypted.
    """

    def __init__(self, folder: Path, key: bytes | None = None) -> None:
        self.folder = folder
        self.key = key
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)

    def load_state(self, name: str) -> bytes:
        """Load a private state.

        Args:
            name: Name of the state, or an empty string for a task that starts without state.

        Returns:
            The encoded state, or empty bytes if `name` is empty.

        Raises:
            RequestRefusedError: If the state is missing or damaged.
        """
        if not name:
            return b""
        states = self._states()
        try:
            data = states.get(name)
        except (CodecError, OSError):
            raise RequestRefusedError(
                f"the private state {name[:12]}, from which this task starts, is missing or damaged"
            ) from None
        os.utime(states.path(name))
        return data

    def save_state(self, data: bytes, protected: Collection[str] = ()) -> str:
        """Save a private state.

        If there are more than `MAX_STATES` states, the least recently used states are deleted,
        except those in `protected`.

        Args:
            data: The encoded state. If empty, nothing is saved.
            protected: Names of states that are not deleted.

        Returns:
            Name of the state, or an empty string if `data` is empty.
        """
        if not data:
            return ""
        states = self._states()
        name = states.put(data)
        states.sync()
        by_use = sorted(states.names, key=lambda each: states.path(each).stat().st_mtime_ns)
        states.keep([*by_use[-MAX_STATES:], *protected])
        return name

    def _states(self) -> BlobStore:
        return BlobStore(self.folder / "states", self.secret("digests"), self.key)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if it is missing or damaged."""
        try:
            data = (self.folder / name).read_bytes()
            return data if self.key is None else decrypt(self.key, data, name.encode())
        except (FileNotFoundError, PayloadError):
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically."""
        data = data if self.key is None else encrypt(self.key, data, name.encode())
        write_atomically(self.folder / name, data, private=True)

    def drop(self, name: str) -> None:
        """Delete a file if it exists."""
        (self.folder / name).unlink(missing_ok=True)

    def digest(self, data: bytes) -> str:
        """Return the HMAC-SHA-256 of private data under a secret of this folder.

        Digests of private data that leave the site are keyed, because equal data would otherwise
        have equal digests, which confirms a guess.
        """
        return self._states().name_of(data)

    def secret(self, name: str) -> bytes:
        """Return a secret of 256 random bits, which is created on first use.

        Raises:
            UserError: If the file exists but cannot be decrypted.
        """
        secret = self.read(name)
        if secret is None:
            if (self.folder / name).exists():
                raise UserError(
                    f"{self.folder / name}: cannot be decrypted; wrong key or damaged file"
                )
            secret = secrets.token_bytes(32)
            self.write(name, secret)
        return secret
