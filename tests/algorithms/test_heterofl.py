"""HeteroFL: a round, limit cases, derived widths, and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.aggregation.means import leading_slice_means
from hetero_fl.algorithms.heterofl import pack_head, unpack_head
from hetero_fl.core.participant import floating_tensors
from hetero_fl.core.plan import Rows
from hetero_fl.experiment import prepare, run
from hetero_fl.experiment.configuration import load_config
from hetero_fl.utils.errors import UserError
from tests.references.local_training import clients, largest_difference, train
from tests.support.federations import MIXED, config, deployed, rounds_of, same_bits

WIDE = {"name": "cnn", "width": 8, "norm": "batch"}
RAGGED = {"match": "site_2", "shares": ["parameters"]}


def federation(
    models: Any = MIXED, clients: int = 5, rounds: int = 2, **settings: Any
) -> dict[str, Any]:
    algorithm = {"name": "heterofl", "model": WIDE, "widths": [1, 0.5, 0.25], **settings}
    return config("heterofl", models, clients, algorithm=algorithm, rounds=rounds)


def forward(t: dict[str, Tensor], x: Tensor, share: float) -> Tensor:
    """Run the three-block CNN in training mode, dividing each convolution's output by the share."""
    for i, (conv, norm) in enumerate((("0", "1"), ("4", "5"), ("8", "9"))):
        x = F.conv2d(x, t[f"backbone.{conv}.weight"], t[f"backbone.{conv}.bias"], padding=1) / share
        mean, var, scale, shift = (
            t[f"backbone.{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.batch_norm(x, mean, var, scale, shift, training=True, momentum=0.1).relu()
        x = F.max_pool2d(x, 2) if i < 2 else x.mean((2, 3))
    return x @ t["head.weight"].T + t["head.bias"]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("weighting", [None, "uniform", "samples"])
def test_round_matches_reference(masked: bool, scaler: bool, weighting: str | None) -> None:
    source = federation(
        masked=masked, scaler=scaler, **({} if weighting is None else {"weighting": weighting})
    )
    source["clients"] |= {"per_round": 2, "overrides": [RAGGED]}
    source["data"]["partition"]["alpha"] = 0.1
    rounds = rounds_of(source, num_rounds=3)
    ((slot, wide),) = rounds.server.models.items()
    before, cohort = clients(rounds), rounds.sample_cohort(3)
    shares = {client_id: rounds.algorithm.widths[client_id] for client_id in before}
    assert (
        len({shares[client_id] for client_id in cohort}) > 1
        and shares["site_4"] == 1
        and shares["site_3"] == 0.25
    )
    total = {
        n: torch.zeros_like(t) for n, t in floating_tensors(wide).items() if "running" not in n
    }
    count = {n: torch.zeros_like(t) for n, t in total.items()}
    statistics = {}
    for client_id in cohort:
        client, width = before[client_id], int(8 * shares[client_id])
        sizes = {
            "0": width,
            "1": width,
            "4": 2 * width,
            "5": 2 * width,
            "8": 4 * width,
            "9": 4 * width,
        }
        tensors = {n: t.clone() for n, t in client.models["model"].items()}
        for n, t in total.items():
            rows = sizes[n.split(".")[1]] if n.startswith("backbone.") else 10
            columns = {
                "backbone.4.weight": width,
                "backbone.8.weight": 2 * width,
                "head.weight": 4 * width,
            }.get(n, 1)
            tensors[n] = (wide[n][:rows, :columns] if t.ndim > 1 else wide[n][:rows]).clone()
        has = client.counts > 0
        if masked and client_id == "site_2":
            # This client shares no label counts, so no class is masked.
            has[:] = True
        parameters = [tensors[n].requires_grad_() for n in total]
        share = shares[client_id] if scaler else 1.0

        def loss(x, y, tensors=tensors, has=has, share=share):
            z = forward(tensors, x, share)
            return F.cross_entropy(z * has if masked else z, y)

        train(client, parameters, loss)
        statistics[client_id] = {n: t for n, t in tensors.items() if "running" in n}
        # Each owner counts once, as in the authors' code.
        weight = client.num_rows if weighting == "samples" else 1
        for n, summed in total.items():
            t = tensors[n].detach()
            place = tuple(slice(0, s) for s in t.shape)
            own = torch.ones_like(t)
            if masked and n.startswith("head."):
                own[~has] = 0
            summed[place] += weight * own * t
            count[n][place] += weight * own
    rounds.run_round()
    assert any((c == 0).any() for c in count.values())
    expected = {
        n: torch.where(count[n] > 0, total[n] / count[n].clamp(min=1), wide[n]) for n in total
    }
    assert largest_difference(rounds.server.models[slot], expected) < 1e-9
    for client_id, kept in statistics.items():
        assert set(floating_tensors(rounds.store.get(client_id).models["model"])) == set(kept)
        assert largest_difference(rounds.store.get(client_id).models["model"], kept) < 1e-9


def test_full_width_equals_fedavg() -> None:
    wide = {"name": "cnn", "width": 4, "norm": "group"}
    for weighting in ("uniform", "samples"):
        fedavg = rounds_of(
            config("fedavg", wide, algorithm={"name": "fedavg", "weighting": weighting})
        )
        for settings, equal in (({}, True), ({"widths": [1, 1, 0.5]}, False)):
            algorithm = {"name": "heterofl", "weighting": weighting, **settings}
            actual = rounds_of(config("heterofl", wide, algorithm=algorithm))
            (group,) = fedavg.server.models
            (slot,) = actual.server.models
            assert (
                slot == group
                and same_bits(actual.server.models[slot], fedavg.server.models[group]) is equal
            )


def test_mask_changes_nothing_for_clients_with_all_classes() -> None:
    source = federation(clients=3)
    source["data"]["partition"] = {"kind": "iid"}
    plain, masked = (
        rounds_of({**source, "algorithm": {**source["algorithm"], "masked": m}})
        for m in (False, True)
    )
    ((a,), (b,)) = plain.server.models.values(), masked.server.models.values()
    assert all((c.counts > 0).all() for c in clients(plain).values())
    for n in a:
        assert torch.allclose(a[n], b[n], rtol=0, atol=1e-6), n


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


@pytest.mark.parametrize(
    ("models", "name", "widths"),
    [
        (["cnn_bn_large", "cnn_bn_small", "cnn_bn_medium"], "cnn_bn_large", [1, 0.25, 0.5]),
        (["mlp", {"name": "mlp", "hidden": [32]}, "gru"], "mlp", [1, 0.25, 1]),
        (
            ["resnet8", {"name": "resnet", "widths": [8, 16, 32]}, "linear"],
            "resnet8",
            [1, 0.5, 0.125],
        ),
        (["cnn_gn_small", "cnn_gn_small", "cnn_bn_large"], "cnn_gn_small", [1, 1, 1]),
        (["gru", "vit", "cnn_gn_medium"], "cnn_gn_medium", [1, 1, 1]),
    ],
)
def test_family_is_derived_from_client_models(
    models: list[Any], name: str, widths: list[float], tmp_path: Path
) -> None:
    prepared = prepare(config("heterofl", models, clients=3))
    chosen = prepared.config.algorithm
    assert chosen["model"]["name"] == name and list(chosen["widths"].values()) == widths
    assert prepared.notes and "replaces clients' models" in prepared.notes[0]
    wide = prepared.method.wide_model(prepared.federation.client_infos["site_1"].arch)  # type: ignore[attr-defined]
    for client_info in prepared.federation.client_infos.values():
        assert client_info.arch.shapes.keys() == wide.shapes.keys()
        assert all(
            a <= b
            for n, s in client_info.arch.shapes.items()
            for a, b in zip(s, wide.shapes[n], strict=True)
        )


def test_family_is_recorded_and_reused_on_resume(tmp_path: Path) -> None:
    source = config("heterofl", MIXED, clients=3, rounds=1)
    finished = run(source, out=tmp_path / "run")
    again = load_config(tmp_path / "run" / "config.yaml")
    assert (
        again.algorithm["widths"].keys()
        == finished.models.keys()
        == prepare(again).federation.client_infos.keys()
    )
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
    source["algorithm"]["masked"] = True
    with pytest.raises(UserError, match=r"algorithm\.masked: examples must have the same shape"):
        prepare(source)


def test_evaluation_applies_scaler_and_mask() -> None:
    source = federation([{"name": "cnn", "width": 8, "norm": "none"}], 3, masked=True)
    source["algorithm"]["model"] = {"name": "cnn", "width": 8, "norm": "none"}
    rounds = rounds_of(source)
    client = deployed(rounds, "site_2")
    x, t = client.data("common_test", None)["x"], client.models["model"]
    for i, conv in enumerate(("0", "3", "6")):
        x = (
            F.conv2d(x, t[f"backbone.{conv}.weight"], t[f"backbone.{conv}.bias"], padding=1) / 0.5
        ).relu()
        x = F.max_pool2d(x, 2) if i < 2 else x.mean((2, 3))
    logits, has = x @ t["head.weight"].T + t["head.bias"], client.counts > 0
    read = [
        rounds.executor.runtime.predict(client, Rows("common_test"), home) for home in (False, True)
    ]  # type: ignore[attr-defined]
    assert not has.all() and torch.allclose(read[0], logits, atol=1e-5)
    assert torch.allclose(read[1], logits * has, atol=1e-5)
    assert rounds.evaluate().server is not None
    # No client has BatchNorm statistics.
    assert rounds_of(federation(clients=3)).evaluate().server is None


def test_narrow_client_transfers_fewer_bytes() -> None:
    up = {}
    for width in (1, 0.25):
        rounds = rounds_of(federation(clients=2, widths=[1, width], rounds=1))
        up[width] = (rounds.traffic.up, rounds.traffic.down)
    assert up[0.25][0] < 0.7 * up[1][0] and up[0.25][1] < 0.7 * up[1][1]


def test_widths_follow_models_in_large_populations() -> None:
    models = [
        {"name": "mlp", "hidden": [8]},
        {"name": "mlp", "hidden": [4]},
        {"name": "mlp", "hidden": [2]},
    ]
    drawn = {"kind": "drawn", "alpha": 0.5, "rows": 40}
    few, many = (prepare(config("heterofl", models, n, data__partition=drawn)) for n in (999, 1002))
    for prepared, known in ((few, True), (many, False)):
        assert (prepared.config.algorithm["widths"] is not None) is known
        client_infos = prepared.federation.client_infos
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
    with pytest.raises(
        UserError,
        match=r"^algorithm.widths: expected at most 1,000 clients, got 1,002; leave it out and",
    ):
        prepare(config("heterofl", models, 1002, data__partition=drawn, algorithm__widths=[1, 0.5]))


def test_invalid_settings_raise_one_line() -> None:
    for settings, words in (
        ({"model": "gru", "widths": None}, "algorithm.model: gru has no narrower copies"),
        (
            {"widths": [0.5]},
            "algorithm.widths: at least one client must have the full width of cnn",
        ),
        ({"widths": [1, 1.5]}, "algorithm.widths: site_2: must be > 0 and <= 1, got 1.5"),
        ({"widths": []}, "algorithm.widths: expected at least one width"),
        ({"widths": {"site_1": 1}}, "algorithm.widths: missing width for site_2"),
        (
            {"widths": {"site*": 1, "clinic_1": 0.5}},
            "algorithm.widths: unknown client 'clinic_1'",
        ),
    ):
        with pytest.raises(UserError) as error:
            prepare(federation(**settings))
        assert words in str(error.value) and "\n" not in str(error.value)
