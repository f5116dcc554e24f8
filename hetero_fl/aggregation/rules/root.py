"""The server's own update, for rules that trust clients as far as they agree with it (FLTrust), of a server without labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hetero_fl.aggregation.rules.base import middle
from hetero_fl.architecture import Tensors
from hetero_fl.objectives import Digest
from hetero_fl.plan import Fit, Plan, Predict, Rows
from hetero_fl.state import Card, Participant

TEMPERATURE = 2.0


def root_models(server: Participant, sent: Sequence[tuple[Card, Tensors]]) -> Plan[dict[str, Tensors]]:
    """What each sender's group's model becomes in an epoch on the proxy set, towards the coordinate-wise median of what all
    models that were sent predict there; by group. `server`: a copy, whose models the plan changes.

    The median is over models of every architecture, more voices than any one group has. Every sender sees the proxy set.
    """
    opinions = yield [
        Predict(
            card.arch.id,
            Rows("proxy", through=card.preprocess),
            tensors={**server.models[card.arch.id], **tensors},
            arch=card.arch,
        )
        for card, tensors in sent
    ]
    if server.task.kind == "multiclass":
        opinions = [z.log_softmax(-1) for z in opinions]
    teacher = middle(torch.stack(opinions))
    views = {card.arch.id: card.preprocess for card, _ in reversed(sent)}  # the lowest id's
    yield [
        Fit(
            {group: None},
            Digest(server.task.kind, TEMPERATURE, slot=group),
            Rows("proxy", beside={"teacher": teacher}, through=views[group]),
            optimizer=server.optimizer,
            label=f"root {group}",
        )
        for group in sorted(views)
    ]
    return {group: server.models[group] for group in views}
