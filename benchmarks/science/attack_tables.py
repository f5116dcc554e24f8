"""Tables of attacks and robust rules, for pages of the documentation.

The runs are those of `configs/studies/attacks.yaml`. Settings in the labels of the archived runs
name the attack, the rules and the share of malicious clients.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hetero_fl.reporting.formatting import MISSING, algorithm_name
from hetero_fl.reporting.rendering import markdown_table

Row = Mapping[str, Any]

RULE_KEYS = ("aggregation.rule", "aggregation.predictions")
HONEST = "none"
SCORE = "global_last_accuracy"


def attack_tables(rows: Sequence[Row]) -> str:
    """Format one Markdown table for each method and share of malicious clients.

    The rows of a table are attacks and the columns are rules. A cell has the mean accuracy on the
    global test and, for backdoors, the share of triggered images that are misclassified as the
    target. The best rule of each row is bold. Runs without attack apply to every share.

    Args:
        rows: Archived runs.
    """
    runs: dict[str, dict[tuple[str, str, str], list[Row]]] = {}
    for row in rows:
        method, *settings = row["algorithm"].split(":")
        values = dict(setting.split("=", 1) for setting in settings)
        rule = " and ".join(values[key] for key in RULE_KEYS if key in values) or "mean"
        key = (values.get("attacks.share", ""), values.get("attacks.name", HONEST), rule)
        runs.setdefault(method, {}).setdefault(key, []).append(row)
    return "\n\n".join(
        _table(method, share, found)
        for method, found in runs.items()
        for share in dict.fromkeys(share for share, _, _ in found if share)
    )


def _table(method: str, share: str, runs: Mapping[tuple[str, str, str], Sequence[Row]]) -> str:
    attacked = {rule for own, _, rule in runs if own == share}
    # In the order of the runs without attack. Those with attack that failed are last.
    rules = [rule for rule in dict.fromkeys(rule for _, _, rule in runs) if rule in attacked]
    attacks = [HONEST, *dict.fromkeys(attack for own, attack, _ in runs if own == share)]
    lines = []
    for attack in attacks:
        found = [runs.get(("" if attack == HONEST else share, attack, rule)) for rule in rules]
        scores = [_mean(own, SCORE) for own in found]
        best = max((score for score in scores if score is not None), default=None)
        cells = []
        for own, score in zip(found, scores, strict=True):
            text = f"{100 * score:.1f}" if score is not None else "not finite" if own else MISSING
            success = _mean(own, "attack_success")
            cell = f"**{text}**" if score is not None and score == best else text
            cells.append(cell if success is None else f"{cell} ({100 * success:.0f}% of triggers)")
        lines.append([attack, *cells])
    header = [f"{algorithm_name(method)}, {float(share):.0%} malicious", *rules]
    return markdown_table(header, lines, ["left", *["right"] * len(rules)])


def _mean(rows: Sequence[Row] | None, key: str) -> float | None:
    """Return the mean of a column, or None if a run has no value."""
    values = [row.get(key) for row in rows or ()]
    return None if not values or None in values else statistics.mean(values)
