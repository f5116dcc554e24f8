"""The key that the clients share, and that the server never receives."""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hetero_fl.communication import authenticated_encryption
from hetero_fl.communication.homomorphic import ckks
from hetero_fl.core.payload import PayloadError
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import (
    CodecError,
    as_bytes,
    as_tensor,
    check_private,
    decode,
    encode,
    write_atomically,
)

if TYPE_CHECKING:
    import tenseal

FORM = "hetero_fl homomorphic key 1"
# Length in bytes of the name of a key.
NAME = 16
# Number of bytes that sealing adds.
SEAL_BYTES = authenticated_encryption.OVERHEAD


@dataclass(frozen=True)
class SharedKey:
    """Key of homomorphic encryption, which all clients share.

    Args:
        secret: CKKS parameters with the secret key, for uploads and their sum.
        seal: Key of 32 bytes for the server's models and state (AES-256-GCM).
    """

    secret: bytes = field(repr=False)
    seal: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> SharedKey:
        """Generate a key from the random number generator of the operating system."""
        ckks.check_tenseal()
        return cls(ckks.new_context(), os.urandom(authenticated_encryption.KEY_LENGTH))

    @classmethod
    def load(cls, path: Path) -> SharedKey:
        """Read a key from a file.

        Raises:
            UserError: If the file cannot be read, is not a key or can be read by other users.
        """
        ckks.check_tenseal()
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{path}: the key cannot be read ({error.strerror}); "
                "create one with `hetero-fl shared-key FILE`"
            ) from None
        check_private(path)
        try:
            tree = decode(data, FORM)
            key = cls(as_bytes(tree["secret"]), as_bytes(tree["seal"]))
            has_secret_key = key.context.has_secret_key()
        except (CodecError, KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{path}: not a key of homomorphic encryption; "
                "create one with `hetero-fl shared-key FILE`"
            ) from None
        if not has_secret_key or len(key.seal) != authenticated_encryption.KEY_LENGTH:
            raise UserError(f"{path}: the key is incomplete; copy the file again")
        return key

    @classmethod
    def load_or_create(cls, path: Path, is_new_run: bool) -> SharedKey:
        """Read the key of a run from a file, which is created for a new run.

        Raises:
            UserError: If the key of a resumed run is missing, or the file is invalid.
        """
        if not path.exists():
            if not is_new_run:
                raise UserError(
                    f"{path}: not found; the state of this run cannot be decrypted without its "
                    "key; restore the file, or start a new run in another folder"
                )
            cls.generate().save(path)
        return cls.load(path)

    def save(self, path: Path) -> None:
        """Write the key to a file that only the owner can read."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tree = {"secret": as_tensor(self.secret), "seal": as_tensor(self.seal)}
        write_atomically(path, encode(tree, FORM), private=True)

    @cached_property
    def context(self) -> tenseal.Context:
        """CKKS parameters with the secret key."""
        return ckks.load_context(self.secret)

    @cached_property
    def name(self) -> bytes:
        """Name of the key, 16 bytes, which does not reveal the key."""
        return hmac.new(self.seal, b"hetero_fl key name" + self.secret, hashlib.sha256).digest()[
            :NAME
        ]

    def encrypt(self, data: bytes, associated_data: bytes) -> bytes:
        """Encrypt and authenticate bytes.

        Args:
            data: The plaintext.
            associated_data: Data that is authenticated but not encrypted.
        """
        return authenticated_encryption.encrypt(self.seal, data, associated_data)

    def decrypt(self, data: bytes, associated_data: bytes) -> bytes:
        """Decrypt the return value of `encrypt`.

        Raises:
            PayloadError: If the key, the ciphertext or the associated data differs.
        """
        try:
            return authenticated_encryption.decrypt(self.seal, data, associated_data)
        except PayloadError:
            raise PayloadError(
                "the server's state cannot be decrypted; all clients need the same key"
            ) from None

    def __getstate__(self) -> dict[str, bytes]:
        # The context cannot be copied to another process.
        return {"secret": self.secret, "seal": self.seal}
