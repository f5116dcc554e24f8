"""Agree with the nodes before the first round: configuration, row counts, fingerprints."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from hetero_fl.config import Config, expand, resolved
from hetero_fl.data import FederatedData
from hetero_fl.data.client_rows import Told
from hetero_fl.data.remote import Pack, held_at
from hetero_fl.deployment.conversations import Post, Talk
from hetero_fl.deployment.messages import Refused, body_of, message, reason, told_tree
from hetero_fl.deployment.validation import MOST_PIXELS, hear_settings, hear_told
from hetero_fl.experiment.preparation import Prepared, deal, load_config, prepare
from hetero_fl.experiment.runner import choose_for_nodes
from hetero_fl.federation.executors.base import Absent
from hetero_fl.utils.code_permission import CodePermission, references
from hetero_fl.utils.errors import RunFailed
from hetero_fl.utils.serialization import as_tensor

# What must be the same at the server and at every node before the first round.


def fingerprint_of(prepared: Prepared) -> str:
    """SHA-256 over the clients as the rest of the run sees them: rows, models, views, settings; and over the method."""
    cards = prepared.federation.cards
    digest = hashlib.sha256(
        repr((prepared.config.algorithm, prepared.config.seed, prepared.config.rounds)).encode()
    )
    for id in sorted(cards):
        card = cards[id]
        digest.update(
            repr((id, card.n, card.arch.to_json(), card.preprocess, card.has_proxy)).encode()
        )
    return digest.hexdigest()


# Before the first round: everybody comes, hears the configuration, tells how many rows it has, and
# prepares for the run.
#
# What is the same for all follows from the configuration at each machine by itself; the server
# knows of the clients' rows what they told, and the fingerprint shows that all mean the same
# federation.

PREPARING = 600.0  # seconds that a node may take to load its data


@dataclass
class Convened:
    """A federation whose members have met. `run` is its name, which no other run has."""

    post: Post
    config: Config
    public: FederatedData
    run: str
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # what each decides itself
    told: dict[str, Told] = field(default_factory=dict)

    def known(self) -> dict[str, Any]:
        """What a server that is started anew has to know, as plain values."""
        told = {client: told_tree(told) for client, told in self.told.items()}
        return {"run": self.run, "settings": self.settings, "told": told}

    @cached_property
    def prepared(self) -> Prepared:
        """The run as the server knows it, once everybody has told of its rows."""
        return prepare(self.config, data=held_at(self.public, None, self.told))

    @cached_property
    def _roster(self) -> dict[str, Any]:
        threads = choose_for_nodes(self.prepared).threads
        told = {client: told_tree(told) for client, told in self.told.items()}
        return {"told": told, "fingerprint": fingerprint_of(self.prepared), "threads": threads}

    @cached_property
    def _pack(self) -> Tensor:
        return as_tensor(Pack.of(self.public).encode())

    # Conversations with one node ---------------------------------------------------------------------------------------
    def asking_terms(self, client: str) -> Talk:
        """What a client tells of its rows; it must be what it told before."""
        # a folder of the server's; see `Remote.give`
        config = {**resolved(self.config), "init_from": None}
        tree = {"config": config, "public": self.public.public_hash()}
        answer = yield message("terms", tree, run=self.run)
        if answer.head.get("ask") == "lacks":
            answer = yield message("terms", {**tree, "pack": self._pack}, run=self.run)
        if answer.head.get("ask") != "told":
            return answer
        told = self.hear(client, body_of(answer))
        if client in self.told and self.told[client].hash != told.hash:
            raise Refused("its rows are not those that it began with")
        self.told.setdefault(client, told)  # nodes take no second roster in one run
        return answer

    def hear(self, client: str, tree: Any) -> Told:
        """Read what a client tells of its rows. Raises Refused."""
        return hear_told(tree, self.public.task.outputs, self.public.own_view(client))

    def asking_ready(self) -> Talk:
        """Whether a client is ready, now that all have told."""
        return (yield message("roster", self._roster, run=self.run))

    def preparing(self, client: str) -> Talk:
        """All of it anew, with a node that was started since. Raises Refused if it is not ready then."""
        answer = yield from self.asking_terms(client)
        if answer.head.get("ask") == "told":
            answer = yield from self.asking_ready()
        if answer.head.get("ask") != "ready":
            raise Refused(reason(answer))
        return answer


def convene(
    config: Config, post: Post, wait: float, known: Mapping[str, Any] | None = None
) -> Convened:
    """Meet everybody whom the configuration names.

    Args:
        wait: seconds until all have to be there.
        known: of the run that is gone on with (see `Convened.known`): who is not there may come later, if anybody is.

    Raises:
        UserError: what is wrong with the configuration or the server's own data.
        RunFailed: somebody is missing, or refuses.
    """
    ids = list(expand(config.clients))
    missing = post.gather(wait)
    if missing and (known is None or len(missing) == len(ids)):
        raise RunFailed(
            f"not there after {wait:g} s: {', '.join(missing[:6])}{' …' if len(missing) > 6 else ''}"
        )
    names = references(config.model_dump())
    before = known["settings"] if known is not None else {}
    largest = _largest_side(config)
    told_by = {
        id: _settings(id, post.here[id], names, largest) if id in post.here else before.get(id, {})
        for id in ids
    }
    own = [{"match": id, **settings} for id, settings in told_by.items() if settings]
    if own:
        plain = resolved(config)
        plain["clients"]["overrides"] = [*plain["clients"]["overrides"], *own]
        config = load_config(plain, allow_code=CodePermission(granted=names))
    run = str(known["run"]) if known is not None else secrets.token_hex(16)
    convened = Convened(post, config, deal(config, absent=ids), run, told_by)
    if known is not None:
        convened.told |= {id: convened.hear(id, tree) for id, tree in known["told"].items()}
    here = [id for id in ids if id not in missing]
    _all(post, {id: _bound(convened.asking_terms, id) for id in here}, "told")
    _all(post, dict.fromkeys(here, convened.asking_ready), "ready")
    for id in missing:
        post.say(f"{id} is not there; going on without it")
    return convened


def _largest_side(config: Config) -> int:
    """Return the side in pixels to which a node may resize: more than usual where the server's own configuration asks for it."""
    views = [
        config.server.preprocess,
        *(settings.preprocess for settings in expand(config.clients).values()),
    ]
    return max(MOST_PIXELS, *(view.resize or 0 for view in views))


def _settings(client: str, here: object, names: Collection[str], largest: int) -> dict[str, Any]:
    try:
        return hear_settings(here, names, largest)
    except Refused as error:
        raise RunFailed(f"{client}: refused: {error}") from None


def _bound(talk: Callable[[str], Talk], client: str) -> Callable[[], Talk]:
    return lambda: talk(client)


def _all(post: Post, talks: Mapping[str, Callable[[], Talk]], wanted: str) -> None:
    for client, answer in post.converse(talks, PREPARING, len(talks)):
        if isinstance(answer, Absent):
            raise RunFailed(f"{client}: {answer}")
        if answer.head.get("ask") != wanted:
            raise RunFailed(f"{client} refuses: {reason(answer)}")
