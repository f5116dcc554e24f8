"""Tables of attacks and robust rules, for pages of the documentation.

The runs are those of `configs/studies/attacks.yaml`. A line of the archive has the `method`, the
`attack`, the `rule` for parameters, that for `predictions`, the `share` of malicious clients, the
`accuracy`, which is None if the attack made the models non-finite, and the `success` of triggers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]

HONEST = "none"
ATTACKS = (
    HONEST,
    *("label_flip", "backdoor", "sign_flip", "gaussian", "little_is_enough", "confident_wrong"),
)
"""The attacks in the order of the tables. Runs without attack apply to every share."""


def attack_tables(lines: Sequence[Line]) -> str:
    """Format one Markdown table for each method and fraction of malicious clients.

    The rows are attacks and the columns are rules. The best rule of each row is bold.

    Args:
        lines: Lines of the archive.
    """
    tables = dict.fromkeys((line["method"], line["share"]) for line in lines)
    return "\n\n".join(_table(lines, method, share) for method, share in sorted(tables))


def _table(lines: Sequence[Line], method: str, share: float) -> str:
    mine = [line for line in lines if line["method"] == method]
    attacked = [x for x in mine if x["attack"] != HONEST and x["share"] == share]
    found = {(x["attack"], _rule(x)): x for x in mine if x["attack"] == HONEST or x in attacked}
    rules = dict.fromkeys(_rule(line) for line in attacked)
    header = [f"{method}, {share:.0%} malicious", *rules]
    rows = [header, ["---"] * len(header)]
    for attack in ATTACKS:
        cells = [found.get((attack, rule)) for rule in rules]
        best = max((line["accuracy"] or 0.0 for line in cells if line), default=0.0)
        if any(cells):
            rows.append([attack, *(_cell(line, best) for line in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _rule(line: Line) -> str:
    if line["method"] == "fedavg":
        return str(line["rule"])
    return (
        str(line["predictions"])
        if line["rule"] == "mean"
        else f"{line['rule']} and {line['predictions']}"
    )


def _cell(line: Line | None, best: float) -> str:
    if line is None:
        return ""
    accuracy = line["accuracy"]
    text = "not finite" if accuracy is None else f"{100 * accuracy:.1f}"
    text = f"**{text}**" if accuracy is not None and accuracy >= best else text
    return text if line["success"] is None else f"{text} ({100 * line['success']:.0f}% of triggers)"
