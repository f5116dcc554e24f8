"""Sums of uploads that the server cannot take apart: secure aggregation and encryption."""

from __future__ import annotations

from typing import Any

from hetero_fl.algorithms import Algorithm
from hetero_fl.communication.protocol import DirectProtocol, RoundProtocol
from hetero_fl.communication.secure_aggregation.protocol import SecureAggregation
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.server_link import ServerLink
from hetero_fl.federation.summed_uploads.derived_setup import DerivedSetup
from hetero_fl.federation.summed_uploads.encryption import EncryptedLink, HomomorphicEncryption


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
        return HomomorphicEncryption(algorithm, federation)
    return DirectProtocol()


def make_link(protocol: RoundProtocol, *args: Any, **options: Any) -> ServerLink:
    """Create the server's link to the clients, which depends on whether the server can read it.

    Args:
        protocol: The protocol by which uploads reach the server.
        *args: Arguments of `ServerLink`.
        **options: Arguments of `ServerLink`.
    """
    if isinstance(protocol, HomomorphicEncryption):
        return EncryptedLink(protocol, *args, **options)
    return ServerLink(*args, **options)
