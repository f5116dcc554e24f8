"""Compressed uploads and broadcasts, residuals, and refusal of malformed messages."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hetero_fl.communication.compression import build_stages
from hetero_fl.communication.compressor import UNSENT, Compressor
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


class Link(Compressor):
    """A compressor whose payloads are encoded."""

    def send(self, *given: Any, **named: Any) -> bytes:
        return self.compress(*given, **named).encode()

    def receive(
        self, data: bytes, *given: Any, like: dict[str, Item] | None = None, **named: Any
    ) -> Payload:
        return self.decompress(Payload.decode(data, like), *given, like=like, **named)


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
    payload = by.receive(data, KEY, PLAIN, GOT, like=like)
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
    # Names, shapes and offsets have less than 700 bytes.
    assert len(data) <= 0.016 * dense + 700
    got = by.receive(data, KEY, STATISTICS, Payload({"model": start}), like=sent.items_by_name)[
        "model"
    ]
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
        like={n: sent.item(n) for n in sent},
    )
    assert all(torch.equal(got["model"][n], t) for n, t in sent["model"].items())


CHANGES: list[Callable[[Tensor], Tensor]] = [
    lambda tensor: tensor[:-1],
    lambda tensor: torch.cat([tensor, tensor]),
    lambda tensor: tensor[None],
    lambda tensor: tensor.double() * torch.nan,
    lambda tensor: tensor.to(torch.float16) * torch.inf,
    lambda tensor: tensor ^ 37 if tensor.dtype == torch.uint8 else -tensor,
    lambda tensor: tensor.flip(0),
]


@each_case("chain", CHAINS)
def test_malformed_uploads_are_refused_in_one_line(chain: list[Any]) -> None:
    by, rng, refused = link(*chain), random.Random(0), 0
    for seed in range(100):
        sent = by.compress(upload(seed), KEY, PLAIN, GOT, {})
        tensors = sent[rng.choice([name for name in sent if isinstance(sent[name], dict)])]
        part = rng.choice([name for name in tensors if tensors[name].ndim == 1])
        tensors[part] = rng.choice(CHANGES)(tensors[part])
        try:
            got = receive(by, sent.encode())
        except PayloadError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
            refused += 1
        else:
            # A changed value is undetectable here.
            values = [t for item in got.items_by_name.values() for t in item.tensors.values()]
            assert all(t.isfinite().all() for t in values)
    assert refused > 60


@each_case("shape", [(0, 1_000_000, 1_000_000), (0, 41), (0,)])
def test_declared_shapes_are_not_trusted(shape: tuple[int, ...]) -> None:
    by = link({"quantize": 1})
    sent = by.compress(Payload({"model": {"w": torch.ones(40)}}), KEY)
    sent["model"]["shape/w"] = torch.empty(shape)

    with pytest.raises(PayloadError, match="item 'model': "):
        by.receive(sent.encode(), KEY)


def test_unexpected_tensor_is_refused() -> None:
    by = link("half")
    sent = by.compress(upload(), KEY, PLAIN, GOT)
    sent["model"]["7/values"] = torch.ones(1)

    with pytest.raises(PayloadError, match="item 'model': unexpected tensor '7/values'"):
        receive(by, sent.encode())
