"""Which public rows a round is about, and the cache of their consensus at the server and at the clients."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.distillation import TEACHER, Distilling
from hetero_fl.seeding import generator
from hetero_fl.state import Participant


class WithCache(Distilling):
    """Public rows are drawn anew each round; a row's consensus may serve for several (Azuma et al. 2025, SCARLET).

    The server's cache is `teacher` `[D, C]` with the round `made` of each row, and for each client the round in which it
    `held` all of it: it then lacks what was made since. `rows` are those that the last round was about.
    """

    rows: int = Field(1000, ge=2, description="public rows drawn anew each round; all, where there are no more")
    cache_life: PositiveInt | None = Field(None, description="rounds until a row is asked for again; none: no cache")

    def drawn(self, who: Participant) -> Tensor | None:
        """This round's public rows, in their order, the same for everybody; None for all of them."""
        count = len(who.data("proxy", None)["x"])
        if self.rows >= count:
            return None
        draws = generator(who.clock.seed, who.clock.round, "public rows")
        return torch.randperm(count, generator=draws)[: self.rows].sort().values

    def due(self, server: Participant) -> Tensor:
        """Those of them that the cache lacks or has had too long: what clients are asked for."""
        made, rows = self.made(server), self.drawn(server)
        valid = self.valid(server, made)
        return (~valid).nonzero()[:, 0] if rows is None else rows[~valid[rows]]

    def valid(self, server: Participant, made: Tensor) -> Tensor:
        """Which public rows have a consensus that is young enough, given the rounds in which they were made."""
        assert self.cache_life is not None
        return (made >= 0) & (server.clock.round - made < self.cache_life)

    @staticmethod
    def made(server: Participant) -> Tensor:
        """The round in which each public row's consensus was made, int64 `[D]`; −1: never."""
        count = len(server.data("proxy", None)["x"])
        made: Tensor = server.state.get("made", torch.full((count,), -1))
        return made

    def cached(
        self, server: Participant, uploads: Uploads, teacher: Tensor | None, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Set what was asked for into the cache; returns the teacher of those of the round's rows that have a valid one."""
        state, asked, made = server.state, self.due(server), self.made(server).clone()
        kept = state.get(TEACHER, torch.zeros(len(made), server.task.outputs)).clone()
        if teacher is not None:
            kept[asked], made[asked] = teacher, server.clock.round
        held = {**state.get("held", {}), **{u.client: server.clock.round for u in uploads.each}}
        valid = self.valid(server, made)
        use = valid.nonzero()[:, 0] if rows is None else rows[valid[rows]]
        state.update({"made": made, "held": held, "rows": use.int(), TEACHER: kept})
        return kept[use], use
