"""Whether a site takes part in a run at all: its file against the server's configuration, before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hetero_fl.config import Config, expand
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.record import FREE
from hetero_fl.experiment.deployment.limits import AllowsConfig
from hetero_fl.experiment.deployment.messages import Refused
from hetero_fl.experiment.deployment.site_file import SiteConfig
from hetero_fl.own_code import CodePermission, references

OWN_KEYS = ("model", "preprocess", "augment")  # which a configuration has as the site's file has them, or not at all


def check_raw(tree: object, allows: AllowsConfig) -> dict[str, Any]:
    """A configuration before it is read: to read one that names code is to import that. Raises Refused."""
    if not isinstance(tree, dict):
        raise Refused("the configuration is none")
    for name, key in CodePermission(granted=allows.own_code).refused(references(tree), ""):
        raise Refused(f"{key}: found {name[:80]}; this site runs no code by name but allows.own_code {allows.own_code}")
    return tree


def check_config(config: Config, site: SiteConfig, settings: ClientSettings) -> None:
    """A configuration against a site's file. `settings`: this client's. Raises Refused, naming both keys."""
    allows, me, name = site.allows, site.client, config.algorithm["name"]
    if allows.methods is not None and name not in allows.methods:
        raise Refused(f"algorithm.name: found {name}; this site's allows.methods are {', '.join(allows.methods)}")
    at_most("rounds", config.rounds, "rounds", allows.rounds)
    at_most(f"clients: {me}: epochs", None if settings.steps else settings.epochs, "epochs", allows.epochs)
    at_most(f"clients: {me}: steps", settings.steps, "steps", allows.steps)
    own = ClientSettings.model_validate(site.settings())
    for key in OWN_KEYS:
        if getattr(site, key) is not None and getattr(settings, key) != getattr(own, key):
            raise Refused(f"clients: {me}: {key}: is not what this site's file has")
    if site.shares is not None and (more := [s for s in settings.shares if not _covered(s, own.shares)]):
        raise Refused(
            f"clients: {me}: shares: found {', '.join(more)}; this site shares {', '.join(own.shares) or 'nothing'}"
        )
    secure = config.channel.secure_sum
    if secure is None and allows.secure_sum_only:
        raise Refused(
            "channel.secure_sum: found none; this site's allows.secure_sum_only lets uploads leave in no other way"
        )
    if secure is not None and allows.cohort is not None:
        found = secure.survivors(config.clients.per_round or len(expand(config.clients)))
        if found < allows.cohort:
            raise Refused(
                f"channel.secure_sum.threshold: lets a sum of {found} clients be told; this site's allows.cohort is "
                f"{allows.cohort}"
            )
    if allows.privacy is not None:
        _check_privacy(config, site)


def _check_privacy(config: Config, site: SiteConfig) -> None:
    privacy = config.privacy
    where = "this site's allows.privacy counts noise that it adds itself"
    if privacy is None:
        raise Refused(f"privacy: found none; {where}")
    if privacy.unit == "client":
        raise Refused(f"privacy.unit: found client, whose noise others add; {where}: record or local")
    if site.tells.labels:
        raise Refused("tells.labels: true tells counts as they are, with allows.privacy; leave one of them out")
    if site.tells.model and privacy.unit == "local":
        raise Refused("tells.model: true tells a model that nobody noised, with allows.privacy and privacy.unit local")


def mark_of(tree: Mapping[str, Any], rows: str, public: str) -> bytes:
    """What must be the same whenever a site takes part in a run: its configuration, but for what decides no result, its rows, and
    the public sets, these two by their hashes. Another one under the same name could be made to tell the difference between two
    answers."""
    runtime = tree.get("runtime")
    kept = {k: v for k, v in runtime.items() if k not in FREE} if isinstance(runtime, dict) else runtime
    told = json.dumps([{**tree, "runtime": kept, "init_from": None}, rows, public], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).digest()


def at_most(what: str, found: float | None, key: str, most: float | None) -> None:
    """A number against one of the limits. Raises Refused, naming both."""
    if most is not None and found is not None and (found > most):
        raise Refused(f"{what}: found {_plain(found)}; this site's allows.{key} is {_plain(most)}")


def _plain(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


def _covered(share: str, allowed: Sequence[str]) -> bool:
    """Whether a share is one of these, or a part of one."""
    if share in allowed:
        return True
    part = "backbone." if share == "backbone" else share
    wider = ["backbone." if a == "backbone" else a for a in allowed if a == "backbone" or a.endswith(".")]
    return part.endswith(".") and ("parameters" in allowed or any(part.startswith(w) for w in wider))
