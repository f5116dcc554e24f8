"""Long-term keys of sites, which sign the keys of a round of secure aggregation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
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
# Length in bytes of a signature. The length is fixed, so that equal runs have equal traffic.
ENDORSEMENT = 2 * NUMBER


@dataclass(frozen=True)
class SiteKeys:
    """Keys with which a site signs its round keys and recognizes those of other sites.

    Args:
        own: Private key of the site. If None, the site does not sign its round keys.
        others: Public keys of the other sites, keyed by client id. If None, all round keys are
            accepted, and the server could replace them.
    """

    own: EllipticCurvePrivateKey | None = None
    others: Mapping[str, EllipticCurvePublicKey] | None = None

    def endorse(self, tag: bytes, keys: bytes) -> bytes:
        """Sign the public keys of this site for a round.

        Args:
            tag: Bytes that identify the round.
            keys: The public keys.

        Returns:
            The signature, 132 bytes, which are zero without `own`.
        """
        if self.own is None:
            return bytes(ENDORSEMENT)
        numbers = decode_dss_signature(self.own.sign(CONTEXT + tag + keys, ECDSA(SHA384())))
        return b"".join(number.to_bytes(NUMBER, "big") for number in numbers)

    def check(self, tag: bytes, client: str, keys: bytes, endorsement: bytes) -> None:
        """Check that the public keys of another client are signed by its site.

        Args:
            tag: Bytes that identify the round.
            client: The client.
            keys: The public keys.
            endorsement: Result of `endorse` of the client.

        Raises:
            PayloadError: If the key of the site is not in `others`, or the signature is invalid.
        """
        if self.others is None:
            return
        numbers = (endorsement[:NUMBER], endorsement[NUMBER:])
        signature = encode_dss_signature(*(int.from_bytes(number, "big") for number in numbers))
        try:
            self.others[client].verify(signature, CONTEXT + tag + keys, ECDSA(SHA384()))
        except (KeyError, InvalidSignature):
            raise PayloadError(
                f"the keys of '{client}' are not signed with its key in allows.keys"
            ) from None
