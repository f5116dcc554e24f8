"""What stood between clients, server and whoever reads the models, in words: privacy, secret sums, rules, compression, liars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hetero_fl.reporting.wording import plural, sentence
from hetero_fl.runtime.federation import Federation

Json = dict[str, Any]
WHOSE = {"record": " of each training row", "client": " of each client", "local": " of each client, noised at home"}
SHOWN = 6  # liars that are named


def protections_of(federation: Federation) -> dict[str, Any]:
    """What a report tells of the channel and of how uploads were combined; JSON."""
    channel, terms = federation.channel, federation.aggregation
    rules = {"parameters": terms.rule, "predictions": terms.predictions, "class sums": terms.statistics}
    return {
        "compress": [_stage(stage.model_dump()) for stage in channel.compress],
        "compress_down": [_stage(stage.model_dump()) for stage in channel.compress_down],
        "secure_sum": channel.secure_sum is not None,
        "rules": {what: rule for what, rule in rules.items() if rule != "mean"},
    }


def _stage(written: Json) -> str:
    return " ".join(name if value is True else f"{name} {value:g}" for name, value in written.items())


def told(summary: Json, details: Json) -> list[str]:
    """A sentence on each protection; the first on privacy, had or not."""
    privacy, found = summary["privacy"], details.get("protections", {})
    if privacy:
        whose = WHOSE.get(privacy.get("unit", ""), "")
        lines = [f"Differential privacy{whose}: ε = {privacy['epsilon']:.3g} at δ = {privacy['delta']:.1g}."]
    else:
        lines = ["No differential privacy was in force."]
    if found.get("secure_sum"):
        lines.append("The server learnt sums of uploads, and no single one.")
    if found.get("rules"):
        rules = [f"{what} by {rule}" for what, rule in found["rules"].items()]
        lines.append(f"{sentence(', '.join(rules))}: combined so that a few liars cannot decide.")
    for key, who in (("compress", "clients"), ("compress_down", "the server")):
        if found.get(key):
            lines.append(f"What {who} sent was compressed: {', '.join(found[key])}.")
    return lines


def liars(attacks: Json | None) -> str:
    """Who lied how; nothing where nobody did."""
    if not attacks:
        return ""
    who: Sequence[str] = attacks["liars"]
    more = f" and {len(who) - SHOWN:,} more" if len(who) > SHOWN else ""
    how = f"{plural(len(who), 'client')} lied ({attacks['name']}): {', '.join(who[:SHOWN])}{more}"
    if attacks.get("success") is not None:
        how += f"; the backdoor opened on {attacks['success']:.1%} of the test rows of other classes"
    return f"{how}. All figures are of honest clients."
