"""Messages between processes: long strings lie in shared memory, and what the other side still has is only named."""

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
from tests.helpers.workers import PATIENCE


def ends(remembered: int = 2) -> tuple[SharedMemoryConnection, SharedMemoryConnection]:
    one, other = multiprocessing.Pipe()
    return SharedMemoryConnection(one, sent_strings=remembered), SharedMemoryConnection(
        other, received_strings=remembered
    )


def through_pipe(carrier: SharedMemoryConnection, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the messages that this end puts into the pipe from now on."""
    sizes: list[int] = []
    plain = Connection._send_bytes  # type: ignore[attr-defined]

    def counted(self: Connection, data: bytes) -> None:
        if self is carrier.connection:
            sizes.append(len(data))
        plain(self, data)

    monkeypatch.setattr(Connection, "_send_bytes", counted)
    return sizes


def passed(message: Any, here: SharedMemoryConnection, there: SharedMemoryConnection) -> Any:
    """What arrives of a message; received while it is sent, since a pipe holds little."""
    with ThreadPoolExecutor(1) as other:
        received = other.submit(there.receive)
        here.send(message)
        return received.result(timeout=PATIENCE)


def test_any_message_arrives_whole_whatever_its_strings() -> None:
    here, there = ends()
    long, longer = bytes(range(256)) * (LONG // 256), b"x" * (3 * LONG + 1)
    for message in (
        {"a": long, "b": [longer, b"short", long], "c": "text"},
        [longer],
        b"",
        [b"y" * LONG, long],
    ):
        assert passed(message, here, there) == message
        back = [message, len(message)]
        assert passed(back, there, here) == back  # through the other end's own memory


def test_memory_is_written_again_without_disturbing_what_was_read() -> None:
    here, there = ends(remembered=0)
    kept = []
    for byte in b"abc":
        kept.append(passed(bytes([byte]) * LONG, here, there))
    assert [string[:1] + string[-1:] for string in kept] == [b"aa", b"bb", b"cc"]


def test_a_second_message_may_follow_before_the_first_is_read() -> None:
    here, there = ends(remembered=0)
    for _ in range(3):
        first, second = b"a" * LONG, b"b" * LONG
        here.send(first)
        here.send(second)
        assert (there.receive(), there.receive()) == (first, second)


def test_a_string_is_sent_once_while_the_other_side_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = ends()
    first, second, third = (bytes([b]) * (LONG + b) for b in b"abc")
    filled: list[int] = []
    plain = SharedMemoryBlock.fill

    def fill(self: SharedMemoryBlock, strings: list[memoryview]) -> object:
        filled.append(len(strings))
        return plain(self, strings)

    monkeypatch.setattr(SharedMemoryBlock, "fill", fill)
    got = []
    for string in (first, second, first, second, third, second, first, third):
        got.append(passed([string, string], here, there))
    assert [g[0] for g in got] == [first, second, first, second, third, second, first, third]
    assert filled == [1, 1, 0, 0, 1, 0, 1, 0]  # the oldest of two is forgotten at both ends
    assert len(here._sent.strings) == len(there._received.strings) == 2
    equal = bytes(bytearray(third))
    # another string, if an equal one
    assert passed(equal, here, there) == third and filled[-1] == 1


def test_long_strings_do_not_go_through_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = ends()
    sizes = through_pipe(here, monkeypatch)
    assert len(passed({"model": b"z" * (50 * LONG)}, here, there)["model"]) == 50 * LONG
    assert 0 < sum(sizes) < LONG


def test_what_finds_no_room_in_shared_memory_goes_through_the_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, there = ends(remembered=1)
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
        assert passed(strings, here, there) == strings
        monkeypatch.undo()


def test_tensors_of_a_payload_arrive_in_memory_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, there = ends(remembered=0)
    sizes = through_pipe(here, monkeypatch)
    model = {
        "weight": torch.randn(300, 200),
        "strided": torch.randn(50, 40).T,
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    sent = Payload({"model": Item(model, torch.rand(3), "params")}, {"loss": "1.5"})

    got = passed(Message("upload", sent), here, there).content
    passed(Message("upload", Payload({"model": torch.zeros(70_000)})), here, there)

    assert sum(sizes) < LONG
    assert got.encode() == sent.encode()
    got["model"]["weight"].add_(1)  # a writable copy
    assert torch.equal(got["model"]["strided"], model["strided"])
