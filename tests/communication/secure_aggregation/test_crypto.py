"""Primitives of secure aggregation: keys, shares, masks, fixed point and layout."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from hetero_fl.communication.secure_aggregation import crypto
from hetero_fl.communication.secure_aggregation.crypto import BLOCK, apply_masks
from hetero_fl.communication.vector_layout import FixedPoint, TensorKey, VectorLayout
from hetero_fl.config.communication import SecureAggregationConfig
from hetero_fl.core.payload import Item, ItemSpec, Payload, PayloadError
from tests.support.cases import each_case


def test_key_agreement_excludes_third_parties() -> None:
    secret = [crypto.new_key() for _ in range(3)]
    a, b, c = map(crypto.load_private_key, secret)
    at_a, at_b, _ = map(crypto.public_key, secret)
    assert crypto.derive_shared_key(a, at_b, b"x") == crypto.derive_shared_key(b, at_a, b"x")
    assert (
        len(
            {
                crypto.derive_shared_key(a, at_b, b"x"),
                crypto.derive_shared_key(a, at_b, b"y"),
                crypto.derive_shared_key(c, at_b, b"x"),
            }
        )
        == 3
    )
    with pytest.raises(PayloadError, match="invalid public key"):
        crypto.derive_shared_key(a, bytes(32), b"x")


@each_case("threshold", [2, 3, 4])
def test_threshold_of_shares_recovers_the_secret(threshold: int) -> None:
    secret, holders = b"\xff" * 32, [1, 4, 5, 9, 200]
    shares = dict(zip(holders, crypto.split_secret(secret, threshold, holders), strict=True))
    for some in itertools.combinations(holders, threshold):
        assert crypto.combine_shares({h: shares[h] for h in some}) == secret
    assert crypto.combine_shares(shares) == secret
    for some in itertools.combinations(holders, threshold - 1):
        assert crypto.combine_shares({h: shares[h] for h in some}) != secret


def test_invalid_share_counts_are_refused() -> None:
    secret = b"\xff" * 32
    for threshold, who in ((3, [1, 1, 2]), (3, [0, 1, 2]), (4, [1, 2, 3]), (0, [1])):
        with pytest.raises(ValueError, match="distinct positive integers"):
            crypto.split_secret(secret, threshold, who)


def test_single_share_is_uniform() -> None:
    """Check that the bytes of one share of two are uniform for any secret."""
    found = np.frombuffer(
        b"".join(crypto.split_secret(bytes(32), 2, [1, 2])[0][:32] for _ in range(800)), np.uint8
    )
    expected = len(found) / 256
    assert float(((np.bincount(found, minlength=256) - expected) ** 2 / expected).sum()) < 400


def test_field_modulus_is_prime() -> None:
    """Test 2^256 + 297 with Miller-Rabin and 40 bases."""
    p = crypto.FIELD_PRIME
    twos = ((p - 1) & (1 - p)).bit_length() - 1
    for base in range(2, 42):
        x = pow(base, (p - 1) >> twos, p)
        assert x == 1 or any(pow(x, 2**i, p) == p - 1 for i in range(twos))


def test_masks_are_keystreams_and_cancel() -> None:
    one, other = bytes(range(32)), bytes(32)
    for length in (0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 3):
        vector = np.arange(length, dtype=np.uint64)
        apply_masks(vector, [(one, False), (other, True)])
        streams = [
            np.frombuffer(
                Cipher(AES(k), CTR(bytes(16))).encryptor().update(bytes(8 * length)), np.uint64
            )
            for k in (one, other)
        ]
        assert np.array_equal(vector, np.arange(length, dtype=np.uint64) + streams[0] - streams[1])
        apply_masks(vector, [(one, True), (other, False)])
        assert np.array_equal(vector, np.arange(length, dtype=np.uint64))


def test_fixed_point_encodes_limits() -> None:
    config = SecureAggregationConfig(range=1000)
    fixed = FixedPoint.from_config(config, 3, "channel.secure_sum")
    assert 3 * 1000 * 2**fixed.bits < 2**63 <= 3 * 1000 * 2 ** (fixed.bits + 1)
    values = np.array([1000.0, -1000.0, 0.1, -0.1, 2.0**-fixed.bits, 0.0])
    integers = fixed.encode(values)
    assert [int(i) for i in integers.view(np.int64)] == [round(v * 2**fixed.bits) for v in values]
    assert (
        np.abs(fixed.decode(integers + integers + integers) - 3 * values).max()
        <= 1.5 * 2.0**-fixed.bits
    )
    for bad in (1000.0001, -2000.0, math.nan, math.inf):
        with pytest.raises(PayloadError, match="range: values must be <= 1000"):
            fixed.encode(np.array([0.0, bad]))


SPECS = {
    "model": ItemSpec("params"),
    "shared": ItemSpec("params", across_architectures=True),
    "rows": ItemSpec("rows"),
    "sums": ItemSpec("class_sums"),
}


def uploads() -> list[tuple[str, Payload]]:
    """Return uploads of two groups with equal names, different shapes and several weights."""

    def result(group: int, n: float) -> Payload:
        g = torch.Generator().manual_seed(int(n))
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        return Payload(
            {
                "model": Item({"head.w": draw(2, 2), "body.w": draw(2, group + 1)}, n, "params"),
                "shared": Item({"x": draw(3)}, 1.0, "params"),
                "rows": Item(
                    draw(4, 2),
                    2.0 if group else torch.rand(2, generator=g, dtype=torch.float64),
                    "rows",
                ),
                "sums": Item(draw(2, 3) * 10, torch.tensor([[3.0], [0.0]]), "class_sums"),
            },
            {"loss": str(n)},
        )

    return [("a", result(0, 3.0)), ("b", result(1, 5.0)), ("a", result(0, 8.0))]


def test_sum_of_vectors_is_the_sum_of_items() -> None:
    sent = uploads()
    forms = [(group, {n: p.item(n) for n in p}) for group, p in sent]
    layout = VectorLayout.from_forms(forms, SPECS, ("head.",))
    again = VectorLayout.from_forms(forms[::-1], SPECS, ("head.",))
    assert again.digest == layout.digest != VectorLayout.from_forms(forms[:2], SPECS).digest
    total = np.sum([layout.pack(group, payload, 8.0) for group, payload in sent], axis=0)
    assert total.shape == (layout.size,) and layout.mean_loss(total) == pytest.approx(
        (3 + 5 + 8) / 3
    )

    def both(place: TensorKey) -> tuple[torch.Tensor, torch.Tensor]:
        return layout.read(place, total, 8.0)

    def item(i: int, name: str) -> Item:
        return sent[i][1].item(name)

    values, weight = both(TensorKey("model", "body.w", "a", (2, 1)))
    torch.testing.assert_close(
        values, 3 * item(0, "model").values["body.w"] + 8 * item(2, "model").values["body.w"]
    )
    assert weight == 11
    # Of both groups.
    values, weight = both(TensorKey("model", "head.w", "", (2, 2)))
    torch.testing.assert_close(
        values, sum(item(i, "model").weight * item(i, "model").values["head.w"] for i in range(3))
    )
    assert weight == 16
    values, weight = both(TensorKey("shared", "x", "", (3,)))
    torch.testing.assert_close(values, sum(item(i, "shared").values["x"] for i in range(3)))
    # One weight for all, and one per class.
    values, weight = both(TensorKey("rows", "", "", (4, 2)))
    torch.testing.assert_close(
        values, sum(item(i, "rows").values * item(i, "rows").weight for i in range(3))
    )
    torch.testing.assert_close(weight, item(0, "rows").weight + item(2, "rows").weight + 2)
    values, weight = both(TensorKey("sums", "", "", (2, 3)))
    torch.testing.assert_close(values, sum(item(i, "sums").values for i in range(3)))
    assert weight.tolist() == [[9.0], [0.0]]


def test_vectors_of_all_clients_have_equal_length() -> None:
    sent = uploads()
    layout = VectorLayout.from_forms(
        [(group, {n: p.item(n) for n in p}) for group, p in sent], SPECS
    )
    vectors = [layout.pack(group, payload, 8.0) for group, payload in (*sent, ("a", Payload()))]
    assert {len(v) for v in vectors} == {layout.size} and not vectors[-1].any()
    with pytest.raises(
        PayloadError,
        match=r"item 'model': tensor 'head\.w' .* is not part of the summed vector",
    ):
        layout.pack("c", sent[0][1], 8.0)
    with pytest.raises(PayloadError, match="item 'rows': weight must have shape"):
        layout.pack("a", Payload({"rows": Item(torch.zeros(4, 2), torch.ones(4, 1))}), 8.0)
