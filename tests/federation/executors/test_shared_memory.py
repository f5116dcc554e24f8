"""Messages between processes: long strings use shared memory and are sent once."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from hetero_fl.communication.protocol import Message
from hetero_fl.core.payload import Item, Payload
from hetero_fl.federation.executors.processes import (
    LONG,
    SharedMemoryBlock,
    SharedMemoryConnection,
)
from tests.support.workers import PATIENCE


def ends(remembered: int = 2) -> tuple[SharedMemoryConnection, SharedMemoryConnection]:
    one, other = multiprocessing.Pipe()
    return SharedMemoryConnection(one, sent_strings=remembered), SharedMemoryConnection(
        other, received_strings=remembered
    )


def record_pipe_sizes(
    carrier: SharedMemoryConnection, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Return a list that records the sizes of messages this end writes to the pipe."""
    sizes: list[int] = []
    plain = Connection._send_bytes  # type: ignore[attr-defined]

    def counted(self: Connection, data: bytes) -> None:
        if self is carrier.connection:
            sizes.append(len(data))
        plain(self, data)

    monkeypatch.setattr(Connection, "_send_bytes", counted)
    return sizes


def transfer(message: Any, sender: SharedMemoryConnection, receiver: SharedMemoryConnection) -> Any:
    """Send a message and return what arrives; receive concurrently, because pipes are small."""
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(receiver.receive)
        sender.send(message)
        return received.result(timeout=PATIENCE)


def test_messages_arrive_complete() -> None:
    one, other = ends()
    long, longer = bytes(range(256)) * (LONG // 256), b"x" * (3 * LONG + 1)
    for message in (
        {"a": long, "b": [longer, b"short", long], "c": "text"},
        [longer],
        b"",
        [b"y" * LONG, long],
    ):
        assert transfer(message, one, other) == message
        back = [message, len(message)]
        # Through the shared memory of the other end.
        assert transfer(back, other, one) == back


def test_reused_memory_does_not_change_received_strings() -> None:
    one, other = ends(remembered=0)
    kept = []
    for byte in b"abc":
        kept.append(transfer(bytes([byte]) * LONG, one, other))
    assert [string[:1] + string[-1:] for string in kept] == [b"aa", b"bb", b"cc"]


def test_two_messages_may_be_sent_before_one_is_read() -> None:
    one, other = ends(remembered=0)
    for _ in range(3):
        first, second = b"a" * LONG, b"b" * LONG
        one.send(first)
        one.send(second)
        assert (other.receive(), other.receive()) == (first, second)


def test_known_strings_are_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = ends()
    first, second, third = (bytes([b]) * (LONG + b) for b in b"abc")
    filled: list[int] = []
    plain = SharedMemoryBlock.fill

    def fill(self: SharedMemoryBlock, strings: list[memoryview]) -> object:
        filled.append(len(strings))
        return plain(self, strings)

    monkeypatch.setattr(SharedMemoryBlock, "fill", fill)
    got = []
    for string in (first, second, first, second, third, second, first, third):
        got.append(transfer([string, string], one, other))
    assert [g[0] for g in got] == [first, second, first, second, third, second, first, third]
    # Both ends forget the oldest of two strings.
    assert filled == [1, 1, 0, 0, 1, 0, 1, 0]
    assert len(one._sent.strings) == len(other._received.strings) == 2
    equal = bytes(bytearray(third))
    # An equal string, but a different object.
    assert transfer(equal, one, other) == third and filled[-1] == 1


def test_long_strings_do_not_go_through_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = ends()
    sizes = record_pipe_sizes(one, monkeypatch)
    assert len(transfer({"model": b"z" * (50 * LONG)}, one, other)["model"]) == 50 * LONG
    assert 0 < sum(sizes) < LONG


def test_strings_without_room_in_shared_memory_use_the_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = ends(remembered=1)
    small, large, larger = (
        byte * size for byte, size in ((b"s", LONG), (b"l", 2 * LONG), (b"m", 3 * LONG))
    )

    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    for room, strings in (
        (True, [small]),
        (False, [large, larger]),
        (False, [larger, small]),
        (True, [large]),
    ):
        if not room:
            monkeypatch.setattr(torch.Tensor, "share_memory_", full)
        assert transfer(strings, one, other) == strings
        monkeypatch.undo()


def test_payload_tensors_arrive_as_writable_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = ends(remembered=0)
    sizes = record_pipe_sizes(one, monkeypatch)
    model = {
        "weight": torch.randn(300, 200),
        "strided": torch.randn(50, 40).T,
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    sent = Payload({"model": Item(model, torch.rand(3), "params")}, {"loss": "1.5"})

    got = transfer(Message("upload", sent), one, other).content
    transfer(Message("upload", Payload({"model": torch.zeros(70_000)})), one, other)

    assert sum(sizes) < LONG
    assert got.encode() == sent.encode()
    # A writable copy.
    got["model"]["weight"].add_(1)
    assert torch.equal(got["model"]["strided"], model["strided"])
