"""Key agreement and sealing for the secure sum: X25519, HKDF-SHA256, AES-256-GCM (RFC 7748, 5869; NIST SP 800-38D).

Keys are drawn from the operating system, never from the run's seed: whoever knows the seed could take every mask off. They live
for one round.
"""

from __future__ import annotations

import hashlib
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hetero_fl.payload import PayloadError

PRIME = 2**255 - 19
LENGTH = 32  # bytes of a private key, a public key, an agreed key and a seed
NONCE, MARK = 12, 16  # bytes that sealing adds


def new_key() -> bytes:
    """A private key."""
    return X25519PrivateKey.generate().private_bytes_raw()


def new_seed() -> bytes:
    """32 secret bytes."""
    return os.urandom(LENGTH)


def public(private: bytes) -> bytes:
    """The public key of a private one."""
    return loaded(private).public_key().public_bytes_raw()


def loaded(private: bytes) -> X25519PrivateKey:
    """A private key ready to agree with many others: loading takes as long as agreeing."""
    return X25519PrivateKey.from_private_bytes(private)


def check(public: bytes) -> None:
    """Raise PayloadError for a public key of low order, or one that is not written as RFC 7748 has it (below 2^255 − 19)."""
    if int.from_bytes(public, "little") >= PRIME:
        raise PayloadError("a public key that is none")
    agree(loaded(new_key()), public, b"check")


def agree(private: X25519PrivateKey, other: bytes, purpose: bytes) -> bytes:
    """The key that two parties have in common for a purpose: the same from either side.

    Raises PayloadError for a public key of low order, with which anybody's result would be the same.
    """
    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:
        raise PayloadError("a public key that is none") from None
    return HKDF(SHA256(), LENGTH, None, b"hetero_fl secure sum: " + purpose).derive(secret)


def seal(key: bytes, plain: bytes, about: bytes) -> bytes:
    """Encrypted, and bound to what it is about."""
    nonce = os.urandom(NONCE)
    return nonce + AESGCM(key).encrypt(nonce, plain, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """The reverse of `seal`. Raises PayloadError if it was made with another key, or about something else, or changed."""
    try:
        return AESGCM(key).decrypt(sealed[:NONCE], sealed[NONCE:], about)
    except (InvalidTag, ValueError):
        raise PayloadError("a sealed share that does not open") from None


def commitment(seed: bytes, tag: bytes) -> bytes:
    """What binds a client to its seed without telling it: the seed has 256 bits to guess."""
    return hashlib.sha256(b"hetero_fl secure sum: seed" + tag + seed).digest()
