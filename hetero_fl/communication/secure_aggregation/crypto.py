"""Key agreement, secret sharing, masks, fixed-point numbers and the mask graph."""

from __future__ import annotations

import hashlib
import math
import os
import random
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hetero_fl.config.communication import SecureAggregationConfig
from hetero_fl.core.payload import PayloadError

# Key agreement and sealing for the secure sum: X25519, HKDF-SHA256, AES-256-GCM (RFC 7748, 5869;
# NIST SP 800-38D).
#
# Keys are drawn from the operating system, never from the run's seed: whoever knows the seed could
# take every mask off. They live for one round.

PRIME = 2**255 - 19
KEY_LENGTH = 32  # bytes of a private key, a public key, an agreed key and a seed
NONCE = 12
MARK = 16  # bytes that sealing adds


def new_key() -> bytes:
    """A private key."""
    return X25519PrivateKey.generate().private_bytes_raw()


def new_seed() -> bytes:
    """32 secret bytes."""
    return os.urandom(KEY_LENGTH)


def public_key(private: bytes) -> bytes:
    """The public key of a private one."""
    return load_private_key(private).public_key().public_bytes_raw()


def load_private_key(private: bytes) -> X25519PrivateKey:
    """A private key ready to agree with many others: loading takes as long as agreeing."""
    return X25519PrivateKey.from_private_bytes(private)


def check_public_key(public: bytes) -> None:
    """Raise PayloadError for a public key of low order, or one that is not written as RFC 7748 has it (below 2^255 − 19)."""
    if int.from_bytes(public, "little") >= PRIME:
        raise PayloadError("a public key that is none")
    derive_shared_key(load_private_key(new_key()), public, b"check")


def derive_shared_key(private: X25519PrivateKey, public: bytes, purpose: bytes) -> bytes:
    """The key that two parties have in common for a purpose: the same from either side.

    Raises PayloadError for a public key of low order, with which anybody's result would be the same.
    """
    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise PayloadError("a public key that is none") from None
    return HKDF(SHA256(), KEY_LENGTH, None, b"hetero_fl secure sum: " + purpose).derive(secret)


def encrypt(key: bytes, plain: bytes, associated_data: bytes) -> bytes:
    """Encrypted, and bound to what it is about."""
    nonce = os.urandom(NONCE)
    return nonce + AESGCM(key).encrypt(nonce, plain, associated_data)


def decrypt(key: bytes, sealed: bytes, associated_data: bytes) -> bytes:
    """The reverse of `seal`. Raises PayloadError if it was made with another key, or about something else, or changed."""
    try:
        return AESGCM(key).decrypt(sealed[:NONCE], sealed[NONCE:], associated_data)
    except (InvalidTag, ValueError):
        raise PayloadError("a sealed share that does not open") from None


def commit_to_seed(seed: bytes, tag: bytes) -> bytes:
    """What binds a client to its seed without telling it: the seed has 256 bits to guess."""
    return hashlib.sha256(b"hetero_fl secure sum: seed" + tag + seed).digest()


# Secrets shared so that any t holders can put them together and fewer learn nothing (Shamir 1979).
#
# Secrets are 32 bytes, numbers below the prime 2^256 + 297. A polynomial of 100 shares with t = 67
# takes a millisecond, so plain integers do.

FIELD_PRIME = 2**256 + 297
SHARE_LENGTH = 33  # bytes of a share


def split_secret(secret: bytes, threshold: int, holders: Sequence[int]) -> list[bytes]:
    """A share for each holder: a random polynomial of degree t − 1 whose value at 0 is the secret, at the holders' numbers.

    Holders are distinct numbers from 1 on; raises ValueError otherwise.
    """
    if (
        len(set(holders)) < len(holders)
        or min(holders, default=1) < 1
        or not 1 <= threshold <= len(holders)
    ):
        raise ValueError("holders are distinct numbers from 1 on, and no fewer than the threshold")
    coefficients = [secrets.randbelow(FIELD_PRIME) for _ in range(threshold - 1)]
    constant = int.from_bytes(secret, "little")
    made = []
    for x in holders:
        y = 0
        for coefficient in coefficients:
            y = (y + coefficient) * x % FIELD_PRIME
        made.append(((y + constant) % FIELD_PRIME).to_bytes(SHARE_LENGTH, "little"))
    return made


def combine_shares(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of which these are shares, by holder; None if they are shares of nothing that `split` was given."""
    weights = _lagrange_weights_at_zero(tuple(shares))
    total = sum(
        weight * int.from_bytes(share, "little")
        for weight, share in zip(weights, shares.values(), strict=True)
    )
    return None if total % FIELD_PRIME >= 2**256 else (total % FIELD_PRIME).to_bytes(32, "little")


@lru_cache(maxsize=64)  # in a complete graph the same holders answer for everybody
def _lagrange_weights_at_zero(holders: tuple[int, ...]) -> list[int]:
    """Lagrange's weights of values at these numbers for the value at 0."""
    made = []
    for x in holders:
        above = 1
        below = 1
        for other in holders:
            if other != x:
                above = above * other % FIELD_PRIME
                below = below * (other - x) % FIELD_PRIME
        made.append(above * pow(below, -1, FIELD_PRIME) % FIELD_PRIME)
    return made


# Masks: keystreams as vectors of 64-bit integers, added to a vector in place.
#
# AES-256 in counter mode, which was measured faster here than ChaCha20 (1.1 against 1.3 ms for 8
# MB, in blocks that stay in the cache; 10 ms in one piece). A key serves one mask of one round, so
# the counter starts at nought.

BLOCK = 2**15  # integers: a quarter of a megabyte
Words: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint64]]"


def apply_masks(vector: Words, streams: Iterable[tuple[bytes, bool]]) -> None:
    """Add to the vector, modulo 2^64 and in place, the mask of each 32-byte key; True: take it off."""
    zeros = bytes(8 * BLOCK)
    made = bytearray(8 * BLOCK + 15)
    stream = np.frombuffer(made, "<u8", BLOCK)
    ciphers = [(Cipher(AES(key), CTR(bytes(16))).encryptor(), off) for key, off in streams]
    for start in range(0, len(vector), BLOCK):
        part = vector[start : start + BLOCK]
        for cipher, off in ciphers:
            cipher.update_into(memoryview(zeros)[: 8 * len(part)], made)
            (np.subtract if off else np.add)(part, stream[: len(part)], out=part)


# Numbers as integers modulo 2^64, so that sums are exact and masks cancel to the last bit.


@dataclass(frozen=True)
class FixedPoint:
    """x stands as round(x · 2^bits) modulo 2^64, for |x| ≤ limit; negative ones in two's complement.

    No sum over `cohort` of them leaves the range where the configuration was checked: cohort · limit · 2^bits < 2^63.
    """

    bits: int
    limit: float

    @classmethod
    def from_config(cls, config: SecureAggregationConfig, cohort: int) -> FixedPoint:
        """As configured, for so many clients."""
        return cls(config.num_fraction_bits(cohort), config.range)

    def encode(self, values: np.ndarray) -> Words:
        """Integers `[L]` of float64 values `[L]`. Raises PayloadError for what is not finite or beyond the limit."""
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= self.limit:
            raise PayloadError(
                f"found {largest:.6g}, but channel.secure_sum.range is {self.limit:g}"
            )
        return np.rint(values * 2.0**self.bits).astype(np.int64).view(np.uint64)

    def decode(self, total: Words) -> np.ndarray:
        """The values `[L]`, float64, of a sum."""
        return total.view(np.int64) * 2.0**-self.bits


# Who shares masks with whom: everybody with everybody, or a sparse random graph (Bell et al. 2020,
# SecAgg+).
#
# Clients stand in a circle in an order that the server draws; each is a neighbour of the k/2 on
# either side (a Harary graph with random labels, their section 3). A client's cost then grows with
# k, which grows with the logarithm of the cohort.

# share of clients that tell the server what they know, against whom a graph is still safe
COLLUDING = 0.2
SECURITY = 40
CORRECTNESS = (
    20  # bits: chances of 2^-40 that an upload shows, of 2^-20 that an allowed dropout ends a round
)


def share_threshold(members: int) -> int:
    """Holders that put a secret together again, of the members of a neighbourhood: more than half of them, so that no two
    sets of holders could give both secrets of a client even to a server that tells each of them another story."""
    return members // 2 + 1


def num_neighbours(cohort: int, survivors: int, configured: int | None = None) -> int:
    """Neighbours of each client: as many as asked for, else as the bound asks for; cohort − 1 (everybody) where that is no
    fewer."""
    if configured is not None:
        return min(configured, cohort - 1)
    return next(
        (k for k in range(2, cohort - 1, 2) if _is_secure(cohort, survivors, k)), cohort - 1
    )


def draw_neighbourhoods(clients: Sequence[int], degree: int) -> dict[int, list[int]]:
    """Each client with its neighbours, ascending, itself among them. The order is drawn from the operating system: who could
    foresee it could surround a client."""
    if degree >= len(clients) - 1:
        return {client: sorted(clients) for client in clients}
    circle = list(clients)
    random.SystemRandom().shuffle(circle)
    half = degree // 2
    return {
        client: sorted(circle[(place + step) % len(circle)] for step in range(-half, half + 1))
        for place, client in enumerate(circle)
    }


def _is_secure(cohort: int, survivors: int, k: int) -> bool:
    """Whether k neighbours do, for every client at once: fewer than t colluding ones; honest survivors that stay connected
    (no k/2 in a row that collude or drop out); t that stay. t of Bell et al.'s theorem 3.10 is more than half here."""
    colluding = math.ceil(COLLUDING * cohort)
    dropping = cohort - survivors
    t = share_threshold(k + 1)
    shown = _hypergeometric_tail(cohort - 1, colluding, k, t)
    apart = min(1.0, (colluding + dropping) / cohort) ** (k // 2)
    lost = _hypergeometric_tail(cohort - 1, dropping, k, k + 1 - t + 1)
    return cohort * max(shown, apart) <= 2.0**-SECURITY and cohort * lost <= 2.0**-CORRECTNESS


def _hypergeometric_tail(total: int, marked: int, num_drawn: int, least: int) -> float:
    """Chance of `least` or more marked ones among those drawn without replacement (hypergeometric)."""
    ways = _log_choose(total, num_drawn)
    return math.fsum(
        math.exp(_log_choose(marked, i) + _log_choose(total - marked, num_drawn - i) - ways)
        for i in range(max(least, num_drawn - (total - marked)), min(marked, num_drawn) + 1)
    )


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
