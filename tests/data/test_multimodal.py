"""Images and a table of a user, joined by the patient's id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import hetero_fl as hfl
from hetero_fl.config.clients import ClientSettings, PreprocessConfig
from hetero_fl.config.data import DataConfig, PartitionConfig
from hetero_fl.data import Dataset, federate, join_images_and_table
from tests.support.mistakes import check_refused

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
WHOSE = ["p1", "p2", "p2", "p3", "p4", "p5"]
Y = [0, 1, 1, 0, 1, 0]
TABLE = pd.DataFrame(
    {
        "patient": ["p3", "p1", "p2"],
        "tp53": [0.5, 1.5, None],
        "egfr": [3, 1, 2],
        "note": ["a", "b", "c"],
    }
)


def joined(table: Any = TABLE, **other: Any) -> Dataset:
    return join_images_and_table(IMAGES, Y, WHOSE, table, **other)


def test_images_are_joined_with_rows_of_their_patient() -> None:
    found = joined(blocks=("image", "genes"))
    assert [b.shape for b in found.blocks] == [(1, 8, 8), (2,)] and found.train.x.shape == (6, 66)
    assert torch.equal(found.train.x[:, :64], torch.from_numpy(IMAGES).flatten(1) / 255)
    assert found.train.x[[0, 3], 64:].tolist() == [[1.5, 1], [0.5, 3]]
    assert found.train.x[1:3, 65].tolist() == [2, 2] and found.train.x[1:3, 64].isnan().all()
    assert (
        found.train.x[4:, 64:].isnan().all()
        and found.train.y is not None
        and found.train.y.tolist() == Y
    )
    assert found.train.patient is not None and len(found.train.patient.unique()) == 5
    assert found.notes == (
        "joined: 5 patients with images, 3 in the table, 3 with both; columns tp53, egfr",
        "table: columns excluded because not numeric: note",
    )


def federate_joined(
    *pixels: np.ndarray, pixel_range: float | None = None, proxy: Any = None
) -> hfl.Federation:
    """Return a federation of one client for each array of images."""
    patients = np.arange(40)
    table = pd.DataFrame({"patient": patients, "age": patients / 3})
    y = patients % 2
    return hfl.Federation(
        [
            hfl.Client(
                f"site_{i}",
                {"name": "multimodal"},
                join_images_and_table(images, y, patients, table, pixel_range=pixel_range),
            )
            for i, images in enumerate(pixels)
        ],
        proxy=proxy,
    )


def test_images_of_all_clients_are_divided_by_one_range() -> None:
    masks = np.random.default_rng(0).integers(0, 2, (40, 8, 8), dtype=np.uint8)
    images = masks * 200

    check_refused(
        r"divided by 1 as in .* got 255; pass pixel_range=255",
        lambda: federate_joined(masks, images).prepare("fedavg"),
    )

    public = federate_joined(masks).clients[0].data
    check_refused(
        r"^proxy: .*divided by 255 as in .* got 1; pass pixel_",
        lambda: federate_joined(images, proxy=public).prepare("fedmd"),
    )

    deep = np.random.default_rng(0).integers(0, 4096, (40, 8, 8), dtype=np.uint16)
    own = federate_joined(deep, deep).prepare("fedavg").federation.data.layout
    assert own.pixel_range == 4095
    federation = federate_joined(masks, images, pixel_range=255)
    assert federation.prepare("fedavg").federation.data.layout.pixel_range is None
    assert federation.clients[0].data.train.x[:, :64].max() == np.float32(1 / 255)


def test_columns_may_be_named_by_integers() -> None:
    table = pd.DataFrame([[0.5, "1.5"], [1.5, "2.25"], [2.5, "3"]]).assign(patient=TABLE["patient"])

    found = joined(table)

    assert found.train.x[[0, 3], 64:].tolist() == [[1.5, 2.25], [0.5, 1.5]]


def test_patients_without_image_are_kept_or_dropped(tmp_path: Path) -> None:
    path = tmp_path / "genes.csv"
    more = pd.concat(
        [
            TABLE.assign(ill=[0, 0, 1], site="a"),
            pd.DataFrame(
                {
                    "patient": ["q9"],
                    "tp53": [7.0],
                    "egfr": [8],
                    "note": ["d"],
                    "ill": [1],
                    "site": ["b"],
                }
            ),
        ]
    )
    more.to_csv(path, index=False)
    found = joined(path, label="ill", group=list("aaaabb"), table_group="site")
    assert (
        len(found.train) == 7
        and found.train.x[6, :64].isnan().all()
        and found.train.x[6, 64:].tolist() == [7, 8]
    )
    assert (
        found.train.y is not None
        and found.train.y.tolist() == [*Y, 1]
        and found.train.patient_names[-1] == "q9"
    )
    assert found.train.group is not None and found.train.group.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_labels_of_patients_without_an_image_are_mapped_like_those_of_images(
    tmp_path: Path,
) -> None:
    more = pd.concat(
        [TABLE.assign(ill=[1, 1, 2]), pd.DataFrame({"patient": ["q9"], "tp53": [7.0], "ill": [2]})]
    )
    more.to_csv(tmp_path / "genes.csv", index=False)

    with pytest.warns(UserWarning, match="1 as class 0, 2 as class 1"):
        found = join_images_and_table(
            IMAGES, np.array(Y) + 1, WHOSE, tmp_path / "genes.csv", columns=["tp53"], label="ill"
        )

    assert found.task.names == ("1", "2")
    assert found.train.y is not None and found.train.y.tolist() == [*Y, 1]


def test_patient_ids_may_have_leading_zeros(tmp_path: Path) -> None:
    path = tmp_path / "genes.csv"
    pd.DataFrame({"patient": ["0003", "0001", "0002"], "tp53": [0.5, 1.5, 2.5]}).to_csv(
        path, index=False
    )
    owners = ["0001", "0002", "0002", "0003", "0004", "x5"]
    found = join_images_and_table(IMAGES, Y, owners, path)
    assert (
        found.train.x[[0, 1, 3], 64].tolist() == [1.5, 2.5, 0.5]
        and found.train.x[4:, 64].isnan().all()
    )
    assert found.train.patient_names == ("0001", "0002", "0003", "0004", "x5")
    # 1 and 0001 are different patients
    check_refused(
        "patient '0003' has no image",
        join_images_and_table,
        IMAGES,
        Y,
        ["1", *owners[:3], "2", "0001"],
        path,
    )


def test_multimodal_source_trains_a_federation() -> None:
    images = np.random.default_rng(1).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    ids = [f"p{i}" for i in range(60)]
    table = pd.DataFrame({"patient": ids[:40], "tp53": range(40), "egfr": range(40)})
    dataset = join_images_and_table(
        images, [i % 2 for i in range(60)], ids, table, blocks=("image", "genes")
    )
    both = ClientSettings(preprocess=PreprocessConfig(missing="indicate", normalize="own"))
    data = federate(dataset, DataConfig(partition=PartitionConfig(min_size=5)), {"a": both}, 0)
    x = data.columns("a", "train", data.preprocess("a"))["x"]
    assert (
        x.shape[1] == 68 and not x.isnan().any() and 0 < x[:, 67].mean() < 1 and not x[:, 66].any()
    )
