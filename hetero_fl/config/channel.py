"""What happens to payloads between client and server."""

from __future__ import annotations

from hetero_fl.config.base import Section
from hetero_fl.config.secure import SecureSumConfig


class ChannelConfig(Section):
    """What happens to payloads on their way; by default they travel as they are."""

    secure_sum: SecureSumConfig | None = None
