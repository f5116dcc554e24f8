"""The version of the package, and names that have moved since the previous one."""

from __future__ import annotations

import re

__version__ = "0.1.0"

# Names that the documentation showed to users, before and after; kept for one release.
MOVED_NAMES = {
    "hetero_fl.aggregation.rules": "hetero_fl.robustness.rules",
    "hetero_fl.aggregation.rules.base": "hetero_fl.robustness.rules",
    "hetero_fl.algorithms.mentee": "hetero_fl.algorithms.mutual",
    "hetero_fl.algorithms.width": "hetero_fl.algorithms.prototypes",
    "hetero_fl.channel.attacks": "hetero_fl.robustness.attacks",
    "hetero_fl.channel.link": "hetero_fl.communication.link",
    "hetero_fl.channel.privacy.accounting": "hetero_fl.privacy.accounting",
    "hetero_fl.codec": "hetero_fl.utils.serialization",
    "hetero_fl.config.load_config": "hetero_fl.load_config",
    "hetero_fl.config.source": "hetero_fl.config.data",
    "hetero_fl.errors": "hetero_fl.utils.errors",
    "hetero_fl.experiment.deployment.audit_log": "hetero_fl.deployment.audit_log",
    "hetero_fl.experiment.deployment.transport": "hetero_fl.deployment.messages",
    "hetero_fl.mutual": "hetero_fl.core.objectives",
    "hetero_fl.objectives": "hetero_fl.core.objectives",
    "hetero_fl.payload": "hetero_fl.core.payload",
    "hetero_fl.plan": "hetero_fl.core.plan",
    "hetero_fl.saved": "hetero_fl.core.saved_model",
    "hetero_fl.state": "hetero_fl.core.participant",
}


def describe_moved_name(error: Exception) -> str:
    """Return a hint that names the new place of what an import did not find.

    Args:
        error: What the import of a user's module raised.

    Returns:
        Text to append to the error's message; empty if nothing has moved.

    Example:
        >>> describe_moved_name(ModuleNotFoundError(name="hetero_fl.plan"))
        '; hetero_fl.plan is now hetero_fl.core.plan'
    """
    if not isinstance(error, ImportError) or error.name is None:
        return ""
    missing = error.name
    if match := re.match(r"cannot import name '(\w+)'", str(error)):
        missing = f"{missing}.{match[1]}"
    found = [old for old in MOVED_NAMES if f"{old}.".startswith(f"{missing}.")]
    return "".join(f"; {old} is now {MOVED_NAMES[old]}" for old in found)
