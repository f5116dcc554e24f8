"""Conversion of envelopes to Flower messages, and the transport over Flower's `Grid`."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Collection, Iterable, Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from hetero_fl.deployment.transport import Envelope, Head, UnreadableAnswer
from hetero_fl.utils.errors import RunFailedError, one_line

# Records of a Flower message.
HEAD = "head"
BODY = "body"
# Bodies up to this size are sent in a ConfigRecord, which takes 8 instead of 14 remote calls.
SMALL_BODY_BYTES = 2**16
# Bounds and growth of the interval in seconds at which answers are polled.
MIN_PAUSE = 0.05
MAX_PAUSE = 0.5
PAUSE_GROWTH = 1.15
# Seconds between checks of the connected nodes while answers are pending.
NODES_SECONDS = 2.0

# Result of a pull. The list is empty if there is no answer yet. Otherwise, it contains one answer,
# which is None if it will never arrive. If the SuperLink does not respond, the result is an error.
PullResult = list[Envelope | None] | RunFailedError


def to_content(envelope: Envelope) -> RecordDict:
    """Convert an envelope to the content of a Flower message."""
    head = ConfigRecord(dict(envelope.head))
    body = envelope.body
    if len(body) <= SMALL_BODY_BYTES:
        return RecordDict({HEAD: head, BODY: ConfigRecord({BODY: body})})
    array = Array(dtype="uint8", shape=(len(body),), stype="bytes", data=body)
    return RecordDict({HEAD: head, BODY: ArrayRecord({BODY: array})})


def from_message(message: Message) -> Envelope | None:
    """Extract the envelope from a Flower message.

    Returns:
        The envelope, or None if the message reports an error or was not created by `to_content`.
    """
    if not message.has_content():
        return None
    small = message.content.config_records
    large = message.content.array_records
    try:
        head = small[HEAD]
        body = large[BODY][BODY].data if BODY in large else small[BODY][BODY]
    except (KeyError, AttributeError, TypeError):
        return None
    plain: Head = {name: value for name, value in head.items() if not isinstance(value, list)}
    return Envelope(plain, body) if len(plain) == len(head) and isinstance(body, bytes) else None


class GridTransport:
    """Transport over the grid of a running ServerApp.

    A node that restarts keeps its Flower ID but loses the messages that it has received, so the
    node gets a new number. Each answer is pulled separately in a thread, because Flower blocks
    while a node is sending an answer and returns each answer only once, even if the answer cannot
    be decoded.

    Args:
        grid: The grid that Flower passes to the ServerApp.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._numbers = itertools.count(1)
        self._lost_numbers = itertools.count(1)
        # Node numbers, keyed by (Flower ID, time of activation).
        self._known: dict[tuple[int, str], int] = {}
        # Flower IDs of the connected nodes, keyed by node number.
        self._flower_ids: dict[int, int] = {}
        # Node numbers of the messages with a pending answer.
        self._awaited: dict[str, int] = {}
        # Expiry times of the messages with a pending or unread answer.
        self._expiry: dict[str, float] = {}
        # Expiry times of the messages whose node disconnected.
        self._unclaimed: dict[str, float] = {}
        self._ready: dict[str, Envelope | None] = {}
        self._pulling: set[str] = set()
        self._results: queue.SimpleQueue[tuple[str, PullResult]] = queue.SimpleQueue()

    def nodes(self) -> Mapping[int, bytes]:
        """Return the public keys of the connected nodes in PEM format, keyed by node number.

        Raises:
            RunFailedError: If the SuperLink does not respond or Flower has stopped the run.
        """
        try:
            found = list(self._grid.get_nodes())
        except BaseException as error:
            raise _failure(error) from None
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
        """Send a message to a node and return the ID of the message.

        If the node is not connected, the message is not sent, and its answer is None.

        Args:
            node: Number of the node.
            envelope: Message to send.
            within: Seconds after which the message and its answer expire.

        Raises:
            RunFailedError: If the SuperLink does not respond or Flower has stopped the run.
        """
        if node not in self._flower_ids:
            return f"lost-{next(self._lost_numbers)}"
        message = Message(
            to_content(envelope), self._flower_ids[node], MessageType.QUERY, ttl=within
        )
        try:
            sent = list(self._grid.push_messages([message]))
        except BaseException as error:
            raise _failure(error) from None
        if not sent or not sent[0]:
            return f"lost-{next(self._lost_numbers)}"
        self._awaited[sent[0]] = node
        self._expiry[sent[0]] = time.monotonic() + within
        return sent[0]

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """Return the answers that have arrived (see `Transport.pull`)."""
        deadline = time.monotonic() + wait
        next_check = time.monotonic() + NODES_SECONDS
        pause = MIN_PAUSE
        self._abandon_expired(numbers)
        while True:
            remaining = max(0.0, deadline - time.monotonic())
            self._start_pulls(number for number in numbers if number in self._awaited)
            self._collect_results(min(pause, remaining))
            answers: dict[str, Envelope | None] = {
                n: None for n in numbers if n not in self._awaited and n not in self._ready
            }
            answers |= {n: self._ready.pop(n) for n in numbers if n in self._ready}
            for number in answers:
                self._expiry.pop(number, None)
            if not answers and time.monotonic() >= next_check:
                answers = self._lost_messages(numbers)
                self._start_pulls(self._unclaimed)
                next_check = time.monotonic() + NODES_SECONDS
            if answers or remaining <= 0 or not numbers:
                return answers
            pause = min(pause * PAUSE_GROWTH, MAX_PAUSE)

    def close(self) -> None:
        """Discard all messages.

        The grid stays open, because Flower closes it.
        """
        self._awaited.clear()
        self._unclaimed.clear()

    def _start_pulls(self, numbers: Iterable[str]) -> None:
        for number in [n for n in numbers if n not in self._pulling]:
            self._pulling.add(number)
            threading.Thread(target=self._pull, args=(number,), daemon=True).start()

    def _pull(self, number: str) -> None:
        """Pull an answer in a thread."""
        result: PullResult
        try:
            result = [from_message(message) for message in self._grid.pull_messages([number])]
        except BaseException as error:
            result = self._explain(error)
        self._results.put((number, result))

    def _explain(self, error: BaseException) -> PullResult:
        """Return the result of a pull that failed.

        If the SuperLink still responds, the node sent an answer that cannot be decoded.
        """
        if not isinstance(error, Exception):
            return _failure(error)
        try:
            list(self._grid.get_nodes())
        except BaseException:
            return _failure(error)
        reason = one_line(f"{type(error).__name__}: {error}")
        return [UnreadableAnswer.with_reason(reason)]

    def _collect_results(self, seconds: float) -> None:
        """Collect results of the threads until an answer arrives or `seconds` have passed."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                number, result = self._results.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return
            self._pulling.discard(number)
            if isinstance(result, RunFailedError):
                raise result
            for answer in result:
                self._unclaimed.pop(number, None)
                if self._awaited.pop(number, None) is not None:
                    self._ready[number] = answer
                    deadline = 0.0

    def _lost_messages(self, numbers: Collection[str]) -> dict[str, Envelope | None]:
        """Return None for each message whose node has disconnected or restarted."""
        present = self.nodes()
        lost = [n for n in numbers if n in self._awaited and self._awaited[n] not in present]
        for number in lost:
            del self._awaited[number]
            self._unclaimed[number] = self._expiry.pop(number)
        return dict.fromkeys(lost)

    def _abandon_expired(self, numbers: Collection[str]) -> None:
        """Discard expired messages and pull the answers, so that Flower deletes these answers."""
        now = time.monotonic()
        for number in [n for n, end in self._unclaimed.items() if end < now]:
            del self._unclaimed[number]
        expired = [n for n, end in self._expiry.items() if end < now and n not in numbers]
        for number in expired:
            del self._expiry[number]
            self._ready.pop(number, None)
            if self._awaited.pop(number, None) is not None:
                self._start_pulls([number])


def _failure(error: BaseException) -> RunFailedError:
    """Convert an error of Flower to a RunFailedError, or raise it again if it is an interrupt."""
    # This class is not public and not a subclass of Exception.
    if type(error).__name__ == "RunNotRunningException":
        return RunFailedError("Flower has stopped the run")
    if not isinstance(error, Exception):
        raise error
    return RunFailedError(f"Flower's SuperLink does not answer ({one_line(error)})")
