"""What must be the same at the server and at every node before the first round."""

from __future__ import annotations

import hashlib

from hetero_fl.experiment.prepared import Prepared


def fingerprint_of(prepared: Prepared) -> str:
    """SHA-256 over the clients as the rest of the run sees them: rows, models, views, settings; and over the method."""
    cards = prepared.federation.cards
    digest = hashlib.sha256(repr((prepared.config.algorithm, prepared.config.seed, prepared.config.rounds)).encode())
    for id in sorted(cards):
        card = cards[id]
        digest.update(repr((id, card.n, card.arch.to_json(), card.preprocess, card.has_proxy)).encode())
    return digest.hexdigest()
