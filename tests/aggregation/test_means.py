"""Running means and the discount of stale uploads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.aggregation.uploads import RunningMean, discount_upload
from hetero_fl.algorithms.round_parts import interpolate_model
from hetero_fl.config.clients import ClientSettings
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Item, ItemSpec, Payload
from tests.support.cases import each_case
from tests.support.means import mean_of_items


class Calls(TorchDispatchMode):
    """Count operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def terms(n: int) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=draws) for _ in range(n)]


def test_running_mean_does_not_change_its_terms() -> None:
    values, weights = terms(6), [0.0, 2.0, 0.0, 1.0, 4.0, 3.0]
    kept = [v.clone() for v in values]
    mean = RunningMean()
    for value, weight in zip(values, weights, strict=True):
        mean.add(value, weight)
    exact = sum(w * v.double() for v, w in zip(kept, weights, strict=True)) / sum(weights)
    assert torch.allclose(mean.result().value.double(), exact, atol=1e-6)
    assert all(torch.equal(v, k) for v, k in zip(values, kept, strict=True))


def test_returned_mean_does_not_change_later() -> None:
    mean, values = RunningMean(), terms(5)
    read: list[tuple[torch.Tensor, torch.Tensor]] = []
    for value in values:
        mean.add(value, 1.0)
        now = mean.result().value
        read.append((now, now.clone()))
    assert all(torch.equal(now, then) for now, then in read)


def test_intermediate_reads_do_not_change_the_mean() -> None:
    often, once = RunningMean(), RunningMean()
    for value in terms(7):
        often.add(value, 3.0)
        often.result()
        once.add(value, 3.0)
    assert torch.equal(often.result().value, once.result().value)


def test_running_mean_allocates_one_tensor() -> None:
    mean, values = RunningMean(), terms(10)
    with Calls() as calls:
        for value in values:
            mean.add(value, 1.0)
    assert calls.names == ["lerp", *["lerp_"] * 8]


FRESH, STALE, FACTOR = torch.tensor([[2.0, 4.0]]), torch.tensor([[6.0, 10.0]]), 0.25


@each_case("kind", ["class_sums", "rows"])
def test_discounted_upload_is_scaled_in_the_mean(kind: Any) -> None:
    def item(values: torch.Tensor, rows: float) -> Item:
        summed = kind == "class_sums"
        return Item(values * rows if summed else values, torch.tensor([[rows]]), kind)

    stale = discount_upload(Payload({"x": item(STALE, 4.0)}), FACTOR).item("x")

    mean = mean_of_items([item(FRESH, 3.0), stale])

    torch.testing.assert_close(mean, (3 * FRESH + FACTOR * 4 * STALE) / (3 + FACTOR * 4))


def test_discounted_scales_counts_and_keeps_the_report() -> None:
    payload = Payload({"n": Item(torch.tensor([8.0, 4.0]), 1.0, "counts")}, {"loss": "1"})

    stale = discount_upload(payload, FACTOR)

    assert stale["n"].tolist() == [2.0, 1.0]
    assert stale.report == payload.report


@each_case("use", ["sum", "each"])
def test_means_include_uploads_that_were_added_after_a_request(use: Any) -> None:
    arch = ModelSpec.from_config("linear", 1, (1,))
    uploads = Uploads(specs={"rows": ItemSpec("rows", use=use), "model": ItemSpec("params", use)})
    assert uploads.mean("rows") is None and uploads.mean_by_group("model") == {}
    for client_id, value in (("a", 1.0), ("b", 4.0)):
        client_info = ClientInfo(client_id, arch, 10, None, ClientSettings())
        rows = Item(torch.full((2, 2), value), 2.0)
        model = Item({"w": torch.full((3,), value)}, value, "params")
        uploads.add(Upload(client_info, Payload({"rows": rows, "model": model})))

        assert uploads.mean("rows") is not None

    group = arch.spec_id
    assert uploads.mean("rows").tolist() == [[2.5, 2.5]] * 2
    assert [total.tolist() for total in uploads.total("rows")] == [[[10, 10]] * 2, 4]
    assert uploads.mean_by_group("model")[group]["w"].tolist() == pytest.approx([3.4] * 3)
    assert uploads.weights_by_group("model") == {group: {"w": 5.0}}
    assert uploads.counts_by_group("model") == {group: {"w": 2}}


def test_buffers_are_set_to_the_mean_at_every_rate() -> None:
    current = {"weight": torch.tensor([1.0, 2.0]), "running_var": torch.tensor([1.0, 2.0])}
    mean = {"weight": torch.tensor([2.0, 0.0]), "running_var": torch.tensor([3.0, 0.5])}

    moved = interpolate_model(current, mean, 1.5, ["weight"])

    assert moved["weight"].tolist() == [2.5, -1.0]
    assert torch.equal(moved["running_var"], mean["running_var"])
