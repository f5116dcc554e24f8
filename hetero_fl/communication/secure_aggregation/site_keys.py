"""Long-term keys of sites, which sign the keys of a round of secure aggregation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.hashes import SHA384

from hetero_fl.core.payload import PayloadError

# Prefix of the signed bytes, so that signatures of other data are not valid for round keys.
CONTEXT = b"hetero_fl secure sum: keys"
# Length in bytes of each of the two numbers of a signature, for curves with at most 521 bits.
NUMBER = 66
# Length in bytes of a name and a signature. The length is fixed, so that equal runs have equal
# traffic.
ENDORSEMENT = 32 + 2 * NUMBER


def key_name(key: EllipticCurvePublicKey) -> bytes:
    """Return the SHA-256 digest of a public key, which identifies a site in messages."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).digest()


@dataclass(frozen=True)
class SiteKeys:
    """Keys with which a site signs its round keys and recognizes those of other sites.

    Args:
        own: Private key of the site. If None, the site does not sign its round keys.
        others: Public keys of the other sites. If None, all round keys are accepted, and the server
            could replace them.
    """

    own: EllipticCurvePrivateKey | None = None
    others: tuple[EllipticCurvePublicKey, ...] | None = None

    def endorse(self, tag: bytes, keys: bytes) -> bytes:
        """Sign the public keys of this site for a round.

        Args:
            tag: Bytes that identify the round.
            keys: The public keys.

        Returns:
            The name and the signature of the site, 164 bytes, which are zero without `own`.
        """
        if self.own is None:
            return bytes(ENDORSEMENT)
        numbers = decode_dss_signature(self.own.sign(CONTEXT + tag + keys, ECDSA(SHA384())))
        signature = b"".join(number.to_bytes(NUMBER, "big") for number in numbers)
        return key_name(self.own.public_key()) + signature

    def check(
        self, tag: bytes, public: Mapping[int, np.ndarray], endorsements: Mapping[int, np.ndarray]
    ) -> None:
        """Check that the public keys of each other client are signed by another site.

        Args:
            tag: Bytes that identify the round.
            public: Public keys of the other clients, keyed by number.
            endorsements: Results of `endorse` of these clients, keyed by number.

        Raises:
            PayloadError: If `others` does not contain the site, two clients are the same site, or a
                signature is invalid.
        """
        if self.others is None:
            return
        expected = {key_name(key): key for key in self.others}
        for number, endorsement in endorsements.items():
            name, first, second = (
                endorsement[part].tobytes()
                for part in (slice(32), slice(32, 32 + NUMBER), slice(32 + NUMBER, None))
            )
            signature = encode_dss_signature(
                int.from_bytes(first, "big"), int.from_bytes(second, "big")
            )
            try:
                # A site is removed, so that no two clients are the same site.
                expected.pop(name).verify(
                    signature, CONTEXT + tag + public[number].tobytes(), ECDSA(SHA384())
                )
            except (KeyError, InvalidSignature):
                raise PayloadError(
                    f"the keys of client number {number} are not signed by a site of allows.keys"
                ) from None
