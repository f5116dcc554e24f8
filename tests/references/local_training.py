"""Clients, modules and batches of the next round, for references of local training."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from hetero_fl.core.objectives import Supervised
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Fit
from hetero_fl.engine.training import index_batches
from hetero_fl.federation.trainer import FederatedTrainer

# As in tests.support.federations.
BATCH = 16


def clients(rounds: FederatedTrainer) -> dict[str, Participant]:
    """Return every client before the next round."""
    index = rounds.completed
    return {
        client_id: rounds.federation.client(client_id, rounds.store.get(client_id), index)
        for client_id in rounds.federation.client_infos
    }


def module(arch, tensors: dict[str, Tensor]) -> nn.Module:
    """Return a module with these tensors in training mode; missing counters keep their values."""
    result = arch.build()
    result.load_state_dict({**result.state_dict(), **tensors})
    return result.train()


def batches(
    client: Participant, label: str = "train", epochs: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the batches of the first fit with that label in a round."""
    clock = client.round_context
    data, where = (
        client.data("train", None),
        (clock.seed, clock.round_idx, client.participant_id, label, 0),
    )
    # A further task of a version in asynchronous runs.
    where += ("again", clock.attempt) if clock.attempt else ()
    for rows in index_batches(
        client.num_rows, Fit({}, Supervised(), epochs=epochs, batch_size=BATCH), where
    ):
        yield data["x"][rows], data["y"][rows]


def largest_difference(ours: dict[str, Tensor], by_hand: nn.Module | dict[str, Tensor]) -> float:
    """Return the largest difference of any floating-point tensor."""
    expected = by_hand.state_dict() if isinstance(by_hand, nn.Module) else by_hand
    return max(
        float((t.detach() - ours[n]).abs().max())
        for n, t in expected.items()
        if t.is_floating_point()
    )
