"""The cache of a consensus, at the server and at the clients: what was said of a proxy row serves for several rounds."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.alignment import Aligning
from hetero_fl.algorithms.base import Items
from hetero_fl.algorithms.distillation import TEACHER
from hetero_fl.payload import Payload
from hetero_fl.state import Card, Participant

MADE = "made"


class WithCache(Aligning):
    """A row is asked for, and sent, only where the receiver lacks it or it is too old (Azuma et al. 2025, SCARLET).

    The server's cache is `teacher` `[D, C]` with the round in which each row was `made`, and for each client seen the round
    in which it `held` all of it: it then lacks what was made since. A client's is `cache` `[D, C]`.
    """

    cache_life: PositiveInt | None = Field(None, description="rounds until a row is asked for again; none: no cache")

    @model_validator(mode="after")
    def _whole_rounds(self) -> WithCache:
        if self.align and self.cache_life is not None:
            raise ValueError(
                "align needs what is said of all rows of a round, but with cache_life few are asked for; leave one of them out"
            )
        return self

    # At the server -----------------------------------------------------------------------------------------------
    def due(self, server: Participant) -> Tensor:
        """Those of the round's rows that the cache lacks or has had too long: what clients are asked for, int64."""
        assert self.cache_life is not None
        made, rows = self.made(server), self.drawn(server)
        old = (made < 0) | (server.clock.round - made >= self.cache_life)
        return old.nonzero()[:, 0] if rows is None else rows[old[rows]]

    @staticmethod
    def made(server: Participant) -> Tensor:
        """The round in which each proxy row's consensus was made, int64 `[D]`; −1: never."""
        made: Tensor | None = server.state.get(MADE)
        return torch.full((len(server.data("proxy", None)["x"]),), -1) if made is None else made

    def news(self, server: Participant, card: Card) -> Items:
        """What this client is asked for, and what it lacks of the teacher."""
        if not card.has_proxy:
            return {}
        items: Items = {} if card.reading else {"ask": self.due(server).int()}
        if TEACHER in server.state:
            new = (self.made(server) >= server.state["held"].get(card.id, 0)).nonzero()[:, 0]
            items |= self.remembered(server, card) | {"new": new.int(), TEACHER: server.state[TEACHER][new]}
        return items

    def cached(self, server: Participant, uploads: Uploads, teacher: Tensor | None) -> Tensor | None:
        """Set what was asked for into the cache; returns the teacher of all the round's rows, None if some lack a word."""
        asked, now, state = self.due(server), server.clock.round, server.state
        state["held"] = {**state.get("held", {}), **{u.client: now for u in uploads.each}}
        if teacher is None and len(asked):
            return None
        if teacher is not None:
            made, rows = self.made(server).clone(), server.state.get(TEACHER)
            rows = torch.zeros(len(made), teacher.shape[1]) if rows is None else rows.clone()
            rows[asked], made[asked] = teacher, now
            state.update({MADE: made, TEACHER: rows})
        self.remember(server)
        known, use = state[TEACHER], self.drawn(server)
        return known if use is None else known[use]

    # At the client -----------------------------------------------------------------------------------------------
    @staticmethod
    def told(client: Participant, got: Payload, rows: Tensor | None) -> Tensor:
        """The teacher of these rows, or of all, from what was received and what the client has kept."""
        news: Tensor = got[TEACHER]
        if "new" not in got:
            return news
        kept = client.state.get("cache")
        kept = news.new_zeros(len(client.data("proxy", None)["x"]), news.shape[1]) if kept is None else kept.clone()
        kept[got["new"].long()] = news
        client.state["cache"] = kept
        return kept if rows is None else kept[rows]
