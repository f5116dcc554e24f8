"""Homomorphic encryption with TenSEAL: vectors that the server adds and only clients can decrypt.

CKKS (Cheon et al. 2017) encrypts vectors of integers. All clients encrypt and decrypt with one
secret key, and there is no public key. Sums need a single prime modulus. A decrypted sum is rounded
to integers, which removes the noise of CKKS: the result is exact, and reveals nothing about the key
(Li and Micciancio 2021).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hetero_fl.communication.vector_layout import Words
from hetero_fl.core.payload import PayloadError
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.extras import check_extra
from hetero_fl.utils.serialization import check_private, write_atomically

if TYPE_CHECKING:
    import tenseal

# Degree of the polynomials. SEAL accepts up to 109 bits of primes for 128 bits of security.
DEGREE = 4096
# Number of integers in a ciphertext.
SLOTS = DEGREE // 2
# Bits of the modulus of ciphertexts and of a further prime, which SEAL uses for its keys only.
PRIME_BITS = [60, 49]
# Number of characters of the name of a key.
KEY_NAME = 32


def check_tenseal() -> None:
    """Check that TenSEAL is installed.

    Raises:
        UserError: If TenSEAL is not installed.
    """
    check_extra("he", ["tenseal"], "channel.homomorphic")


@dataclass(frozen=True)
class SharedKey:
    """Key that all clients share, and that the server never receives.

    Args:
        secret: Encoded CKKS parameters with the secret key.
    """

    secret: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> SharedKey:
        """Generate a key from the random number generator of the operating system."""
        check_tenseal()
        return cls(_encode(_generate(), with_secret_key=True))

    @classmethod
    def load(cls, path: Path) -> SharedKey:
        """Read a key from a file.

        Raises:
            UserError: If the file cannot be read, is not a key or can be read by other users.
        """
        check_tenseal()
        try:
            key = cls(path.read_bytes())
        except OSError as error:
            raise UserError(
                f"{path}: the key cannot be read ({error.strerror}); restore the file of the run, "
                "or create one for a new run with `hetero-fl shared-key FILE`"
            ) from None
        check_private(path)
        try:
            has_secret_key = key.context.has_secret_key()
        # TenSEAL raises exceptions of different types.
        except Exception:
            has_secret_key = False
        if not has_secret_key:
            raise UserError(
                f"{path}: not a key of homomorphic encryption; "
                "create one with `hetero-fl shared-key FILE`"
            )
        return key

    def save(self, path: Path) -> None:
        """Write the key to a file that only the owner can read."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.secret, private=True)

    @property
    def context(self) -> tenseal.Context:
        """CKKS parameters with the secret key."""
        return _load(self.secret)

    @property
    def name(self) -> str:
        """Name of the key, which does not reveal the key."""
        return hashlib.sha256(self.secret).hexdigest()[:KEY_NAME]

    def encrypt(self, words: Words, noise_bits: int) -> np.ndarray:
        """Encrypt a vector of integers.

        Args:
            words: The integers modulo 2^64, shape `[L]`. The last ciphertext is padded with zeros.
            noise_bits: Number of binary digits below 1 that contain the noise.

        Returns:
            The encoded ciphertexts, dtype uint8, with the shape `ciphertext_shape(L)`.
        """
        import tenseal

        rows, _ = ciphertext_shape(len(words))
        padded = np.zeros(rows * SLOTS)
        padded[: len(words)] = words.view(np.int64)
        vectors = [
            tenseal.ckks_vector(self.context, block.tolist(), scale=2.0**noise_bits)
            for block in padded.reshape(rows, SLOTS)
        ]
        return _to_rows(vectors)

    def decrypt(self, rows: np.ndarray, length: int, noise_bits: int) -> Words:
        """Decrypt a vector of integers, or a sum of such vectors.

        Args:
            rows: The encoded ciphertexts, as returned by `encrypt`.
            length: Length of the vector.
            noise_bits: Number of binary digits below 1 that contain the noise, as in `encrypt`.

        Returns:
            The integers modulo 2^64, shape `[length]`.

        Raises:
            PayloadError: If a ciphertext is malformed, or a value is larger than any sum. With
                another key, values are random, and nearly all of them are larger.
        """
        vectors = _load_vectors(self.context, rows, length)
        rounded = np.rint(np.concatenate([vector.decrypt() for vector in vectors])[:length])
        # `HomomorphicConfig.max_fraction_bits` limits sums to a quarter of the modulus.
        if not np.abs(rounded).max(initial=0.0) < 2.0 ** (PRIME_BITS[0] - 2 - noise_bits):
            raise PayloadError("the sum cannot be decrypted with this key")
        return rounded.astype(np.int64).view(np.uint64)


class EncryptedSum:
    """Sum of encrypted vectors, which needs no key.

    Args:
        length: Length of the vectors.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._total: list[tenseal.CKKSVector] = []

    def add(self, rows: np.ndarray) -> None:
        """Add an encrypted vector.

        Args:
            rows: The encoded ciphertexts, as returned by `SharedKey.encrypt`.

        Raises:
            PayloadError: If the number or the length of ciphertexts is wrong, or a ciphertext is
                malformed. The sum does not change.
        """
        vectors = _load_vectors(_load(public_context()), rows, self.length)
        if not self._total:
            self._total = vectors
            return
        try:
            self._total = [old + new for old, new in zip(self._total, vectors, strict=True)]
        except Exception as error:
            raise PayloadError(f"ciphertexts: {error}") from None

    def rows(self) -> np.ndarray:
        """Return the encoded ciphertexts of the sum, in the format of `SharedKey.encrypt`."""
        return _to_rows(self._total)


@lru_cache(maxsize=1)
def public_context() -> bytes:
    """Return the encoded parameters without any key, with which the server adds ciphertexts."""
    return _encode(_generate(), with_secret_key=False)


def ciphertext_shape(length: int) -> tuple[int, int]:
    """Return the number of ciphertexts of a vector of a given length, and their length in bytes."""
    return -(-length // SLOTS), _ciphertext_length()


@lru_cache(maxsize=1)
def _ciphertext_length() -> int:
    import tenseal

    zeros = tenseal.ckks_vector(_generate(), [0.0] * SLOTS, scale=1.0)
    return len(zeros.serialize())


def _generate() -> tenseal.Context:
    import tenseal

    return tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        DEGREE,
        coeff_mod_bit_sizes=PRIME_BITS,
        encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
        n_threads=1,
    )


@lru_cache(maxsize=4)
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


def _to_rows(vectors: list[tenseal.CKKSVector]) -> np.ndarray:
    encoded = b"".join(vector.serialize() for vector in vectors)
    return np.frombuffer(bytearray(encoded), np.uint8).reshape(len(vectors), -1)


def _load_vectors(
    context: tenseal.Context, rows: np.ndarray, length: int
) -> list[tenseal.CKKSVector]:
    """Decode the ciphertexts of a vector of a given length."""
    import tenseal

    expected = ciphertext_shape(length)
    if rows.shape != expected:
        raise PayloadError(f"ciphertexts: expected the shape {expected}, got {tuple(rows.shape)}")
    try:
        vectors = [tenseal.ckks_vector_from(context, row.tobytes()) for row in rows]
        sizes = {(vector.size(), len(vector.ciphertext())) for vector in vectors}
    except Exception as error:
        raise PayloadError(f"ciphertext: malformed ({type(error).__name__})") from None
    if sizes != {(SLOTS, 1)}:
        raise PayloadError(f"ciphertext: expected {SLOTS} numbers in each, got {sizes}")
    return vectors
