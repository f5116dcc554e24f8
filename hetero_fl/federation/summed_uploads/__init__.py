"""Sums of uploads that the server cannot take apart: secure aggregation and encryption."""

from __future__ import annotations

from hetero_fl.algorithms import Algorithm
from hetero_fl.communication.homomorphic.protocol import HomomorphicEncryption
from hetero_fl.communication.protocol import DirectProtocol, RoundProtocol
from hetero_fl.communication.secure_aggregation.protocol import SecureAggregation
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.server_link import ServerLink
from hetero_fl.federation.summed_uploads.derived_setup import DerivedSetup
from hetero_fl.federation.summed_uploads.hidden_server import HiddenServer, SealedLink


def make_protocol(algorithm: Algorithm, federation: FederationSpec) -> RoundProtocol:
    """Create the protocol by which uploads reach the server.

    Secure aggregation or homomorphic encryption is used if `channel.secure_sum` or
    `channel.homomorphic` is configured and the method uploads items.
    """
    channel = federation.channel
    if not algorithm.uploads:
        return DirectProtocol()
    if channel.secure_sum is not None:
        setup = DerivedSetup(algorithm, federation)
        return SecureAggregation(channel.secure_sum, federation.cohort, setup, federation.site_keys)
    if channel.homomorphic is not None:
        return HomomorphicEncryption(
            channel.homomorphic,
            federation.cohort,
            HiddenServer(algorithm, federation),
            federation.shared_key,
        )
    return DirectProtocol()


def link_class(protocol: RoundProtocol) -> type[ServerLink]:
    """Return the class of the server's link, which depends on whether the server can read it."""
    return SealedLink if protocol.hides_server else ServerLink
