"""Client side of secure aggregation: four replies, each of which is sent once per round.

See Bonawitz et al. (2017), figure 4. Between two replies, the client's secrets are stored in
`notes`, which the server never receives and which are deleted when the round ends. In a deployment,
the notes are also written to the disk of the client's machine, because the process may be killed
between two replies.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from hetero_fl.communication import authenticated_encryption
from hetero_fl.communication.named_arrays import (
    Arrays,
    Field,
    byte_string_to_row,
    decode_arrays,
    encode_arrays,
    stack_byte_strings,
)
from hetero_fl.communication.protocol import Message, TrainingRequest, refusal
from hetero_fl.communication.secure_aggregation import crypto
from hetero_fl.communication.secure_aggregation.crypto import apply_masks
from hetero_fl.communication.secure_aggregation.messages import (
    REQUESTS,
    SEALED,
    TAG,
    client_numbers,
)
from hetero_fl.communication.vector_layout import Words
from hetero_fl.core.payload import PayloadError

# Function that converts an encoded upload to the integers that are summed. The second argument is
# the factor by which values and weights are divided. Raises PayloadError for an invalid upload.
Packer = Callable[[bytes, float], Words]
Notes = MutableMapping[str, bytes]
# The state of a client between two requests:
#   next     the only request that the client will answer
#   tag      identifies the round
#   secrets  private keys for shares and for masks, and the seed of the client's own mask
#   head     number of the client, and the threshold
#   numbers  numbers of the clients in the neighborhood, including the client
#   keys     public keys of the neighborhood, for shares and for masks
#   own      the client's shares of its own secrets
#   pairs    keys that encrypt the shares of each neighbor
#   mates    numbers of the neighbors with which the client shares a mask
#   sealed   encrypted shares from these neighbors
STATE_FIELDS: dict[str, Field] = {
    "next": (np.uint8, (None,)),
    "tag": (np.uint8, (TAG,)),
    "secrets": (np.uint8, (3, 32)),
    "head": (np.int32, (2,)),
    "numbers": (np.int32, (None,)),
    "keys": (np.uint8, (None, 64)),
    "own": (np.uint8, (2, crypto.SHARE_LENGTH)),
    "pairs": (np.uint8, (None, 32)),
    "mates": (np.int32, (None,)),
    "sealed": (np.uint8, (None, SEALED)),
}


def answer(
    client_id: str, message: Message, notes: Notes, packer: Callable[[bytes], Packer]
) -> Message | TrainingRequest:
    """Answer one request of the server.

    Args:
        client_id: The client.
        message: The request.
        notes: Encoded state of the clients between exchanges, keyed by client id. Modified in
            place.
        packer: Function that returns the packer for the digest of a layout, or raises PayloadError
            for an unknown layout.

    Returns:
        The reply, or a request to train. If the request is invalid or out of order, the reply has
        the kind "refused" and contains the reason.
    """
    try:
        if message.kind not in REQUESTS:
            raise PayloadError(f"unknown request {message.kind[:20]!r}")
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
        return refusal(error)

    def mask(upload: bytes) -> Message:
        try:
            vector = pack(upload, 2.0 ** int(request["head"][0]))
        except PayloadError as error:
            return refusal(error)
        apply_masks(vector, streams)
        updated = {**state, "mates": request["numbers"], "sealed": request["sealed"]}
        _store_state(client_id, notes, "unmask", updated)
        arrays = {"tag": state["tag"], "vector": vector.view(np.int64)}
        return Message("train", encode_arrays(arrays))

    return TrainingRequest(request["broadcast"].tobytes(), mask)


def _advertise(client: str, request: Arrays, notes: Notes) -> bytes:
    secrets = (crypto.new_key(), crypto.new_key(), crypto.new_seed())
    public = crypto.public_key(secrets[0]) + crypto.public_key(secrets[1])
    empty = {
        name: np.zeros([d or 0 for d in shape], dtype)
        for name, (dtype, shape) in STATE_FIELDS.items()
    }
    _store_state(
        client,
        notes,
        "shares",
        {
            **empty,
            "tag": request["tag"],
            "secrets": stack_byte_strings(*secrets),
            "keys": stack_byte_strings(public),
        },
    )
    return encode_arrays({"tag": request["tag"], "keys": byte_string_to_row(public)})


def _share(client: str, state: Arrays, request: Arrays, notes: Notes) -> bytes:
    own_number, threshold = request["head"].tolist()
    numbers = client_numbers(request["numbers"])
    public = [bytes(k) for k in request["keys"]]
    if (
        len(numbers) != len(public)
        or own_number not in numbers
        or public[numbers.index(own_number)] != state["keys"][0].tobytes()
    ):
        raise PayloadError("the public keys of this client are not those that it sent")
    if len({k[:32] for k in public} | {k[32:] for k in public}) < 2 * len(public):
        raise PayloadError("duplicate public keys")
    if threshold < 2 or not len(numbers) < 2 * threshold <= 2 * len(numbers):
        raise PayloadError(
            f"threshold: expected more than half of {len(numbers)} clients, got {threshold}"
        )
    secret, masking, seed = (bytes(s) for s in state["secrets"])
    pairs = [
        a + b
        for a, b in zip(
            *(crypto.split_secret(s, threshold, numbers) for s in (masking, seed)), strict=True
        )
    ]
    peers = [i for i, number in enumerate(numbers) if number != own_number]
    tag = state["tag"].tobytes()
    loaded = crypto.load_private_key(secret)
    shared = [crypto.derive_shared_key(loaded, public[i][:32], b"shares") for i in peers]
    sealed = [
        authenticated_encryption.encrypt(
            key, pairs[i], _associated_data(tag, own_number, numbers[i])
        )
        for key, i in zip(shared, peers, strict=True)
    ]
    own_pair = pairs[numbers.index(own_number)]
    updated = {
        "head": request["head"],
        "numbers": request["numbers"],
        "keys": request["keys"],
        "pairs": stack_byte_strings(*shared),
    }
    own = stack_byte_strings(own_pair[: crypto.SHARE_LENGTH], own_pair[crypto.SHARE_LENGTH :])
    _store_state(client, notes, "train", {**state, **updated, "own": own})
    commitment = byte_string_to_row(crypto.commit_to_seed(seed, tag))
    return encode_arrays(
        {
            "tag": state["tag"],
            "commitment": commitment,
            "numbers": np.array([numbers[i] for i in peers], np.int32),
            "sealed": stack_byte_strings(*sealed),
        }
    )


def _streams(state: Arrays, request: Arrays) -> list[tuple[bytes, bool]]:
    """Return the key of each mask on the client's vector, and whether to subtract the mask.

    The masks are the client's own mask and one mask for each neighbor that still participates.
    """
    own_number, threshold = state["head"].tolist()
    mates = client_numbers(request["numbers"])
    public = dict(zip(state["numbers"].tolist(), state["keys"], strict=True))
    if len(mates) != len(request["sealed"]) or own_number in mates or not set(mates) <= set(public):
        raise PayloadError("shares: expected exactly one from each neighbor")
    if len(mates) + 1 < threshold:
        raise PayloadError(
            f"{len(mates) + 1} clients are left in the neighborhood, {threshold} are needed"
        )
    if not 0 <= int(request["head"][0]) < 64:
        raise PayloadError("unit of weights: exponent must be between 0 and 63")
    _, masking, seed = (bytes(s) for s in state["secrets"])
    key = crypto.load_private_key(masking)
    tag = state["tag"].tobytes()
    pair_masks = [pair_mask(key, public[m].tobytes(), own_number, m, tag) for m in mates]
    return [(seed, False), *pair_masks]


def _unmask(client: str, state: Arrays, request: Arrays, notes: Notes) -> bytes:
    """Return a share of one secret of each neighbor.

    If a neighbor's vector is in the sum, the secret is the seed of the neighbor's own mask. If the
    neighbor dropped out, the secret is the neighbor's masking key. Shares of both secrets are never
    returned. The notes are deleted, so that a second request in the same round is refused.
    """
    own_number, threshold = state["head"].tolist()
    survivors = client_numbers(request["survivors"])
    dropped = client_numbers(request["dropped"])
    if both := set(survivors) & set(dropped):
        raise PayloadError(f"the request reveals both secrets of client number {min(both)}")
    neighborhood = {own_number, *state["mates"].tolist()}
    if set(survivors) | set(dropped) != neighborhood or own_number not in survivors:
        raise PayloadError("survivors and dropouts are not the neighborhood of this client")
    if len(survivors) < threshold:
        raise PayloadError(
            f"{len(survivors)} survivors are left in the neighborhood, {threshold} are needed"
        )
    others = [number for number in state["numbers"].tolist() if number != own_number]
    pairs = dict(zip(others, state["pairs"], strict=True))
    sealed = dict(zip(state["mates"].tolist(), state["sealed"], strict=True))
    numbers = []
    shares = []
    for number in (*survivors, *dropped):
        try:
            if number == own_number:
                pair = state["own"].tobytes()
            else:
                context = _associated_data(state["tag"].tobytes(), number, own_number)
                pair = authenticated_encryption.decrypt(
                    pairs[number].tobytes(), sealed[number].tobytes(), context
                )
        except PayloadError:
            # The neighbor sent an invalid share. The shares of other clients may suffice.
            continue
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
    private: X25519PrivateKey, public: bytes, number: int, other: int, tag: bytes
) -> tuple[bytes, bool]:
    """Return the key and the sign of the mask that two clients share.

    Args:
        private: Private masking key of the first client.
        public: Both public keys of the second client.
        number: Number of the first client.
        other: Number of the second client.
        tag: Bytes that identify the round.

    Returns:
        The key of the mask, and whether the first client subtracts the mask. The client with the
        lower number subtracts the mask, and the other client adds the mask.
    """
    low, high = sorted((number, other))
    purpose = b"mask" + _associated_data(tag, low, high)
    return crypto.derive_shared_key(private, public[32:], purpose), number == low


def _associated_data(tag: bytes, first: int, second: int) -> bytes:
    return tag + first.to_bytes(4, "little") + second.to_bytes(4, "little")


def _load_state(client: str, kind: str, request: Arrays, notes: Notes) -> Arrays:
    if client not in notes:
        raise PayloadError(f"request {kind!r} outside a round")
    state = decode_arrays(notes[client], STATE_FIELDS)
    if request["tag"].tobytes() != state["tag"].tobytes():
        raise PayloadError("message of another round")
    if kind.encode() != state["next"].tobytes():
        raise PayloadError(f"request {kind!r} out of order")
    return state


def _store_state(client: str, notes: Notes, next_request: str, state: Arrays) -> None:
    notes[client] = encode_arrays({**state, "next": byte_string_to_row(next_request.encode())})
