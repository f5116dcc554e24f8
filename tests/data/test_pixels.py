"""The range of integer pixels: one value for the whole federation, from the training rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hetero_fl as hfl
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.data.federated_data import PublicPack
from hetero_fl.experiment.exporting.graph import inputs_of
from hetero_fl.experiment.exporting.score import to_input
from tests.support.cases import each_case
from tests.support.mistakes import check_refused
from tests.support.python_federations import QUIET

RNG = np.random.default_rng(0)
Y = np.arange(40) % 2
BINARY = RNG.integers(0, 2, (40, 8, 8))
BYTES = RNG.integers(0, 256, (40, 8, 8))
TWELVE = RNG.integers(0, 4096, (40, 8, 8))
SIXTEEN = RNG.integers(0, 2**16, (40, 8, 8))


def federation(*images: Any, test: Any = None, proxy: Any = None) -> hfl.Federation:
    clients = [hfl.Client(f"client_{i}", "linear", (x, Y[: len(x)])) for i, x in enumerate(images)]
    test = images[0] if test is None else test
    return hfl.Federation(clients, test=(test, Y[: len(test)]), proxy=proxy)


def inputs(prepared: Any, name: str = "common_test") -> torch.Tensor:
    data = prepared.data
    found = data.columns("client_0", name, data.preprocess("client_0"))["x"]
    assert isinstance(found, torch.Tensor)
    return found[:, 0]


@each_case(
    ("images", "pixel_range"),
    (
        (BINARY.astype(bool), 1),
        (BINARY, 1),
        (BINARY.astype(np.uint8), 1),
        (torch.from_numpy(BINARY).bool(), 1),
        (BYTES.astype(np.uint8), 255),
        (BYTES, 255),
        (TWELVE, 4095),
        (TWELVE.astype(np.uint16), 4095),
        (TWELVE[:, None].astype(np.float32), 4095),
        (torch.from_numpy(SIXTEEN).int(), 65535),
        (SIXTEEN.astype(np.uint32), 65535),
        (RNG.integers(0, 1024, (40, 8, 8)).astype(np.int16), 1023),
    ),
)
def test_pixels_are_divided_by_the_range_of_their_values(images: Any, pixel_range: int) -> None:
    prepared = federation(images, proxy=images).prepare(hfl.FedMD())

    expected = torch.as_tensor(np.asarray(images, dtype=np.float64)).reshape(40, 8, 8).float()
    for name in ("common_test", "proxy"):
        assert torch.allclose(inputs(prepared, name), expected / pixel_range)
    notes = [note for note in prepared.notes if "pixels are" in note]
    assert (notes == []) == (pixel_range == 255)


def test_range_is_that_of_the_training_rows_of_all_clients() -> None:
    dark = TWELVE // 16 + 256 * (TWELVE > 4000)
    prepared = federation(TWELVE, dark, test=TWELVE // 2).prepare(hfl.FedAvg())

    assert torch.allclose(inputs(prepared), torch.from_numpy(TWELVE // 2).float() / 4095)


def test_dark_images_of_a_wide_type_have_the_bits_of_the_others() -> None:
    dark = (TWELVE // 17).astype(np.uint16)
    clients = [hfl.Client(f"client_{i}", "linear", (x, Y)) for i, x in enumerate((dark, TWELVE))]

    for test in (None, (dark, Y)):
        prepared = hfl.Federation(clients, test=test).prepare(hfl.FedAvg())
        view = prepared.data.preprocess("client_0")
        rows = prepared.data.client_rows["client_0"]["train"].copy_rows()
        known = {image.tobytes() for image in (dark / 4095).astype(np.float32)}
        assert {image.numpy().tobytes() for image in view(rows.x)} < known
        (warning,) = [n for n in prepared.notes if "divided by 4095 for all" in n]
        assert "do not exceed 255 at 'client_0'" in warning
    as_bytes = hfl.Client("client_0", "linear", (dark.astype(np.uint8), Y))
    check_refused("uint8", lambda: hfl.Federation([as_bytes, clients[1]]).prepare(hfl.FedAvg()))


def test_float_images_have_no_range() -> None:
    floats = federation(BYTES[:, None] / 255, test=BYTES.astype(np.uint8)).prepare(hfl.FedAvg())
    assert not [note for note in floats.notes if "pixel" in note]


def test_masks_beside_bytes_are_refused_everywhere() -> None:
    photos = BYTES.astype(np.uint8)
    masks = BYTES > 127
    run = federation(photos).train(hfl.FedAvg(), rounds=1, overrides=QUIET)
    (spec,) = inputs_of(run.load_models("client_0")["client_0"])
    uses: tuple[Any, ...] = (
        lambda: federation(photos, test=masks).prepare(hfl.FedAvg()),
        lambda: federation(photos, proxy=masks).prepare(hfl.FedMD()),
        lambda: hfl.evaluate(run, (masks, Y)),
        lambda: run.predict("client_0", masks),
        lambda: run.predict("client_0", masks.tolist()),
    )

    for use in uses:
        check_refused("from 0 to 255 as in training, got 0 and 1 only", use)
    with pytest.raises(ValueError, match="from 0 to 255, or floats from 0 to 1, got bool"):
        to_input(masks, spec)
    black = np.zeros_like(photos)
    federation(photos, test=black).prepare(hfl.FedAvg())
    hfl.evaluate(run, (black, Y))
    # A range that the user has chosen holds for masks, too.
    chosen = federation(masks).train(hfl.FedAvg(), rounds=1, overrides=[*QUIET, "data.range=255"])
    hfl.evaluate(chosen, (masks, Y), log=print)


def test_configured_range_applies_to_all_pixels() -> None:
    overrides = ["data.range=3000"]
    deep = federation(BYTES.astype(np.uint8), TWELVE - 1024, test=TWELVE - 1024)

    prepared = deep.prepare(hfl.FedAvg(), overrides=overrides)

    assert torch.allclose(inputs(prepared), (torch.from_numpy(TWELVE) - 1024).float() / 3000)


def save_folder(folder: Path, images: np.ndarray, suffix: str) -> dict[str, Any]:
    for row, (image, label) in enumerate(zip(images, Y, strict=True)):
        file = folder / "train" / f"class_{label}" / f"{row:03}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return {"name": "image_folder", "path": str(folder)}


def save_npz(folder: Path, images: np.ndarray, _: str) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    np.savez(folder / "images.npz", train_images=images, train_labels=Y)
    return {"name": "npz", "path": str(folder / "images.npz")}


def save_npy(folder: Path, images: np.ndarray, _: str) -> dict[str, Any]:
    np.save(folder / "train_images.npy", images)
    np.save(folder / "train_labels.npy", Y)
    return {"name": "npz", "path": str(folder)}


@pytest.mark.parametrize(
    ("save", "suffix", "stream"),
    [
        (save_folder, ".png", False),
        (save_folder, ".tif", True),
        (save_npz, "", False),
        (save_npy, "", False),
        (save_npy, "", True),
    ],
)
def test_files_keep_the_depth_of_their_pixels(
    save: Any, suffix: str, stream: bool, tmp_path: Path
) -> None:
    source = save(tmp_path, TWELVE.astype(np.uint16), suffix) | ({"stream": True} if stream else {})
    source["partition"] = {"min_size": 5}
    config = {"data": source, "clients": {"count": 2, "defaults": {"model": "linear"}}}

    data = hfl.Federation.from_config(config).prepare("fedavg").data

    view = data.preprocess(data.client_ids[0])
    raw = data.raw_examples("common_test")
    known = {image.tobytes() for image in (TWELVE / 4095).astype(np.float32)}
    assert {image.numpy().tobytes() for image in view(raw)} < known


def test_folder_of_several_depths_is_one_line(tmp_path: Path) -> None:
    source = save_folder(tmp_path, TWELVE.astype(np.uint16), ".png")
    Image.fromarray(BYTES[0].astype(np.uint8)).save(tmp_path / "train" / "class_0" / "zero.png")

    for stream in (False, True):
        check_refused(
            r"zero.png: expected 16 bits per pixel as in .* got 8",
            hfl.prepare,
            {"data": source | {"stream": stream}},
        )


def test_color_images_of_16_bits_are_one_line(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    folder = tmp_path / "a"
    folder.mkdir()
    tifffile.imwrite(folder / "0.tif", np.zeros((8, 8, 3), np.uint16), photometric="rgb")

    check_refused(
        r"0.tif: not a readable image \(16 bits per channel",
        lambda: hfl.Federation.from_config(
            {"data": {"name": "image_folder", "path": str(tmp_path)}}
        ).prepare("fedavg"),
    )


def test_range_is_saved_with_the_model(tmp_path: Path) -> None:
    data = save_npz(tmp_path, TWELVE, "") | {"partition": {"min_size": 5}}
    clients = {"count": 2, "defaults": {"model": "linear"}}
    config = {"data": data, "clients": clients, "rounds": 1, "algorithm": {"name": "fedavg"}}
    run = hfl.run(config, out=tmp_path / "run", overrides=QUIET)
    saved = hfl.Run.load(tmp_path / "run")
    name = saved.model_names[0]

    scaled = (TWELVE / 4095)[:, None].astype(np.float32)
    predict = lambda x: saved.predict(name, x)  # noqa: E731
    assert np.allclose(predict(TWELVE), predict(scaled), atol=1e-6)
    assert np.allclose(predict(TWELVE // 64), predict((TWELVE // 64 / 4095)[:, None]), atol=1e-6)
    (spec,) = inputs_of(saved.load_models(name)[name])
    assert np.allclose(to_input(TWELVE, spec), scaled)
    as_integers, as_floats = (
        hfl.evaluate(run, (x, Y), client=name, log=print)[name] for x in (TWELVE, scaled)
    )
    assert as_integers["loss"] == pytest.approx(as_floats["loss"])
    check_refused(
        "expected pixels from 0 to 4095 as in training, got 8 bits",
        hfl.evaluate,
        run,
        (BYTES.astype(np.uint8), Y),
    )
    for use in (hfl.evaluate, lambda run, data: run.predict(name, data[0])):
        check_refused(
            "from 0 to 4095 as in training, got larger ones",
            use,
            run,
            (SIXTEEN.astype(np.uint16), Y),
        )
    check_refused(
        "from 0 to 4095 as in training, got 8 bits", hfl.evaluate, run, (BINARY.astype(bool), Y)
    )
    own = str(tmp_path / "images.npz")
    hfl.join(run, own, out=tmp_path / "joined", patients=[10], seeds=[0])
    joined = SavedModel.load(next((tmp_path / "joined" / "models").iterdir()))
    assert joined.preprocess["pixel_range"] == 4095


def test_public_pack_tells_the_range(tmp_path: Path) -> None:
    prepared = federation(BINARY.astype(bool)).prepare(hfl.FedAvg())
    pack = PublicPack.decode(PublicPack.from_data(prepared.data).encode())
    masks, photos = (
        ClientSettings.model_validate({"data": save_npz(folder, x, "")})
        for folder, x in ((tmp_path, BINARY), (tmp_path / "photos", BYTES))
    )

    data = pack.data_of_client("site", DataConfig(), {"site": masks}, 0)

    view = data.preprocess("site")
    assert view(data.raw_examples("common_test")).unique().tolist() == [0, 1]
    check_refused(
        "expected pixels from 0 to 1 as in training",
        pack.data_of_client,
        "site",
        DataConfig(),
        {"site": photos},
        0,
    )
