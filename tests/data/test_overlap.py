"""Files and rows that occur in several parts of a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hetero_fl as hfl
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig, SourceConfig
from hetero_fl.data import federate, load_source
from hetero_fl.utils.text import Caution
from tests.support.cases import each_case
from tests.support.mistakes import refusal
from tests.support.speech_folders import write_speech_folder

HERE = Path(".")
ROWS = {"a": slice(40), "b": slice(40, 80)}
OVERLAP = "contains rows that are elsewhere, too"


def write_table(path: Path, rows: range) -> str:
    """Write rows whose feature is the row number, of two classes and two sites."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{row}.5,{row % 2},site_{row % 4 // 2}\n" for row in rows]
    path.write_text("x,y,site\n" + "".join(lines))
    return str(path)


def divide(config: dict[str, Any], own: dict[str, Any] | None = None) -> list[str]:
    """Divide a table among two clients and a third one with its own source; return the notes."""
    main = DataConfig.model_validate({"name": "table", "label": "y", "group": "site", **config})
    source = None if own is None else SourceConfig.model_validate({"name": main.name, **own})
    clients = {name: ClientSettings() for name in ("site_0", "site_1")}
    if source is not None:
        clients["own"] = ClientSettings(data=source)
    return federate(load_source(main, HERE), main, clients, seed=0).notes


def shared(notes: list[str]) -> list[str]:
    return [note for note in notes if OVERLAP in note]


def test_copies_of_global_rows_in_a_file_of_a_client_are_noted(tmp_path: Path) -> None:
    main = {"path": write_table(tmp_path / "main.csv", range(200))}
    apart = write_table(tmp_path / "apart.csv", range(200, 280))
    copy = write_table(tmp_path / "copy.csv", range(200))

    assert shared(divide(main, {"path": apart})) == []
    (validation, test) = shared(divide(main, {"path": copy}))
    assert validation.startswith("the global validation set") and "16 of client 'own'" in validation
    assert test.startswith("the global test set") and "40 of client 'own'" in test


def test_copy_of_the_file_of_another_client_is_a_caution(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_table(tmp_path / f"{name}.csv", range(200))
    groups = [
        {
            "name": n,
            "model": "linear",
            "data": {"name": "table", "path": str(tmp_path / f"{n}.csv")},
        }
        for n in ("a", "b")
    ]
    config = {"data": {"name": "table", "label": "y"}, "clients": {"groups": groups}}

    found = [note for note in hfl.prepare(config).notes if isinstance(note, Caution)]

    assert any("rows of two clients are equal: " in n and "of client 'a'" in n for n in found)


def test_copies_of_private_and_global_rows_in_a_public_file_are_noted(tmp_path: Path) -> None:
    main = write_table(tmp_path / "main.csv", range(200))
    public = write_table(tmp_path / "public.csv", range(0, 400, 2))
    config = {"path": main, "proxy": {"source": {"name": "table", "path": public}}}

    (note,) = shared(divide(config))

    assert note.startswith("the proxy set") and "of client 'site_0'" in note
    assert "of client 'site_1'" in note and "of the global test set" in note
    assert "validation set" in note


def test_rows_held_out_as_proxy_set_are_not_noted(tmp_path: Path) -> None:
    assert (
        shared(divide({"path": write_table(tmp_path / "a.csv", range(200)), "proxy": {"size": 20}}))
        == []
    )


def test_copies_of_recordings_are_found(tmp_path: Path) -> None:
    speakers = dict.fromkeys(("site_0", "site_1", "cid", "dora"), 8)
    main = write_speech_folder(tmp_path / "main", speakers=speakers)
    copy = tmp_path / "copy"
    for word in ("no", "yes", "up"):
        (copy / word).mkdir(parents=True)
        for number in range(8):
            name = f"dora_nohash_{number}.wav"
            (copy / word / name).write_bytes((main / word / name).read_bytes())
    config = {"name": "speech", "path": str(main), "label": None, "group": None}

    (note,) = shared(divide(config, {"path": str(copy)}))

    assert note.startswith("the global test set") and "24 of client 'own'" in note


@pytest.mark.parametrize(
    ("main", "own", "proxy", "words"),
    [
        ("words", "./words", None, "'own': data.path: '{own}' is also data.path="),
        ("words", "words/inner", None, "'own': data.path: '{own}' lies in data.path="),
        ("words/inner", "words", None, "'own': data.path: '{own}' contains data.path="),
        ("words", None, "words", "data.proxy.source.path: '{proxy}' is also data.path="),
        ("words", None, "words/inner", "data.proxy.source.path: '{proxy}' lies in data.path="),
        ("other", "words", "words/inner", "'own': data.path: '{own}' contains data.proxy.source"),
    ],
)
def test_folder_that_is_read_twice_is_refused(
    main: str, own: str | None, proxy: str | None, words: str, tmp_path: Path
) -> None:
    for name in ("words", "words/inner", "other"):
        write_speech_folder(
            tmp_path / name,
            words=("no", "yes"),
            speakers=dict.fromkeys(("site_0", "site_1"), 12),
            lists={},
        )
    # The inner folder is no word.
    (tmp_path / "words" / "inner").rename(tmp_path / "words" / "_inner")
    paths = {
        key: f"{tmp_path}/{path.replace('inner', '_inner')}"
        for key, path in (("main", main), ("own", own), ("proxy", proxy))
        if path is not None
    }
    config: dict[str, Any] = {"name": "speech", "path": paths["main"], "label": None, "group": None}
    if proxy is not None:
        config["proxy"] = {"source": {"name": "speech", "path": paths["proxy"]}}

    caught = refusal(divide, config, None if own is None else {"path": paths["own"]})

    assert words.format(**paths) in caught
    assert caught.endswith("so that rows would be in both; move them apart")


def test_same_name_of_another_folder_is_no_overlap(tmp_path: Path) -> None:
    main = write_table(tmp_path / "a" / "rows.csv", range(200))
    own = write_table(tmp_path / "b" / "rows.csv", range(200, 280))

    assert shared(divide({"path": main}, {"path": own})) == []


def notes_with_public_column(folder: Path, x: np.ndarray) -> list[str]:
    """Divide a table of two columns, of which a public file has the first; return the notes."""
    rows = [f"{a},{b},{i % 2},site_{i % 4 // 2}\n" for i, (a, b) in enumerate(x)]
    (folder / "main.csv").write_text("x,z,y,site\n" + "".join(rows))
    (folder / "public.csv").write_text("x,z\n" + "".join(f"{a},\n" for a, _ in x))
    source = {"name": "table", "path": str(folder / "public.csv")}
    main = DataConfig.model_validate(
        {
            "name": "table",
            "path": str(folder / "main.csv"),
            "label": "y",
            "group": "site",
            "proxy": {"source": source},
        }
    )
    client = ClientSettings.model_validate({"preprocess": {"missing": "indicate"}})
    clients = {"site_0": client, "site_1": client}
    return shared(federate(load_source(main, HERE), main, clients, seed=0).notes)


def test_columns_without_public_values_are_not_compared(tmp_path: Path) -> None:
    assert len(notes_with_public_column(tmp_path, np.arange(400.0).reshape(200, 2))) == 1


def test_columns_without_public_values_are_compared_between_other_sets(tmp_path: Path) -> None:
    rows = np.arange(200.0)

    # Each value of the first column occurs in four rows, which differ in the second column.
    (note,) = notes_with_public_column(tmp_path, np.stack([rows // 4, rows], 1))

    assert note.startswith("the proxy set")


@each_case(("dtype", "pixel_range"), ((np.uint8, 255), (np.uint16, 4095)))
def test_copies_of_images_of_another_type_are_found(dtype: Any, pixel_range: int) -> None:
    y = np.arange(40) % 2
    pixels = np.random.default_rng(0).integers(0, pixel_range + 1, (80, 8, 8)).astype(dtype)
    pixels[:2, 0, 0] = pixel_range
    as_floats = (pixels[:, None] / pixel_range).astype(np.float32)
    clients = [hfl.Client(name, "linear", (pixels[rows], y)) for name, rows in ROWS.items()]

    copied = hfl.Federation(clients, test=(as_floats[:40], y), proxy=as_floats[40:])

    proxy, test = shared(list(copied.prepare(hfl.FedMD()).notes))
    assert proxy.startswith("the proxy set") and "40 of client 'b'" in proxy
    assert test.startswith("the global test set") and "of client 'a'" in test
