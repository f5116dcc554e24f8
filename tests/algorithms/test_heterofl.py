"""HeteroFL: a round, limit cases, derived widths, and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hetero_fl.algorithms.heterofl import leading_slice_means, pack_head, unpack_head
from hetero_fl.core.plan import Rows
from hetero_fl.experiment import prepare, run
from hetero_fl.experiment.configuration import load_config
from tests.support.federations import MIXED, config, deployed, rounds_of

WIDE = {"name": "cnn", "width": 8, "norm": "batch"}


def copies(model: dict[str, Any], *widths: int) -> list[dict[str, Any]]:
    """Return copies of a CNN with other widths."""
    return [{**model, "width": width} for width in widths]


def federation(
    model: dict[str, Any] = WIDE,
    widths: tuple[int, ...] = (8, 4, 2),
    clients: int = 5,
    rounds: int = 2,
    **settings: Any,
) -> dict[str, Any]:
    algorithm = {"name": "heterofl", **settings}
    models = copies(model, *widths)
    return config("heterofl", models, clients, algorithm=algorithm, rounds=rounds)


def test_unseen_class_keeps_its_head_row() -> None:
    now = {"head.weight": torch.full((2, 3), 7.0), "head.bias": torch.full((2,), 8.0)}
    values, weights = pack_head(torch.ones(2, 1), torch.ones(2), 3, torch.tensor([5.0, 0.0]))
    new = unpack_head(now, values, weights)
    assert new["head.weight"].tolist() == [[1, 7, 7], [7, 7, 7]] and new["head.bias"].tolist() == [
        1,
        8,
    ]


def test_corner_means() -> None:
    now = {"w": torch.full((3, 3), 9.0), "unsent": torch.ones(2)}
    wide, narrow = ({"w": torch.ones(2, 2)}, 1.0), ({"w": torch.full((1, 2), 4.0)}, 2.0)
    # The order of clients does not matter: each owns only its corner.
    for members in ([wide, narrow], [narrow, wide]):
        got = leading_slice_means(now, members)
        assert got.keys() == {"w"} and got["w"].tolist() == [[3, 3, 9], [1, 1, 9], [9, 9, 9]]
    assert now["w"].eq(9).all()


def test_family_is_derived_from_client_models(subtests: pytest.Subtests) -> None:
    cases: list[tuple[list[Any], str, list[float]]] = [
        (["cnn_bn_large", "cnn_bn_small", "cnn_bn_medium"], "cnn_bn_large", [1, 0.25, 0.5]),
        (["mlp", {"name": "mlp", "hidden": [32]}, "gru"], "mlp", [1, 0.25, 1]),
        (
            ["resnet8", {"name": "resnet", "widths": [8, 16, 32]}, "linear"],
            "resnet8",
            [1, 0.5, 0.125],
        ),
        (["cnn_gn_small", "cnn_gn_small", "cnn_bn_large"], "cnn_gn_small", [1, 1, 1]),
        (["gru", "vit", "cnn_gn_medium"], "cnn_gn_medium", [1, 1, 1]),
    ]
    for models, name, widths in cases:
        with subtests.test(models=models):
            prepared = prepare(config("heterofl", models, clients=3))

            chosen = prepared.config.algorithm
            assert chosen["model"]["name"] == name
            assert "replaces clients' models" in prepared.notes[0]
            infos = prepared.federation.client_infos
            for n, width in enumerate(widths, 1):
                clients = prepared.notes[0].partition(f"width {width:g} for ")[2]
                assert f"site_{n}" in clients.partition(";")[0], prepared.notes[0]
            wide = prepared.method.wide_model(infos["site_1"].arch)  # type: ignore[attr-defined]
            for info in infos.values():
                assert info.arch.shapes.keys() == wide.shapes.keys()
                for n, shape in info.arch.shapes.items():
                    assert all(a <= b for a, b in zip(shape, wide.shapes[n], strict=True)), n


def test_family_is_recorded_and_reused_on_resume(tmp_path: Path) -> None:
    source = config("heterofl", MIXED, clients=3, rounds=1)
    run(source, out=tmp_path / "run")
    again = load_config(tmp_path / "run" / "config.yaml")
    assert again.algorithm["model"]["name"] == "cnn_bn_small"
    assert prepare(again).config == again
    run(source, out=tmp_path / "run", resume=True)


def test_summary_names_each_client_model(tmp_path: Path) -> None:
    source = config(
        "heterofl",
        ["cnn_bn_large", "cnn_bn_small", "mlp"],
        rounds=1,
    )
    finished = run(source, out=tmp_path / "run")
    assert [client["model"] for client in finished.summary["clients"]] == [
        "cnn_bn_large", "cnn_bn_large at 0.25", "cnn_bn_large at 0.25"
    ]  # fmt: skip
    few = [client["parameters"] for client in finished.summary["clients"]]
    assert few[0] > 4 * few[1]


def test_input_shapes_have_separate_server_models() -> None:
    source = federation()
    source["clients"]["overrides"] = [
        {"match": "site_[45]", "preprocess": {"channels": 3, "resize": 12}}
    ]
    rounds = rounds_of(source)
    assert len(rounds.server.models) == 2 and rounds.evaluate().server is None


def test_evaluation_applies_scaler_and_mask(subtests: pytest.Subtests) -> None:
    """Compare predictions of a slice of half the width with a forward pass by hand."""
    plain = {"name": "cnn", "width": 8, "norm": "none"}
    for scaler, share in ((True, 0.5), (False, 1.0)):
        rounds = rounds_of(federation(plain, clients=3, masked=True, scaler=scaler))
        client = deployed(rounds, "site_2")
        x, t = client.data("common_test", None)["x"], client.models["model"]
        for i, conv in enumerate(("0", "3", "6")):
            weight, bias = t[f"backbone.{conv}.weight"], t[f"backbone.{conv}.bias"]
            x = (F.conv2d(x, weight, bias, padding=1) / share).relu()
            x = F.max_pool2d(x, 2) if i < 2 else x.mean((2, 3))
        logits, has = x @ t["head.weight"].T + t["head.bias"], client.counts > 0

        predict = rounds.executor.runtime.predict  # type: ignore[attr-defined]
        with subtests.test(scaler=scaler):
            assert not has.all() and rounds.evaluate().server is not None
            common = predict(client, Rows("common_test"), False)
            assert torch.allclose(common, logits, atol=1e-5)
            home = predict(client, Rows("common_test"), True)
            assert torch.allclose(home, logits * has, atol=1e-5)
    # No client has BatchNorm statistics.
    assert rounds_of(federation(clients=3), num_rounds=1).evaluate().server is None


def test_narrow_client_transfers_fewer_bytes() -> None:
    up = {}
    for width in (8, 2):
        rounds = rounds_of(federation(clients=2, widths=(8, width), rounds=1))
        up[width] = (rounds.traffic.up, rounds.traffic.down)
    assert up[2][0] < 0.7 * up[8][0] and up[2][1] < 0.7 * up[8][1]


def test_widths_follow_models_in_large_populations() -> None:
    models = [
        {"name": "mlp", "hidden": [8]},
        {"name": "mlp", "hidden": [4]},
        {"name": "mlp", "hidden": [2]},
    ]
    drawn = {"kind": "drawn", "alpha": 0.5, "rows": 40}
    many = prepare(config("heterofl", models, 1002, data__partition=drawn))
    client_infos = many.federation.client_infos
    assert len(client_infos.profiles) == 3 and all(
        "hidden" in dict(kind.arch.options) for kind in client_infos.profiles
    )
    ids = list(client_infos.clients.ids)[:3]
    assert [client_infos[client_id].arch.shapes["head.weight"] for client_id in ids] == [
        (10, 8),
        (10, 4),
        (10, 2),
    ]
    assert "width 1 for site_0001, site_0004" in many.notes[0] and "and 330 more" in many.notes[0]
