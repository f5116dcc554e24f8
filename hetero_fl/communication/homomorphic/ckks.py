"""CKKS (Cheon et al. 2017) with TenSEAL: encrypted vectors of integers that can be added.

Clients encrypt with a secret key that they share, and there is no public key. Sums need a single
prime modulus. A decrypted sum is rounded to integers, which removes the noise of CKKS: the result
is exact, and reveals nothing about the key (Li and Micciancio 2021).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from hetero_fl.communication.vector_layout import Words
from hetero_fl.core.payload import PayloadError
from hetero_fl.utils.extras import check_extra

if TYPE_CHECKING:
    import tenseal

# Degree of the polynomials. SEAL accepts up to 109 bits of primes for 128 bits of security.
DEGREE = 4096
# Number of integers in a ciphertext.
SLOTS = DEGREE // 2
# Bits of the modulus of ciphertexts and of a further prime, which SEAL uses for its keys only.
PRIME_BITS = [60, 49]


def check_tenseal() -> None:
    """Check that TenSEAL is installed.

    Raises:
        UserError: If TenSEAL is not installed.
    """
    check_extra("privacy", ["tenseal"], "channel.homomorphic")


def new_context() -> bytes:
    """Return the encoded parameters with a new secret key, and without any other key."""
    return _encode(_generate(), with_secret_key=True)


@lru_cache(maxsize=1)
def public_context() -> bytes:
    """Return the encoded parameters without any key, with which the server adds ciphertexts."""
    return _encode(_generate(), with_secret_key=False)


@lru_cache(maxsize=1)
def ciphertext_length() -> int:
    """Return the length of an encoded ciphertext in bytes, which is the same for all values."""
    return encrypt(_load(new_context()), np.zeros(1, np.uint64), 1).shape[1]


def num_ciphertexts(length: int) -> int:
    """Return the number of ciphertexts of a vector of a given length."""
    return -(-length // SLOTS)


def load_context(data: bytes) -> tenseal.Context:
    """Decode the parameters and the keys that they contain.

    Raises:
        ValueError: If the data is malformed.
    """
    try:
        return _load(data)
    # TenSEAL raises exceptions of different types.
    except Exception as error:
        raise ValueError(f"malformed parameters ({type(error).__name__})") from None


def encrypt(context: tenseal.Context, words: Words, noise_bits: int) -> np.ndarray:
    """Encrypt a vector of integers.

    Args:
        context: Parameters with the secret key.
        words: The integers modulo 2^64, shape `[L]`. The last ciphertext is padded with zeros.
        noise_bits: Number of binary digits below 1 that contain the noise.

    Returns:
        The encoded ciphertexts, dtype uint8, shape `[num_ciphertexts(L), ciphertext_length()]`.
    """
    import tenseal

    padded = np.zeros(num_ciphertexts(len(words)) * SLOTS)
    padded[: len(words)] = words.view(np.int64)
    rows = [
        tenseal.ckks_vector(context, block.tolist(), scale=2.0**noise_bits).serialize()
        for block in padded.reshape(-1, SLOTS)
    ]
    return np.frombuffer(bytearray(b"".join(rows)), np.uint8).reshape(len(rows), -1)


def decrypt(context: tenseal.Context, rows: np.ndarray, length: int, noise_bits: int) -> Words:
    """Decrypt a vector of integers, or a sum of such vectors.

    Args:
        context: Parameters with the secret key.
        rows: The encoded ciphertexts, as returned by `encrypt`.
        length: Length of the vector.
        noise_bits: Number of binary digits below 1 that contain the noise, as in `encrypt`.

    Returns:
        The integers modulo 2^64, shape `[length]`.

    Raises:
        PayloadError: If a ciphertext is malformed, or a value is larger than any sum. With another
            key, values are random, and nearly all of them are larger.
    """
    blocks = [np.array(_load_ciphertext(context, row).decrypt()) for row in rows]
    rounded = np.rint(np.concatenate(blocks)[:length])
    # `HomomorphicConfig.max_fraction_bits` limits sums to a quarter of the modulus.
    if not np.abs(rounded).max(initial=0.0) < 2.0 ** (PRIME_BITS[0] - 2 - noise_bits):
        raise PayloadError("the sum cannot be decrypted with this key")
    return rounded.astype(np.int64).view(np.uint64)


class EncryptedSum:
    """Sum of encrypted vectors, which needs no key.

    Args:
        length: Length of the vectors.

    Attributes:
        context: The parameters without keys.
    """

    def __init__(self, length: int) -> None:
        self.shape = num_ciphertexts(length), ciphertext_length()
        self.context = _load(public_context())
        self._total: list[tenseal.CKKSVector] = []

    def add(self, rows: np.ndarray) -> None:
        """Add an encrypted vector.

        Args:
            rows: The encoded ciphertexts, as returned by `encrypt`.

        Raises:
            PayloadError: If the number or the length of ciphertexts is wrong, or a ciphertext is
                malformed. The sum does not change.
        """
        if rows.shape != self.shape:
            raise PayloadError(
                f"ciphertexts: expected the shape {self.shape}, got {tuple(rows.shape)}"
            )
        vectors = [_load_ciphertext(self.context, row) for row in rows]
        if not self._total:
            self._total = vectors
            return
        try:
            sums = [old + new for old, new in zip(self._total, vectors, strict=True)]
        except Exception as error:
            raise PayloadError(f"ciphertexts: {error}") from None
        self._total = sums

    def rows(self) -> np.ndarray:
        """Return the encoded ciphertexts of the sum, in the format of `encrypt`."""
        encoded = b"".join(vector.serialize() for vector in self._total)
        return np.frombuffer(bytearray(encoded), np.uint8).reshape(self.shape)


def _generate() -> tenseal.Context:
    import tenseal

    return tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        DEGREE,
        coeff_mod_bit_sizes=PRIME_BITS,
        encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
        n_threads=1,
    )


def _load(data: bytes) -> tenseal.Context:
    import tenseal

    return tenseal.context_from(data, n_threads=1)


def _encode(context: tenseal.Context, with_secret_key: bool) -> bytes:
    encoded: bytes = context.serialize(
        save_public_key=False,
        save_secret_key=with_secret_key,
        save_galois_keys=False,
        save_relin_keys=False,
    )
    return encoded


def _load_ciphertext(context: tenseal.Context, row: np.ndarray) -> tenseal.CKKSVector:
    import tenseal

    try:
        vector = tenseal.ckks_vector_from(context, row.tobytes())
        size = vector.size()
    except Exception as error:
        raise PayloadError(f"ciphertext: malformed ({type(error).__name__})") from None
    if size != SLOTS or len(vector.ciphertext()) != 1:
        raise PayloadError(f"ciphertext: expected {SLOTS} numbers, got {size}")
    return vector
