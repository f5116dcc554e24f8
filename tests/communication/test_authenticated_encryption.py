"""Authenticated encryption: only the key and the associated data decrypt a message."""

from __future__ import annotations

import os

import pytest

from hetero_fl.communication.authenticated_encryption import (
    KEY_LENGTH,
    OVERHEAD,
    decrypt,
    encrypt,
)
from hetero_fl.core.payload import PayloadError


def test_sealed_message_opens_only_for_recipient_and_context() -> None:
    key, plain = os.urandom(KEY_LENGTH), b"a share"
    sealed = encrypt(key, plain, b"1 to 2")
    assert decrypt(key, sealed, b"1 to 2") == plain and encrypt(key, plain, b"1 to 2") != sealed
    assert len(sealed) == len(plain) + OVERHEAD
    changed = sealed[:-1] + bytes([sealed[-1] ^ 1])
    wrong = [
        (os.urandom(KEY_LENGTH), sealed, b"1 to 2"),
        (key, changed, b"1 to 2"),
        (key, sealed, b"2 to 1"),
        (key, b"", b""),
    ]
    for k, s, about in wrong:
        with pytest.raises(PayloadError, match="cannot be decrypted"):
            decrypt(k, s, about)
