"""A client's local training as a plain PyTorch loop, for references that hold a whole round by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hetero_fl.core.objectives import Supervised
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Fit
from hetero_fl.engine.batches import index_batches
from hetero_fl.federation.synchronous import SynchronousTrainer

BATCH = 16  # tests.helpers.small_federations's


def clients(rounds: SynchronousTrainer) -> dict[str, Participant]:
    """Every client as it stands before the next round."""
    index = rounds.completed
    return {
        id: rounds.federation.client(id, rounds.store.get(id), index)
        for id in rounds.federation.client_infos
    }


def module(arch, tensors: dict[str, Tensor]) -> nn.Module:
    """A module of its own with these tensors, in training mode; counters that nobody keeps stay as made."""
    made = arch.build()
    made.load_state_dict({**made.state_dict(), **tensors})
    return made.train()


def train(
    client: Participant,
    parameters: list[nn.Parameter],
    loss: Callable[[Tensor, Tensor], Tensor],
    label: str = "train",
    epochs: int = 1,
    after: Callable[[], None] = lambda: None,
) -> int:
    """Local epochs of SGD with momentum on the loss of (x, y), over the batches that the client's key draws; returns the steps.

    `after` is called after each.
    """
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    steps = 0
    for x, y in batches(client, label, epochs):
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()
        after()
        steps += 1
    return steps


def batches(
    client: Participant, label: str = "train", epochs: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the round's first fit of that label."""
    clock = client.round_context
    data, where = (
        client.data("train", None),
        (clock.seed, clock.round_idx, client.participant_id, label, 0),
    )
    # one more task of a version, where runs are asynchronous
    where += ("again", clock.attempt) if clock.attempt else ()
    for rows in index_batches(
        client.num_rows, Fit({}, Supervised(), epochs=epochs, batch_size=BATCH), where
    ):
        yield data["x"][rows], data["y"][rows]


def mean(sent: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The weighted mean of named tensors."""
    total = sum(w for w, _ in sent)
    return {name: sum(w * t[name] for w, t in sent) / total for name in sent[0][1]}  # type: ignore[misc]


def apart(ours: dict[str, Tensor], by_hand: nn.Module | dict[str, Tensor]) -> float:
    """The largest difference of any floating-point tensor."""
    theirs = by_hand.state_dict() if isinstance(by_hand, nn.Module) else by_hand
    return max(
        float((t.detach() - ours[n]).abs().max())
        for n, t in theirs.items()
        if t.is_floating_point()
    )
