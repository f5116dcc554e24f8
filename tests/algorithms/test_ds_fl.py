"""DS-FL: sharpening, the cache and the quantizer."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from hetero_fl.algorithms import DSFL
from hetero_fl.algorithms.ds_fl import pack_labels, quantize_probabilities, unpack_labels
from hetero_fl.core.payload import Payload
from hetero_fl.core.task import Task
from hetero_fl.utils.seeding import keyed_generator
from tests.support.calls import record_calls
from tests.support.federations import MIXED, config, rounds_of

DIGITS = Task("multiclass", 10)


def federation(models: Any = MIXED, clients: int = 3, **settings: Any) -> dict[str, Any]:
    return config(
        "ds_fl", models, clients, algorithm={"name": "ds_fl", "proxy_rows": 40, **settings}
    )


def drawn(index: int) -> Tensor:
    return torch.randperm(60, generator=keyed_generator(0, index, "proxy rows"))[:40].sort().values


def test_entropy_reduction_sharpens_each_label() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    era = DSFL(era_temperature=0.1).sharpened_teacher(Task("multiclass", 3), p).softmax(1)
    assert torch.allclose(era, (p / 0.1).exp() / (p / 0.1).exp().sum(1, keepdim=True), atol=1e-6)
    labels = Task("multilabel", 3)
    yes = DSFL(era_temperature=0.1).sharpened_teacher(labels, p).sigmoid()
    assert torch.allclose(yes, torch.stack([p, 1 - p], -1).div(0.1).softmax(-1)[..., 0], atol=1e-6)
    power = DSFL(sharpen="power", beta=2.0).sharpened_teacher(labels, p).sigmoid()
    assert torch.allclose(power, p**2 / (p**2 + (1 - p) ** 2), atol=1e-6)
    assert torch.allclose(DSFL(sharpen="none").sharpened_teacher(labels, p).sigmoid(), p, atol=1e-6)
    # One-bit votes.
    sure = torch.tensor([[0.0, 1.0, 0.0]])
    for task in (labels, Task("multiclass", 3)):
        assert all(
            DSFL(sharpen=how).sharpened_teacher(task, sure).isfinite().all()
            for how in ("era", "power", "none")
        )


# Cache


def test_cache_sends_only_missing_or_expired_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    life = 3
    source = {**federation("mlp", 4, cache_life=life), "rounds": 8, "server": {"model": "linear"}}
    # Receives broadcasts but uploads no predictions.
    source["clients"]["overrides"] = [{"match": "site_4", "shares": ["statistics"]}]
    source["clients"]["per_round"] = 2
    rounds = rounds_of(source, num_rounds=0)
    site = rounds.executor.runtime  # type: ignore[attr-defined]
    requests = record_calls(monkeypatch, site, "run", lambda by_client: by_client.items())
    # Row to the round of its newest server label.
    sent_rows: dict[int, int] = {}
    has: dict[str, dict[int, int]] = {client_id: {} for client_id in rounds.federation.client_infos}
    asked_all, again, last = [], 0, -1
    for index in range(8):
        requests.clear()
        due = [
            r for r in drawn(index).tolist() if r not in sent_rows or index - sent_rows[r] >= life
        ]
        again += sum(r in sent_rows for r in due)
        words = rounds.server.state.get("teacher")
        rounds.run_round()
        seen = {client: Payload.decode(m.body) for call in requests for client, m in call}
        for client_id, got in seen.items():
            assert got["ask"].tolist() == due
            if words is None:
                continue
            lacking = [
                r for r, version in sorted(sent_rows.items()) if has[client_id].get(r) != version
            ]
            assert got["new"].tolist() == lacking and len(got["teacher"]) == len(lacking)
            has[client_id] = dict(sent_rows)
            cache = rounds.store.get(client_id).state["cache"]
            assert torch.equal(cache[list(sent_rows)], words[list(sent_rows)])
        asked_all.append(len(due))
        if any(client_id != "site_4" for client_id in seen):
            sent_rows.update(dict.fromkeys(due, index))
        if all(r in sent_rows and index - sent_rows[r] < life for r in drawn(index).tolist()):
            last = index
        assert rounds.server.state.get("drawn", torch.tensor([-1])).tolist() == [last]
    assert asked_all[0] == 40 and min(asked_all) < 15 and again > 0
    assert any(len(h) for h in has.values())


def test_cache_saves_bytes() -> None:
    plain, cached = (
        rounds_of({**federation("mlp", cache_life=life), "rounds": 5}).traffic
        for life in (None, 50)
    )

    assert cached.up < 0.5 * plain.up and cached.down < 0.8 * plain.down


def test_cache_survives_rounds_without_uploads() -> None:
    source = federation("mlp", cache_life=4)
    source["clients"]["defaults"]["share_every"] = 2
    rounds = rounds_of({**source, "rounds": 3}, num_rounds=1)
    # No predictions have been uploaded yet.
    assert not {"teacher", "drawn"} & set(rounds.server.state)
    # No client uploads predictions in the second one: the last consensus and its rows stay.
    for _ in range(2):
        rounds.run_round()
        assert rounds.server.state["drawn"].tolist() == [1]


# Quantization


def test_quantizer_finds_nearest_distribution() -> None:
    for bits in (1, 2, 3):
        top = 2**bits - 1
        levels = [q for q in itertools.product(range(top + 1), repeat=4) if sum(q) == top]
        every = torch.tensor(levels) / top
        p = (2 * torch.randn(60, 4, generator=torch.Generator().manual_seed(bits))).softmax(1)

        found = quantize_probabilities(p, bits)

        assert (found.sum(1) == top).all()
        nearest = (p[:, None] - every).abs().sum(-1).min(1).values
        assert torch.allclose((p - found / top).abs().sum(1), nearest, atol=1e-5), bits
        if bits == 1:
            assert torch.equal(found.argmax(1), p.argmax(1))


def test_packing_is_lossless() -> None:
    for bits, classes in itertools.product(range(1, 9), (1, 3, 10)):
        draws = torch.Generator().manual_seed(3)
        levels = torch.randint(2**bits, (7, classes), generator=draws).to(torch.uint8)

        packed = pack_labels(levels, bits)

        assert packed.shape == (7, -(-classes * bits // 8)), (bits, classes)
        assert torch.equal(unpack_labels(packed, bits, classes), levels), (bits, classes)


def test_labels_are_rounded_separately() -> None:
    p = torch.tensor([[0.2, 0.9, 0.6]])
    assert quantize_probabilities(p, 1, sums_to_one=False).tolist() == [[0, 1, 1]]


def test_quantization_saves_bytes_and_eight_bits_change_little() -> None:
    plain, one, eight = (
        rounds_of(federation("mlp", bits=bits), num_rounds=1) for bits in (None, 1, 8)
    )
    assert plain.traffic.up - one.traffic.up > 3 * 40 * (10 * 4 - 2) - 200
    era = [r.server.state["teacher"] * 0.1 for r in (plain, eight)]
    assert float((era[0] - era[1]).abs().max()) < 1 / 255


def test_server_requirements_are_declared() -> None:
    uses = {(b, c): DSFL(bits=b, cache_life=c).uploads for b in (None, 2) for c in (None, 5)}
    assert {k: {n: s.use for n, s in u.items()} for k, u in uses.items()} == {
        (None, None): {"probabilities": "sum"},
        (None, 5): {"probabilities": "each"},
        (2, None): {"codes": "each"},
        (2, 5): {"codes": "each"},
    }
    assert all(s.private and s.share == "predictions" for u in uses.values() for s in u.values())
