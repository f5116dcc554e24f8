"""The client's side of the secure sum: four answers, each given once a round (Bonawitz et al. 2017, figure 4).

Between them a client remembers its secrets in `notes`: private, forgotten when the round ends, on disk only in a deployment, in
the folder of a node that may be killed between two of them.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from hetero_fl.communication.protocol import Message, TrainingRequest
from hetero_fl.communication.secure_aggregation import crypto
from hetero_fl.communication.secure_aggregation.crypto import Words, apply_masks
from hetero_fl.communication.secure_aggregation.messages import (
    REQUESTS,
    SEALED,
    TAG,
    Arrays,
    Field,
    byte_string_to_row,
    client_numbers,
    decode_arrays,
    encode_arrays,
    stack_byte_strings,
)
from hetero_fl.core.payload import PayloadError

# (upload, unit of weights) -> integers to be summed; raises PayloadError
Packer = Callable[[bytes, float], Words]
Notes = MutableMapping[str, bytes]
STATE_FIELDS: dict[str, Field] = {  # what a client remembers
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


def answer(
    client_id: str, message: Message, notes: Notes, packer: Callable[[bytes], Packer]
) -> Message | TrainingRequest:
    """Answer one request; "refused", with the reason, if an honest server would not send it now.

    Args:
        client_id: The client.
        message: The request.
        notes: What clients remember between exchanges.
        packer: Returns the packer of the layout with a digest. Raises PayloadError for a layout
            that was not agreed.
    """
    try:
        if message.kind not in REQUESTS:
            raise PayloadError(f"{message.kind[:20]!r} is nothing that a secure sum asks")
        request = decode_arrays(message.body, REQUESTS[message.kind])
        if message.kind == "keys":
            return Message("keys", _advertise(client_id, request, notes))
        state = _load_state(client_id, message.kind, request, notes)
        if message.kind == "shares":
            return Message("shares", _share(client_id, state, request, notes))
        if message.kind == "unmask":
            return Message("unmask", _unmask(client_id, state, request, notes))
        streams = _streams(state, request)
        pack = packer(request["layout"].tobytes())
    except PayloadError as error:
        return _refused(error)

    def mask(upload: bytes) -> Message:
        try:
            vector = pack(upload, 2.0 ** int(request["head"][0]))
        except PayloadError as error:
            return _refused(error)
        apply_masks(vector, streams)
        known = {**state, "mates": request["numbers"], "sealed": request["sealed"]}
        _store_state(client_id, notes, "unmask", known)
        arrays = {"tag": state["tag"], "vector": vector.view(np.int64)}
        return Message("train", encode_arrays(arrays))

    return TrainingRequest(request["broadcast"].tobytes(), mask)


def _refused(error: PayloadError) -> Message:
    return Message("refused", str(error).encode())


def _advertise(client: str, request: Arrays, notes: Notes) -> bytes:
    secrets = (crypto.new_key(), crypto.new_key(), crypto.new_seed())
    public = crypto.public_key(secrets[0]) + crypto.public_key(secrets[1])
    none = {
        name: np.zeros([d or 0 for d in shape], dtype)
        for name, (dtype, shape) in STATE_FIELDS.items()
    }
    _store_state(
        client,
        notes,
        "shares",
        {
            **none,
            "tag": request["tag"],
            "secrets": stack_byte_strings(*secrets),
            "keys": stack_byte_strings(public),
        },
    )
    return encode_arrays({"tag": request["tag"], "keys": byte_string_to_row(public)})


def _share(client: str, state: Arrays, request: Arrays, notes: Notes) -> bytes:
    you, threshold = request["head"].tolist()
    numbers = client_numbers(request["numbers"])
    public = [bytes(k) for k in request["keys"]]
    if (
        len(numbers) != len(public)
        or you not in numbers
        or public[numbers.index(you)] != state["keys"][0].tobytes()
    ):
        raise PayloadError("other keys than mine stand under my number")
    if len({k[:32] for k in public} | {k[32:] for k in public}) < 2 * len(public):
        raise PayloadError("two clients with one key")
    if threshold < 2 or not len(numbers) < 2 * threshold <= 2 * len(numbers):
        raise PayloadError(
            f"a threshold of {threshold} of {len(numbers)} clients; it is more than half of them"
        )
    secret, masking, seed = (bytes(s) for s in state["secrets"])
    pairs = [
        a + b
        for a, b in zip(
            *(crypto.split_secret(s, threshold, numbers) for s in (masking, seed)), strict=True
        )
    ]
    peers = [i for i, number in enumerate(numbers) if number != you]
    tag = state["tag"].tobytes()
    loaded = crypto.load_private_key(secret)
    shared = [crypto.derive_shared_key(loaded, public[i][:32], b"shares") for i in peers]
    sealed = [
        crypto.encrypt(key, pairs[i], _associated_data(tag, you, numbers[i]))
        for key, i in zip(shared, peers, strict=True)
    ]
    mine = pairs[numbers.index(you)]
    now = {
        "head": request["head"],
        "numbers": request["numbers"],
        "keys": request["keys"],
        "pairs": stack_byte_strings(*shared),
    }
    own = stack_byte_strings(mine[: crypto.SHARE_LENGTH], mine[crypto.SHARE_LENGTH :])
    _store_state(client, notes, "train", {**state, **now, "own": own})
    others = np.array([numbers[i] for i in peers], np.int32)
    bound = byte_string_to_row(crypto.commit_to_seed(seed, tag))
    return encode_arrays(
        {
            "tag": state["tag"],
            "commitment": bound,
            "numbers": others,
            "sealed": stack_byte_strings(*sealed),
        }
    )


def _streams(state: Arrays, request: Arrays) -> list[tuple[bytes, bool]]:
    """The masks of this client's vector: its own, and one with each mate, which the one of lower number takes off again."""
    you, threshold = state["head"].tolist()
    mates = client_numbers(request["numbers"])
    public = dict(zip(state["numbers"].tolist(), state["keys"], strict=True))
    if len(mates) != len(request["sealed"]) or you in mates or not set(mates) <= set(public):
        raise PayloadError("shares from others than my neighbours")
    if len(mates) + 1 < threshold:
        raise PayloadError(
            f"{len(mates) + 1} clients are left in my neighbourhood, {threshold} are needed"
        )
    if not 0 <= int(request["head"][0]) < 64:
        raise PayloadError("a unit of weights that is none")
    _, masking, seed = (bytes(s) for s in state["secrets"])
    key = crypto.load_private_key(masking)
    tag = state["tag"].tobytes()
    return [(seed, False), *(pair_mask(key, public[m].tobytes(), you, m, tag) for m in mates)]


def _unmask(client: str, state: Arrays, request: Arrays, notes: Notes) -> bytes:
    """Of each neighbour one share: of its seed if its vector is in the sum, of its masking key if it left. Never both: what
    is asked for twice or inconsistently is refused, and a second request of the round finds no notes."""
    you, threshold = state["head"].tolist()
    survivors = client_numbers(request["survivors"])
    dropped = client_numbers(request["dropped"])
    if both := set(survivors) & set(dropped):
        raise PayloadError(f"asked for both secrets of client number {min(both)}")
    if set(survivors) | set(dropped) != {you, *state["mates"].tolist()} or you not in survivors:
        raise PayloadError("survivors that are not my neighbours and I")
    if len(survivors) < threshold:
        raise PayloadError(
            f"{len(survivors)} survivors in my neighbourhood, {threshold} are needed"
        )
    others = [number for number in state["numbers"].tolist() if number != you]
    pairs = dict(zip(others, state["pairs"], strict=True))
    sealed = dict(zip(state["mates"].tolist(), state["sealed"], strict=True))
    numbers = []
    shares = []
    for number in (*survivors, *dropped):
        try:
            if number == you:
                pair = state["own"].tobytes()
            else:
                about = _associated_data(state["tag"].tobytes(), number, you)
                pair = crypto.decrypt(pairs[number].tobytes(), sealed[number].tobytes(), about)
        except PayloadError:
            continue  # its sender's fault: the others' shares may do
        numbers.append(number)
        shares.append(
            pair[crypto.SHARE_LENGTH :] if number in survivors else pair[: crypto.SHARE_LENGTH]
        )
    notes.pop(client)
    return encode_arrays(
        {
            "tag": state["tag"],
            "numbers": np.array(numbers, np.int32),
            "shares": stack_byte_strings(*shares),
        }
    )


def pair_mask(
    private: X25519PrivateKey, public: bytes, mine: int, other: int, tag: bytes
) -> tuple[bytes, bool]:
    """The key of the mask that two clients share, and whether this one takes it off. `public`: both keys of the other."""
    low, high = sorted((mine, other))
    return crypto.derive_shared_key(
        private, public[32:], b"mask" + _associated_data(tag, low, high)
    ), mine == low


def _associated_data(tag: bytes, first: int, second: int) -> bytes:
    return tag + first.to_bytes(4, "little") + second.to_bytes(4, "little")


def _load_state(client: str, ask: str, request: Arrays, notes: Notes) -> Arrays:
    if client not in notes:
        raise PayloadError(f"{ask!r} was asked outside a round")
    held = decode_arrays(notes[client], STATE_FIELDS)
    if request["tag"].tobytes() != held["tag"].tobytes():
        raise PayloadError("a message of another round")
    if ask.encode() != held["next"].tobytes():
        raise PayloadError(f"{ask!r} was asked out of turn")
    return held


def _store_state(client: str, notes: Notes, next_request: str, state: Arrays) -> None:
    notes[client] = encode_arrays({**state, "next": byte_string_to_row(next_request.encode())})
