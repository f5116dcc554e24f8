"""Descriptions of the tensors that clients upload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hetero_fl.cli import main
from hetero_fl.core.payload import Item
from hetero_fl.experiment import prepare
from hetero_fl.federation.upload_contents import UploadContent, _group_tensors, upload_contents
from tests.support.cases import each_case


def contents(max_parts: int = 10, **source: Any) -> list[UploadContent]:
    prepared = prepare({"data": {"name": "digits"}, **source})
    return upload_contents(prepared.method, prepared.federation, max_parts)


MLP = {"groups": [{"name": "a", "count": 2, "model": "mlp"}]}
MIXED = {"groups": [{"name": "a", "count": 2, "model": "mlp"}, {"name": "b", "model": "linear"}]}


def test_upload_contents_lists_each_shared_tensor() -> None:
    (content,) = contents(clients=MLP, algorithm={"name": "fedavg"})

    assert content.clients == ("a_1",) and content.num_clients == 2
    prepared = prepare({"data": {"name": "digits"}, "clients": MLP})
    arch = prepared.federation.client_infos["a_1"].arch
    assert [part.name for part in content.parts] == list(arch.shapes)
    assert [part.shapes for part in content.parts] == [(s,) for s in arch.shapes.values()]
    assert all(part.num_bytes == 4 * part.num_values for part in content.parts)


@each_case("max_parts", [1, 2, 3])
def test_upload_contents_groups_tensors_by_layer(max_parts: int) -> None:
    (whole,) = contents(100, clients=MLP)
    (grouped,) = contents(max_parts, clients=MLP)

    assert len(grouped.parts) <= max_parts < len(whole.parts)
    for attribute in ("num_values", "num_bytes"):
        totals = {
            sum(getattr(part, attribute) for part in content.parts) for content in (whole, grouped)
        }
        assert len(totals) == 1
    assert [s for part in grouped.parts for s in part.shapes] == [
        s for part in whole.parts for s in part.shapes
    ]
    for part in grouped.parts:
        assert part.name in ("", "backbone.", "head.") or part.name.count(".") > 0


def test_single_tensor_of_a_part_keeps_its_name() -> None:
    names = ("backbone.items.weight", "head.weight", "head.bias")
    model = Item({name: torch.zeros(2) for name in names}, kind="params")

    parts = _group_tensors({"model": model}, max_parts=2)

    assert [part.name for part in parts] == ["backbone.items.weight", "head."]


def test_upload_contents_differ_by_architecture_and_share() -> None:
    defaults = {"shares": ["backbone", "predictions"]}
    private = {"groups": MIXED["groups"], "defaults": defaults}
    mlp, linear = contents(
        clients=private,
        algorithm={"name": "hybrid"},
        data={"name": "digits", "proxy": {"size": 50}},
    )

    assert mlp.clients == ("a_1",) and linear.clients == ("b",)
    assert not any("head." in part.name for part in mlp.parts)
    assert {part.item for part in linear.parts} >= {"logits"}
    assert [part.shapes for part in mlp.parts if part.item == "logits"] == [((50, 10),)]


@each_case(
    ("method", "words"),
    [("fedavg", ("content of an upload", "head.weight", "sum")), ("local", ("nothing",))],
)
def test_check_prints_the_content_of_uploads(
    method: str, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {name: digits}\nclients: {groups: [{name: a, model: linear}]}\n")

    assert main(["train", "--check", "-c", str(file), f"algorithm.name={method}"]) == 0

    printed = capsys.readouterr().out
    assert all(word in printed for word in words)
