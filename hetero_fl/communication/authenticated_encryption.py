"""Authenticated encryption of bytes with AES-256-GCM (NIST SP 800-38D)."""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hetero_fl.core.payload import PayloadError

# Length in bytes of a key.
KEY_LENGTH = 32
# Length in bytes of the random nonce.
NONCE = 12
# Bytes that encryption adds: the nonce and an authentication tag of 16 bytes.
OVERHEAD = NONCE + 16


def encrypt(key: bytes, plain: bytes, associated_data: bytes) -> bytes:
    """Encrypt and authenticate bytes.

    Args:
        key: The key, 32 bytes.
        plain: The plaintext.
        associated_data: Data that is authenticated but not encrypted.

    Returns:
        The nonce, followed by the ciphertext and the authentication tag.
    """
    nonce = os.urandom(NONCE)
    return nonce + AESGCM(key).encrypt(nonce, plain, associated_data)


def decrypt(key: bytes, sealed: bytes, associated_data: bytes) -> bytes:
    """Decrypt bytes that were encrypted by `encrypt`.

    Args:
        key: The key, 32 bytes.
        sealed: The return value of `encrypt`.
        associated_data: The data that was passed to `encrypt`.

    Returns:
        The plaintext.

    Raises:
        PayloadError: If the key, the ciphertext or the associated data differs from the original.
    """
    try:
        return AESGCM(key).decrypt(sealed[:NONCE], sealed[NONCE:], associated_data)
    except (InvalidTag, ValueError):
        raise PayloadError("the message cannot be decrypted") from None
