"""Folders of strangers: links and names that leave them, pipes, and formats of images."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import EpsImagePlugin, Image

from hetero_fl.config.data import SourceConfig
from hetero_fl.data import Dataset, load_source
from hetero_fl.data.external import load_unlabeled
from hetero_fl.data.sources import image_files
from tests.support.benchmark_folders import write_iwildcam
from tests.support.cases import each_case
from tests.support.image_folders import make_image_folder
from tests.support.malformed_files import EPS, READERS
from tests.support.mistakes import check_refused

datasets = pytest.importorskip("datasets", reason="pip install 'hetero_fl[datasets]'")
parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'hetero_fl[tables]'")
FOLDERS = [reader for reader in READERS if not reader.file and reader.source != "run"]


def load(name: str, path: Path, **keys: Any) -> Dataset:
    where = {"name": f"hf:{path}"} if name == "hf" else {"name": name, "path": str(path)}
    source = SourceConfig.model_validate({**where, **keys})
    return load_source(source, path.parent / "downloads", missing=True)


def test_link_that_leaves_a_folder_needs_permission(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for number, reader in enumerate(FOLDERS):
        with subtests.test(source=reader.source):
            path = tmp_path / str(number) / "data"
            outside = tmp_path / str(number) / "outside"
            path.mkdir(parents=True)
            reader.write(path)
            before = load(reader.source, path, **reader.keys).train.x.nan_to_num()
            entry = next(each for each in sorted(path.rglob("*.*")) if each.is_file())
            entry.rename(outside)
            entry.symlink_to(outside)

            check_refused(
                r": leads out to .*outside; set data\.follow_lin",
                load,
                reader.source,
                path,
                **reader.keys,
            )
            after = load(reader.source, path, **reader.keys, follow_links=True).train.x
            entry.unlink()
            os.mkfifo(entry)

            assert after.nan_to_num().equal(before)
            check_refused(
                f"{entry}: expected a file or a folder", load, reader.source, path, **reader.keys
            )


def test_links_within_a_folder_or_a_hub_cache_are_read(tmp_path: Path) -> None:
    path = tmp_path / "datasets--me--xrays" / "snapshots" / "4f1c"
    make_image_folder(path, 12)
    (path / "red" / "again.png").symlink_to("000002.png")
    (path / "loop").symlink_to("loop")
    (path / "red" / "000002.png").rename(path.parents[1] / "5a2e")
    (path / "red" / "000002.png").symlink_to("../../../5a2e")

    assert len(load("image_folder", path).train) == 13
    (path / "red" / "000005.png").rename(tmp_path / "outside.png")
    (path / "red" / "000005.png").symlink_to(tmp_path / "outside.png")
    check_refused(r"000005\.png: leads out to .*outside\.png", load, "image_folder", path)
    (path / "red" / "000005.png").unlink()
    (path / "red" / "all").symlink_to("..")
    check_refused("red/all: leads to a folder that contains it", load, "image_folder", path)
    (path / "red" / "all").unlink()
    (path / "red" / "000005.png").symlink_to(tmp_path / "outside.png")
    public = SourceConfig(name="image_folder", path=str(path / "red"))
    check_refused(
        r"^proxy\.path: .*; set proxy\.follow_links=true", load_unlabeled, public, tmp_path, "proxy"
    )


def test_class_folder_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = make_image_folder(tmp_path / "data", 12)
    (path / "red").rename(path / os.fsdecode(b"caf\xe9"))

    check_refused(
        r"class 'caf\\udce9': not encoded in UTF-8; rename it", load, "image_folder", path
    )


@pytest.mark.parametrize("prefix", ["", "zip://a.png::", "file://"])
def test_table_names_no_image_outside_its_folder(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (8, 8), 77).save(tmp_path / "secret.png")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a"]))
    rows = [{"bytes": None, "path": f"{prefix}{tmp_path}/data/../secret.png"}]
    table = datasets.Dataset.from_dict({"image": rows, "label": [0]}, features).data.table
    about = json.dumps({"info": {"features": features.to_dict()}})
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    parquet.write_table(
        table.replace_schema_metadata({"huggingface": about}), tmp_path / "data" / "a.parquet"
    )

    check_refused("expected files in the folder, got", load, "hf", tmp_path / "data")
    if not prefix:
        assert int(load("hf", tmp_path / "data", follow_links=True).train.x.max()) == 77


@each_case("kind", ("card", "state"))
def test_data_set_names_no_table_outside_its_folder(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    datasets.Dataset.from_dict({"a": [1, 2], "label": [0, 1]}).save_to_disk(str(path))
    (path / "data-00000-of-00001.arrow").rename(tmp_path / "secret.arrow")
    state = (path / "state.json").read_text()
    (path / "state.json").write_text(state.replace("data-00000-of-00001", "../secret"))
    if kind == "card":
        (path / "state.json").unlink()
        card = "---\nconfigs:\n- config_name: default\n  data_files: ../secret.arrow\n---\n"
        (path / "README.md").write_text(card)

    check_refused("expected files in the folder, got", load, "hf", path)


def test_metadata_names_no_image_outside_the_folder(tmp_path: Path) -> None:
    path = write_iwildcam(tmp_path / "data")
    (path / "train" / "0001.jpg").rename(tmp_path / "secret.jpg")
    text = (path / "metadata.csv").read_text().replace("0001.jpg", "../../secret.jpg")
    (path / "metadata.csv").write_text(text)

    check_refused(
        r"row 1: expected a file in the folder, got 'train/\.\./", load, "iwildcam", path, size=8
    )
    assert len(load("iwildcam", path, size=8, follow_links=True).train) == 72


@pytest.mark.parametrize("source", ["image_folder", "iwildcam", "hf"])
def test_postscript_starts_no_program(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    reader = next(each for each in FOLDERS if each.source == source)
    reader.write(tmp_path)
    for file in [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.jpg")]:
        file.write_bytes(EPS)

    check_refused(
        r"not a readable image \(unknown format or damaged file",
        load,
        source,
        tmp_path,
        **reader.keys,
    )


def test_announced_pixels_are_compared_with_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_image_folder(tmp_path / "data", 12)
    sizes: list[int] = []
    monkeypatch.setattr(image_files, "check_memory", lambda size, _: sizes.append(size))
    load("image_folder", path)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 63)

    check_refused(r"not a readable image \(more than 63 pixels\)", load, "image_folder", path)
    assert sizes == [12 * 8 * 8 * 3]
