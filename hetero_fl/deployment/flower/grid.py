"""Messages over Flower's `Grid`: the server's end of a federation that runs as a Flower app."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Mapping

import httpx
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from hetero_fl.deployment.flower.records import from_message, to_content
from hetero_fl.deployment.transport import Envelope, UnreadableAnswer
from hetero_fl.utils.errors import RunFailedError, one_line

SHORTEST_PAUSE = 0.02  # seconds between two questions whether an answer has come
LONGEST_PAUSE = 0.5
PAUSE_GROWTH = 1.15
NODES_SECONDS = 2.0  # between two looks at the connected nodes while answers are awaited


class GridTransport:
    """A transport (see `transport.Transport`) over the grid of a running ServerApp.

    A node that restarts keeps its Flower ID but loses the messages that it had taken, so it is
    given another number here.

    Args:
        grid: The grid that Flower passes to the ServerApp.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._numbers = itertools.count(1)
        self._known: dict[tuple[int, str], int] = {}  # (Flower ID, activation) -> number
        self._flower_ids: dict[int, int] = {}  # number -> Flower ID, of connected nodes
        self._awaited: dict[str, tuple[int, float]] = {}  # message -> (node, when it expires)
        self._lost = itertools.count(1)

    def nodes(self) -> Mapping[int, bytes]:
        """Return the connected nodes, each with its public key in PEM."""
        try:
            found = list(self._grid.get_nodes())
        except httpx.HTTPError as error:
            raise _unreachable(error) from None
        present: dict[tuple[int, str], int] = {}
        keys: dict[int, bytes] = {}
        for info in found:
            identity = (info.node_id, getattr(info, "last_activated_at", ""))
            number = self._known.get(identity)
            number = next(self._numbers) if number is None else number
            present[identity] = number
            keys[number] = getattr(info, "public_key", b"")
        self._known = present
        self._flower_ids = {number: identity[0] for identity, number in present.items()}
        return keys

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        """Send a message to a node and return the message's ID.

        Args:
            node: The node's number.
            envelope: The message.
            within: Seconds after which the message and its answer expire.
        """
        if node not in self._flower_ids:
            return f"lost-{next(self._lost)}"
        message = Message(
            to_content(envelope), self._flower_ids[node], MessageType.QUERY, ttl=within
        )
        try:
            sent = list(self._grid.push_messages([message]))
        except httpx.HTTPError as error:
            raise _unreachable(error) from None
        if not sent or not sent[0]:
            return f"lost-{next(self._lost)}"
        self._awaited[sent[0]] = (node, time.monotonic() + within)
        return sent[0]

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """Return answers that have come, waiting for the first up to `wait` seconds.

        None stands for an answer that will never come.
        """
        end = time.monotonic() + wait
        look = time.monotonic() + NODES_SECONDS
        pause = SHORTEST_PAUSE
        while True:
            answers: dict[str, Envelope | None] = {
                n: None for n in numbers if n not in self._awaited
            }
            awaited = [number for number in numbers if number in self._awaited]
            if awaited:
                answers |= self._answers(awaited)
            if not answers and time.monotonic() >= look:
                answers = self._lost_messages(awaited)
                look = time.monotonic() + NODES_SECONDS
            for number in answers:
                self._awaited.pop(number, None)
            left = end - time.monotonic()
            if answers or left <= 0 or not numbers:
                return answers
            time.sleep(min(pause, left))
            pause = min(pause * PAUSE_GROWTH, LONGEST_PAUSE)

    def close(self) -> None:
        """Drop answers that nobody awaits; Flower closes the grid itself."""
        self._awaited.clear()

    def _answers(self, awaited: list[str]) -> dict[str, Envelope | None]:
        """Return the answers that have come; those to expired messages are discarded."""
        now = time.monotonic()
        expired = [n for n, (_, end) in self._awaited.items() if end < now and n not in awaited]
        for number in expired:
            del self._awaited[number]
        answers = self._pull([*awaited, *expired])
        return {number: answer for number, answer in answers.items() if number in awaited}

    def _pull(self, numbers: list[str]) -> dict[str, Envelope | None]:
        """Return the answers that have come. One that cannot be read does not hide the others."""
        try:
            messages = list(self._grid.pull_messages(numbers))
        except httpx.HTTPError as error:
            raise _unreachable(error) from None
        except Exception as error:  # whatever a node has sent
            if len(numbers) == 1:
                reason = f"{type(error).__name__}: {error}"
                return {numbers[0]: UnreadableAnswer.with_reason(one_line(reason))}
            answers: dict[str, Envelope | None] = {}
            for number in numbers:
                answers |= self._pull([number])
            return answers
        return {m.metadata.reply_to_message_id: from_message(m) for m in messages}

    def _lost_messages(self, awaited: list[str]) -> dict[str, Envelope | None]:
        """Return the messages whose nodes have gone or restarted since."""
        present = self.nodes()
        return {number: None for number in awaited if self._awaited[number][0] not in present}


def _unreachable(error: httpx.HTTPError) -> RunFailedError:
    return RunFailedError(f"Flower's SuperLink does not answer ({one_line(error)})")
