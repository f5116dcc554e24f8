"""Links: compressed uploads and broadcasts, residuals, and refusal of malformed messages."""

from __future__ import annotations

import random
import resource
from typing import Any

import pytest
import torch
from torch import Tensor

from hetero_fl.communication.compression import build_stages
from hetero_fl.communication.link import UNSENT, Link
from hetero_fl.config.communication import ChannelConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import floating_tensors
from hetero_fl.core.payload import (
    Item,
    ItemSpec,
    Payload,
    PayloadError,
    check_upload,
    report_with_loss,
)
from hetero_fl.utils.seeding import keyed_generator
from tests.support.cases import each_case

SPECS = {
    "model": ItemSpec("params"),
    "control": ItemSpec("update"),
    "logits": ItemSpec("rows", share="predictions"),
    "sums": ItemSpec("class_sums", share="statistics"),
    "counts": ItemSpec("counts", share="statistics"),
    "codes": ItemSpec("rows", share="predictions"),
}
KEY = (0, 3, "site_1", "link")
CNN = ModelSpec.from_config("cnn", 10, (1, 28, 28))
STATISTICS = frozenset(CNN.shapes) - CNN.parameter_names


def link(*chain: Any, specs: dict[str, ItemSpec] = SPECS, outputs: int = 4) -> Link:
    return Link(build_stages(ChannelConfig(compress=chain).compress), specs, outputs)


def model(seed: int) -> dict[str, Tensor]:
    g = keyed_generator(seed, "model")
    shapes = {"backbone.0.weight": (4, 3, 2), "backbone.1.running_mean": (5,), "head.bias": (4,)}
    return {n: torch.randn(shape, generator=g) for n, shape in shapes.items()}


def upload(seed: int = 0) -> Payload:
    g = keyed_generator(seed, "upload")
    items = {
        "model": Item(model(seed), 17.0, "params"),
        "logits": Item(torch.randn(6, 4, generator=g), torch.rand(4, generator=g), "rows"),
        "control": Item({"head.bias": torch.randn(4, generator=g)}, 2.0, "update"),
        "sums": Item(torch.randn(4, 7, generator=g), torch.rand(4, 1, generator=g), "class_sums"),
        "counts": Item(torch.tensor([3.0, 1.0, 0.0, 9.0]), kind="counts"),
        "codes": Item(torch.randint(0, 255, (6, 2), generator=g).to(torch.uint8), kind="rows"),
    }
    return Payload(items, report_with_loss(0.5))


GOT = Payload({"model": model(99)})
PLAIN = frozenset({"backbone.1.running_mean"})
CHAINS: list[list[Any]] = [
    [{"topk": 0.3}, {"quantize": 8}],
    [{"topk": 3}],
    [{"randk": 0.3}, "half"],
    [{"top_classes": 1}, {"quantize": 4}],
    [{"quantize": 1}],
    ["half"],
]


def receive(by: Link, data: bytes) -> Payload:
    """Decode bytes as the server decodes an upload."""
    like = {n: upload(7).item(n) for n in upload()}
    payload = by.receive(data, KEY, PLAIN, GOT, like)
    check_upload(payload, SPECS, like)
    return payload


@each_case("chain", CHAINS)
def test_upload_round_trips_with_weights_and_report(chain: list[Any]) -> None:
    by, sent = link(*chain), upload()
    got = receive(by, by.send(sent, KEY, PLAIN, GOT, {}))
    assert set(got) == set(sent) and got.report == sent.report
    for name in sent:
        assert torch.equal(
            torch.as_tensor(got.item(name).weight), torch.as_tensor(sent.item(name).weight)
        )
    assert torch.equal(got["counts"], sent["counts"]) and torch.equal(got["codes"], sent["codes"])
    assert torch.equal(
        got["model"]["backbone.1.running_mean"], sent["model"]["backbone.1.running_mean"]
    )
    assert list(got["model"]) == list(sent["model"])


def test_broadcast_contains_its_layout() -> None:
    by, sent = (
        link({"top_classes": 2}, {"quantize": 16}, specs={"teacher": SPECS["logits"]}),
        upload(),
    )
    items = {
        "model": Item(sent["model"], 1.0, "params"),
        "teacher": Item(sent["logits"]),
        "rows": Item(torch.arange(3)),
    }
    got = by.receive(by.send(Payload(items), KEY, PLAIN), KEY)
    assert got.item("model").kind == "params" and torch.equal(got["rows"], torch.arange(3))
    for n, t in sent["model"].items():
        assert torch.allclose(got["model"][n], t, atol=1e-3)
        assert torch.equal(got["model"][n], t) == (n in PLAIN)
    assert all(len(set(row.tolist())) <= 3 for row in got["teacher"])


def test_topk_with_eight_bits_reduces_upload_size() -> None:
    start = floating_tensors(CNN.initial_tensors(0))
    g = keyed_generator(5)
    trained = {n: t + 0.01 * torch.randn(t.shape, generator=g) for n, t in start.items()}
    dense = sum(4 * t.numel() for n, t in trained.items() if n in CNN.parameter_names)
    sent = Payload({"model": Item(trained, 6000.0, "params")}, report_with_loss(1.0))
    by = link({"topk": 0.01}, {"quantize": 8})
    data = by.send(sent, KEY, STATISTICS, Payload({"model": start}), {})
    assert len(data) <= 0.016 * dense
    got = by.receive(data, KEY, STATISTICS, Payload({"model": start}), sent.items_by_name)["model"]
    changed = sum(int((got[n] != start[n]).sum()) for n in CNN.parameter_names)
    assert changed == -(-sum(start[n].numel() for n in CNN.parameter_names) // 100)
    assert all(torch.equal(got[n], trained[n]) for n in trained if n not in CNN.parameter_names)


@each_case(
    "chain",
    [
        [{"topk": 0.1}],
        [{"topk": 0.1}, {"quantize": 8}],
        [{"topk": 0.9}, {"quantize": 4}],
        [{"topk": 0.9}, "half"],
    ],
)
def test_residual_is_exact(chain: list[Any]) -> None:
    """Check that decoded + residual is exactly the float32 sum of update and old residual."""
    by, memory, kept = link(*chain), dict[str, Any](), torch.zeros(1000)
    for round_idx in range(30):
        start, moved = (
            torch.randn(1000, generator=keyed_generator(round_idx)),
            torch.randn(1000, generator=keyed_generator(-round_idx, "m")),
        )
        got, key = Payload({"model": {"w": start}}), (0, round_idx, "site_1", "link")
        sent = Payload({"model": Item({"w": start + 0.1 * moved}, 1.0, "params")})
        data = by.send(sent, key, reference=got, memory=memory)
        update = ((start + 0.1 * moved) - start) + kept
        at_nought = Payload({"model": {"w": torch.zeros(1000)}})
        decoded = by.receive(data, key, reference=at_nought, like=sent.items_by_name)["model"]["w"]
        kept = memory[UNSENT]["model"]["w"]
        assert torch.equal(decoded.double() + kept.double(), update.double())
        assert 0 < int((decoded != 0).sum()) <= 1000 * float(chain[0]["topk"]) and bool(kept.any())


def test_unbiased_chain_has_no_residual() -> None:
    for chain in ([{"randk": 0.5}], [{"quantize": 4}], ["half"], [{"randk": 0.5}, {"quantize": 4}]):
        memory: dict[str, Any] = {}
        link(*chain).send(upload(), KEY, PLAIN, GOT, memory)
        assert memory == {}


def test_residual_of_unsent_items_is_kept() -> None:
    by, memory = link({"topk": 1}), {}
    by.send(upload(), KEY, PLAIN, GOT, memory)
    before = {n: t.clone() for n, t in memory[UNSENT]["model"].items()}
    part = Payload({"model": Item({"head.bias": upload()["model"]["head.bias"]}, 1.0, "params")})
    by.send(part, KEY, PLAIN, GOT, memory)
    after = memory[UNSENT]["model"]
    assert torch.equal(after["backbone.0.weight"], before["backbone.0.weight"])
    assert not torch.equal(after["head.bias"], before["head.bias"])


def test_parameters_not_received_are_not_compressed() -> None:
    by, sent = link({"topk": 1}), upload()
    got = by.receive(
        by.send(sent, KEY, PLAIN, Payload(), {}),
        KEY,
        PLAIN,
        Payload(),
        {n: sent.item(n) for n in sent},
    )
    assert all(torch.equal(got["model"][n], t) for n, t in sent["model"].items())


def changed_bytes(rng: random.Random, data: bytes, kind: int) -> bytes:
    if kind == 3:
        return rng.randbytes(rng.randrange(200))
    if kind == 5:
        return data + rng.randbytes(1 + rng.randrange(5))
    at = rng.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 4:
        return data[:at] + rng.choice([b"\xff" * 4, b"\0" * 4, rng.randbytes(4)]) + data[at + 4 :]
    if kind == 6:
        return data[:at] + rng.randbytes(1 + rng.randrange(3)) + data[at:]
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def hostile(rng: random.Random, by: Link, good: list[bytes], others: list[bytes]) -> bytes:
    """Return a malformed upload: cut, flipped, extended, or with wrong metadata."""
    data = rng.choice(good)
    kind = rng.randrange(9)
    if kind < 7:
        return changed_bytes(rng, data, kind)
    if kind == 7:
        return rng.choice(others)
    items = dict(upload().items_by_name)
    name = rng.choice(["model", "logits", "sums"])
    bad = rng.choice([float("nan"), float("inf"), -float("inf")])
    if name == "model":
        items[name] = Item({n: t * bad for n, t in model(0).items()}, 1.0, "params")
    else:
        items[name] = Item(items[name].values * bad, items[name].weight, items[name].kind)  # type: ignore[operator]
    return by.send(Payload(items), KEY, PLAIN, GOT, {})


@pytest.mark.slow
def test_malformed_uploads_are_refused_in_one_line() -> None:
    rng, refused = random.Random(0), 0
    chains = [link(*chain) for chain in CHAINS]
    good = [[by.send(upload(seed), KEY, PLAIN, GOT, {}) for seed in range(5)] for by in chains]
    others = [by.send(upload(), KEY, PLAIN, Payload(), {}) for by in chains]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(10_000):
        by = chains[i % len(chains)]
        data = hostile(rng, by, good[i % len(chains)], others)
        try:
            got = receive(by, data)
        except PayloadError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
            refused += 1
        else:
            # A flipped bit in a value is undetectable here.
            tensors = (
                [*got["model"].values(), *(got[n] for n in got if isinstance(got[n], Tensor))]
                if "model" in got
                else []
            )
            assert all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())
    assert refused > 5500
    # In kB: declared sizes are not trusted.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_malformed_broadcasts_are_refused_in_one_line() -> None:
    rng, by = (
        random.Random(1),
        link({"top_classes": 2}, {"quantize": 4}, specs={"logits": SPECS["logits"]}),
    )
    good = by.send(upload(), KEY, PLAIN)
    for _ in range(1000):
        at = rng.randrange(len(good))
        data = rng.choice(
            [
                good[:at],
                good[:at] + rng.randbytes(4) + good[at + 4 :],
                good[:at] + b"\xff" * 4 + good[at:],
            ]
        )
        try:
            by.receive(data, KEY)
        except PayloadError as error:
            assert "\n" not in str(error) and len(str(error)) < 300


@each_case(
    "layout_text",
    [
        '{"model": ["params", "float32", {"w": [1000000, 1000000]}, []]}',
        '{"model": ["params", "float32", {"w": [-4]}, []]}',
        '{"model": ["params", "float32", {"w": 4}, []]}',
        '{"model": ["params", "complex64", {"w": [4]}, []]}',
        '{"model": ["nothing", "float32", {"w": [4]}, []]}',
        '{"model": 7}',
        "[]",
        '{"logits": ["rows", "float32", {"": [4000000000, 4]}, []]}',
    ],
)
def test_declared_layout_is_not_trusted(layout_text: str) -> None:
    import struct
    import zlib

    layout = zlib.compress(layout_text.encode())
    data = b"hfl1" + struct.pack("<H", 2) + b"{}" + struct.pack("<I", len(layout)) + layout
    data += struct.pack("<B", 1) + struct.pack("<BI", 0, 40) + bytes(40)
    with pytest.raises(PayloadError):
        link({"quantize": 1}).receive(data, KEY)
