"""The client's side of the secure sum: four answers, each given once a round (Bonawitz et al. 2017, figure 4).

Between them a client remembers its secrets in `notes`: private, forgotten when the round ends, on disk only in a deployment, in
the folder of a node that may be killed between two of them.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from hetero_fl.communication.protocol import Message, Talk
from hetero_fl.communication.secure_aggregation import crypto
from hetero_fl.communication.secure_aggregation.crypto import Words, mask
from hetero_fl.communication.secure_aggregation.messages import (
    REQUESTS,
    SEALED,
    TAG,
    Arrays,
    Field,
    numbers_of,
    octets,
    read,
    row,
    write,
)
from hetero_fl.core.payload import PayloadError

# (upload, unit of weights) -> integers to be summed; raises PayloadError
Packer = Callable[[bytes, float], Words]
Notes = MutableMapping[str, bytes]
HELD: dict[str, Field] = {  # what a client remembers
    "next": (np.uint8, (None,)),  # the one request that it will answer
    "tag": (np.uint8, (TAG,)),
    "secrets": (np.uint8, (3, 32)),  # private keys of shares and of masks, the seed of its own mask
    "head": (np.int32, (2,)),  # its own number, the threshold
    "numbers": (np.int32, (None,)),  # of its neighbourhood, itself among them
    "keys": (np.uint8, (None, 64)),  # their public keys: of shares and of masks
    "own": (np.uint8, (2, crypto.SHARE_LENGTH)),  # its shares of its own secrets
    "pairs": (np.uint8, (None, 32)),  # the keys in which shares are sealed, of each neighbour
    "mates": (np.int32, (None,)),  # neighbours with whom it shares a mask
    "sealed": (np.uint8, (None, SEALED)),  # their shares
}


def answer(client: str, message: Message, notes: Notes, packer: Callable[[bytes], Packer]) -> Talk:
    """The reply to one request; "refused", with the reason, where it is not what an honest server would ask now.

    `packer`: what makes vectors of the layout with this digest; raises PayloadError if it is none that was agreed.
    """
    try:
        if message.ask not in REQUESTS:
            raise PayloadError(f"{message.ask[:20]!r} is nothing that a secure sum asks")
        got = read(message.body, REQUESTS[message.ask])
        if message.ask == "keys":
            return Message("keys", _advertise(client, got, notes))
        held = _held(client, message.ask, got, notes)
        if message.ask == "shares":
            return Message("shares", _share(client, held, got, notes))
        if message.ask == "unmask":
            return Message("unmask", _unmask(client, held, got, notes))
        streams, pack = _streams(held, got), packer(got["layout"].tobytes())
        upload = yield got["broadcast"].tobytes()
        masked = pack(upload, 2.0 ** int(got["head"][0]))
        mask(masked, streams)
        _remember(
            client, notes, "unmask", {**held, "mates": got["numbers"], "sealed": got["sealed"]}
        )
        return Message("train", write({"tag": held["tag"], "vector": masked.view(np.int64)}))
    except PayloadError as error:
        return Message("refused", str(error).encode())


def _advertise(client: str, got: Arrays, notes: Notes) -> bytes:
    secrets = (crypto.new_key(), crypto.new_key(), crypto.new_seed())
    public = crypto.public(secrets[0]) + crypto.public(secrets[1])
    none = {name: np.zeros([d or 0 for d in shape], dtype) for name, (dtype, shape) in HELD.items()}
    _remember(
        client,
        notes,
        "shares",
        {**none, "tag": got["tag"], "secrets": octets(*secrets), "keys": octets(public)},
    )
    return write({"tag": got["tag"], "keys": row(public)})


def _share(client: str, held: Arrays, got: Arrays, notes: Notes) -> bytes:
    you, threshold = got["head"].tolist()
    numbers, public = numbers_of(got["numbers"]), [bytes(k) for k in got["keys"]]
    if (
        len(numbers) != len(public)
        or you not in numbers
        or public[numbers.index(you)] != held["keys"][0].tobytes()
    ):
        raise PayloadError("other keys than mine stand under my number")
    if len({k[:32] for k in public} | {k[32:] for k in public}) < 2 * len(public):
        raise PayloadError("two clients with one key")
    if threshold < 2 or not len(numbers) < 2 * threshold <= 2 * len(numbers):
        raise PayloadError(
            f"a threshold of {threshold} of {len(numbers)} clients; it is more than half of them"
        )
    secret, masking, seed = (bytes(s) for s in held["secrets"])
    pairs = [
        a + b
        for a, b in zip(
            *(crypto.split_secret(s, threshold, numbers) for s in (masking, seed)), strict=True
        )
    ]
    peers = [i for i, number in enumerate(numbers) if number != you]
    tag = held["tag"].tobytes()
    loaded = crypto.loaded(secret)
    shared = [crypto.agree(loaded, public[i][:32], b"shares") for i in peers]
    sealed = [
        crypto.seal(key, pairs[i], _about(tag, you, numbers[i]))
        for key, i in zip(shared, peers, strict=True)
    ]
    mine = pairs[numbers.index(you)]
    now = {
        "head": got["head"],
        "numbers": got["numbers"],
        "keys": got["keys"],
        "pairs": octets(*shared),
    }
    own = octets(mine[: crypto.SHARE_LENGTH], mine[crypto.SHARE_LENGTH :])
    _remember(client, notes, "train", {**held, **now, "own": own})
    others = np.array([numbers[i] for i in peers], np.int32)
    bound = row(crypto.commitment(seed, tag))
    return write(
        {"tag": held["tag"], "commitment": bound, "numbers": others, "sealed": octets(*sealed)}
    )


def _streams(held: Arrays, got: Arrays) -> list[tuple[bytes, bool]]:
    """The masks of this client's vector: its own, and one with each mate, which the one of lower number takes off again."""
    you, threshold = held["head"].tolist()
    mates = numbers_of(got["numbers"])
    public = dict(zip(held["numbers"].tolist(), held["keys"], strict=True))
    if len(mates) != len(got["sealed"]) or you in mates or not set(mates) <= set(public):
        raise PayloadError("shares from others than my neighbours")
    if len(mates) + 1 < threshold:
        raise PayloadError(
            f"{len(mates) + 1} clients are left in my neighbourhood, {threshold} are needed"
        )
    if not 0 <= int(got["head"][0]) < 64:
        raise PayloadError("a unit of weights that is none")
    _, masking, seed = (bytes(s) for s in held["secrets"])
    key, tag = crypto.loaded(masking), held["tag"].tobytes()
    return [(seed, False), *(pair_mask(key, public[m].tobytes(), you, m, tag) for m in mates)]


def _unmask(client: str, held: Arrays, got: Arrays, notes: Notes) -> bytes:
    """Of each neighbour one share: of its seed if its vector is in the sum, of its masking key if it left. Never both: what
    is asked for twice or inconsistently is refused, and a second request of the round finds no notes."""
    you, threshold = held["head"].tolist()
    survivors, dropped = numbers_of(got["survivors"]), numbers_of(got["dropped"])
    if both := set(survivors) & set(dropped):
        raise PayloadError(f"asked for both secrets of client number {min(both)}")
    if set(survivors) | set(dropped) != {you, *held["mates"].tolist()} or you not in survivors:
        raise PayloadError("survivors that are not my neighbours and I")
    if len(survivors) < threshold:
        raise PayloadError(
            f"{len(survivors)} survivors in my neighbourhood, {threshold} are needed"
        )
    others = [number for number in held["numbers"].tolist() if number != you]
    pairs = dict(zip(others, held["pairs"], strict=True))
    sealed = dict(zip(held["mates"].tolist(), held["sealed"], strict=True))
    numbers, shares = [], []
    for number in (*survivors, *dropped):
        try:
            if number == you:
                pair = held["own"].tobytes()
            else:
                about = _about(held["tag"].tobytes(), number, you)
                pair = crypto.unseal(pairs[number].tobytes(), sealed[number].tobytes(), about)
        except PayloadError:
            continue  # its sender's fault: the others' shares may do
        numbers.append(number)
        shares.append(
            pair[crypto.SHARE_LENGTH :] if number in survivors else pair[: crypto.SHARE_LENGTH]
        )
    notes.pop(client)
    return write(
        {"tag": held["tag"], "numbers": np.array(numbers, np.int32), "shares": octets(*shares)}
    )


def pair_mask(
    private: X25519PrivateKey, public: bytes, mine: int, other: int, tag: bytes
) -> tuple[bytes, bool]:
    """The key of the mask that two clients share, and whether this one takes it off. `public`: both keys of the other."""
    low, high = sorted((mine, other))
    return crypto.agree(private, public[32:], b"mask" + _about(tag, low, high)), mine == low


def _about(tag: bytes, first: int, second: int) -> bytes:
    return tag + first.to_bytes(4, "little") + second.to_bytes(4, "little")


def _held(client: str, ask: str, got: Arrays, notes: Notes) -> Arrays:
    if client not in notes:
        raise PayloadError(f"{ask!r} was asked outside a round")
    held = read(notes[client], HELD)
    if got["tag"].tobytes() != held["tag"].tobytes():
        raise PayloadError("a message of another round")
    if ask.encode() != held["next"].tobytes():
        raise PayloadError(f"{ask!r} was asked out of turn")
    return held


def _remember(client: str, notes: Notes, then: str, held: Arrays) -> None:
    notes[client] = write({**held, "next": row(then.encode())})
