"""One file per client: common sets of all files, and rows that occur in several files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import hetero_fl as hfl
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig, SourceConfig
from hetero_fl.data import FederatedData, federate, load_source
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import load_federated_data
from hetero_fl.utils.text import Caution
from tests.support.cases import each_case
from tests.support.mistakes import check_refused, refusal
from tests.support.speech_folders import write_speech_folder

HOSPITALS = ("north", "south", "east")


def hospital(name: str, seed: int, patients: int = 40, **columns: Any) -> pd.DataFrame:
    draws = np.random.default_rng(seed)
    rows = 2 * patients
    frame = pd.DataFrame(
        {"patient": np.arange(rows) % patients, "crp": draws.normal(size=rows).round(3)}
    )
    frame["ward"] = draws.choice(["A", "B", name], rows)
    frame["ill"] = np.where(frame.crp > 0, "yes", "no")
    return frame.assign(**columns)


def write(folder: Path, **changes: pd.DataFrame) -> dict[str, pd.DataFrame]:
    frames = {name: hospital(name, seed) for seed, name in enumerate(HOSPITALS)} | changes
    for name, frame in frames.items():
        frame.to_csv(folder / f"{name}.csv", index=False)
    return frames


def configuration(folder: Path, **data: Any) -> dict[str, Any]:
    own = {"name": "table", "label": "ill", "patient": "patient"}
    groups = [
        {"name": name, "data": {**own, "path": str(folder / f"{name}.csv")}} for name in HOSPITALS
    ]
    return {
        "rounds": 2,
        "data": {"name": "table", "proxy": {"size": 24}, **data},
        "clients": {
            "defaults": {"model": "tabular", "preprocess": {"normalize": "own"}},
            "groups": groups,
        },
        "algorithm": {"name": "fedmd"},
        "output": {"plots": False, "report": False},
    }


def dealt(config: dict[str, Any], **other: Any) -> FederatedData:
    return load_federated_data(load_config(config), **other)


def pooled_file(folder: Path, frames: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Write the same rows to one file with a column of hospitals; return its configuration."""
    parts = [
        frame.assign(hospital=name, patient=[f"{name}/{p}" for p in frame.patient])
        for name, frame in sorted(frames.items())
    ]
    pd.concat(parts).to_csv(folder / "all.csv", index=False)
    config = configuration(folder)
    config["data"] |= {
        "path": str(folder / "all.csv"),
        "label": "ill",
        "patient": "patient",
        "group": "hospital",
        "partition": {"kind": "natural"},
    }
    config["clients"]["groups"] = [{"name": name} for name in HOSPITALS]
    return config


def test_file_per_client_equals_a_natural_partition(tmp_path: Path) -> None:
    frames = write(tmp_path)
    inherited = configuration(tmp_path, label="ill", patient="patient")
    for group in inherited["clients"]["groups"]:
        group["data"] = {key: group["data"][key] for key in ("name", "path")}

    separate, together = dealt(configuration(tmp_path)), dealt(pooled_file(tmp_path, frames))

    assert separate.content_hash() == together.content_hash()
    assert separate.layout == together.layout
    assert (separate.n_test, separate.n_proxy) == (48, 24)
    assert dealt(inherited).content_hash() == separate.content_hash()
    other = dealt({**configuration(tmp_path), "seed": 1})
    assert separate.raw_examples("common_test").equal(other.raw_examples("common_test"))
    assert not separate.raw_examples("proxy").equal(other.raw_examples("proxy"))


def test_common_rows_cover_all_hospitals_without_splitting_patients(tmp_path: Path) -> None:
    write(tmp_path)
    data = dealt(configuration(tmp_path))

    seen: dict[tuple[str, int], str] = {}
    places = {
        **{f"{c} {s}": data.client_rows[c][s] for c in HOSPITALS for s in data.client_rows[c]},
        **data.public_sets,
    }
    test = data.public_sets["common_test"]
    assert test.examples.group is not None and len(test.examples.group.unique()) == 3
    for name in (
        "common_test",
        "common_validation",
        *(f"{c} {s}" for c in HOSPITALS for s in ("train", "test")),
    ):
        share = places[name]
        assert share.examples.patient is not None
        for place in share.rows.tolist():
            who = share.examples.patient_names[int(share.examples.patient[place])]
            assert seen.setdefault((who, 0), name) == name


def test_proxy_file_replaces_held_out_rows(tmp_path: Path) -> None:
    write(tmp_path)
    hospital("west", 9).drop(columns=["ill", "patient"]).to_csv(
        tmp_path / "public.csv", index=False
    )
    source = {"name": "table", "path": str(tmp_path / "public.csv")}

    data = dealt(configuration(tmp_path, proxy={"source": source}))

    assert data.n_proxy == 80 and data.n_test == 48
    assert data.layout.columns == (
        "crp",
        "ward=A",
        "ward=B",
        "ward=east",
        "ward=north",
        "ward=south",
    )
    assert (data.raw_examples("proxy")[:, 3:] == 0).all()  # no hospital has ward west


def test_classes_and_columns_of_all_files_are_matched_by_name(
    tmp_path: Path,
) -> None:
    south = hospital("south", 1)
    south["ill"] = np.where(south.crp > 0, "maybe", "no")
    write(tmp_path, south=south[["ill", "ward", "crp", "patient"]])

    data = dealt(configuration(tmp_path))

    assert data.task.names == ("maybe", "no", "yes")
    assert data.label_counts("south")[2] == 0 and data.label_counts("north")[0] == 0


@each_case(
    ("change", "message"),
    (
        (
            {"data": {"name": "table", "partition": {"kind": "dirichlet"}}},
            r"^data\.partition\.kind=dirichlet needs data\.path",
        ),
        (
            {"south": {"path": "north"}},
            (
                r"^clients: 'south': data\.path: already used by "
                r"client 'north', got '.*north\.csv'"
            ),
        ),
        (
            {"south": None},
            (
                r"^data\.path: missing, and "
                r"client 'south' has no data of its own"
            ),
        ),
        (
            {"south": {"name": "digits", "path": None, "label": None, "patient": None}},
            r"'south': data\.name: must be table .* got digits",
        ),
        ({"south": {"patient": None}}, r"^clients: 'south': data: no patients, but client"),
        (
            {"south": {"task": "regression"}},
            r"^clients: 'south': data.*column 'ill': expected numbers as regression labels",
        ),
        (
            {"south": {"categories": {"ward": ["A"]}}},
            r"^clients: 'south': data\.categories: must be the same for all clients",
        ),
        (
            {"data": {"name": "text"}},
            r"^data\.path: missing; only data\.name table, npz, image_folder can pool",
        ),
        (
            {"frame": {"ward": 1}},
            r"^clients: 'east': data: column 'ward' is text, but numeric for clients: 'south'",
        ),
        (
            {"frame": {"crpp": 1.0}},
            (
                r"^clients: 'east': data: east.csv: column 'crpp' not found, "
                r"which another client contains; did you mean 'crp'"
            ),
        ),
    ),
)
def test_files_that_cannot_be_pooled_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, south=hospital("south", 1, **change.get("frame", {})))
    config = configuration(tmp_path)
    config["data"] |= change.get("data", {})
    if "south" in change and change["south"] is None:
        del config["clients"]["groups"][1]["data"]
    elif "south" in change:
        own = change["south"]
        if own.get("path"):
            own = {**own, "path": str(tmp_path / f"{own['path']}.csv")}
        config["clients"]["groups"][1]["data"] |= own

    check_refused(message, dealt, config)


def test_spellings_of_a_path_are_one_file(tmp_path: Path) -> None:
    write(tmp_path, common=hospital("common", 4, patients=90))
    (tmp_path / "link.csv").symlink_to("north.csv")
    (tmp_path / "folder").mkdir()
    common = {"path": str(tmp_path / "common.csv"), "label": "ill", "patient": "patient"}

    for name in ("link.csv", "folder/../north.csv"):
        spelled = str(tmp_path / name)
        config = configuration(tmp_path)
        config["clients"]["groups"][1]["data"]["path"] = spelled
        words = r"'south': data\.path: already used by client 'north'"
        check_refused(words, dealt, config)

        # The clients that name a file next to a common file share its rows.
        shared = dealt(config | {"data": {**config["data"], **common}})
        splits = ("train", "validation", "test")
        rows = {client: sum(shared.n_rows(client, s) for s in splits) for client in HOSPITALS}
        assert rows["north"] + rows["south"] == rows["east"] == 80
        config["data"] |= common | {"path": spelled}
        check_refused("'north': data: is the source of the main data set", dealt, config)


def test_real_sites_require_common_file(tmp_path: Path) -> None:
    write(tmp_path)

    check_refused(
        r"^data\.path: required if clients keep their files on their machines",
        dealt,
        configuration(tmp_path),
        absent=HOSPITALS,
    )


def npz_configuration(folder: Path, classes: int = 2, **arrays: np.ndarray) -> dict[str, Any]:
    """Write a file of 60 images for each client; return the configuration.

    Args:
        folder: Folder of the files.
        classes: Number of classes of the first client; the others have one more each.
        **arrays: Further arrays of the first file.
    """
    config = configuration(folder)
    config["data"] = {"name": "npz", "proxy": {"size": 10}}
    config["clients"]["defaults"] = {"model": "mlp"}
    for number, group in enumerate(config["clients"]["groups"]):
        path = folder / f"{group['name']}.npz"
        images = np.random.default_rng(number).integers(0, 256, (60, 8, 8), dtype=np.uint8)
        labels = np.arange(60) % (classes + number)
        more = arrays if number == 0 else {}
        np.savez(path, train_images=images, train_labels=labels, **more)
        group["data"] = {"name": "npz", "path": str(path)}
    return config


def test_images_of_several_files_are_pooled(tmp_path: Path) -> None:
    data = dealt(npz_configuration(tmp_path))

    assert data.task.outputs == 4 and (data.n_test, data.n_proxy) == (36, 10)


def test_run_without_common_file_is_evaluated(tmp_path: Path) -> None:
    write(tmp_path)
    config = configuration(tmp_path, label="ill", patient="patient")

    run = hfl.run(config, out=tmp_path / "run")

    assert set(run.models) == set(HOSPITALS) and run.summary["data"]["n_test"] == 48
    assert "held out of the files of all 3 clients" in (tmp_path / "run" / "log.txt").read_text()
    hospital("west", 5).to_csv(tmp_path / "new.csv", index=False)
    with pytest.warns(UserWarning, match="of the 80 rows"):
        scores = hfl.evaluate(run, str(tmp_path / "new.csv"))
    assert scores["north"]["accuracy"] > 0


def test_classes_of_one_client_only_are_noted(tmp_path: Path) -> None:
    frames = write(tmp_path)
    spelling = "' differ only in case, white space or Unicode form"
    no_other = "clients: 'north': no other client has a class of this client: no, yes"
    for names, words, is_noted in (
        (("Sick", "Healthy"), spelling, True),
        (("sick", "HEALTHY"), spelling, True),
        (("yes", "no"), no_other, True),
        (("yes", "healthy"), "no other client", False),
    ):
        for place, frame in frames.items():
            known = names if place == "north" else ("sick", "healthy")
            changed = frame.assign(ill=np.where(frame.ill == "yes", *known))
            changed.to_csv(tmp_path / f"{place}.csv", index=False)

        notes = dealt(configuration(tmp_path)).notes

        cautions = [note for note in notes if isinstance(note, Caution)]
        assert any(words in note for note in cautions) == is_noted, names


HERE = Path(".")
ROWS = {"a": slice(40), "b": slice(40, 80)}
OVERLAP = "rows are in several sets"


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
    (note,) = shared(divide(main, {"path": copy}))
    assert "16 of 16 of the global validation set" in note
    assert "40 of 40 of the global test set" in note and "of client 'own'" in note


def test_copy_of_the_file_of_another_client_is_a_caution(tmp_path: Path) -> None:
    write(tmp_path, south=hospital("north", 0))

    found = [n for n in hfl.prepare(configuration(tmp_path)).notes if isinstance(n, Caution)]

    assert any(" of client 'south'" in note for note in shared(found))


def test_copies_of_private_and_global_rows_in_a_public_file_are_noted(tmp_path: Path) -> None:
    main = write_table(tmp_path / "main.csv", range(200))
    public = write_table(tmp_path / "public.csv", range(0, 400, 2))
    config = {"path": main, "proxy": {"source": {"name": "table", "path": public}}}

    (note,) = shared(divide(config))

    assert "100 of 200 of the proxy set" in note and "client" not in note


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

    assert "24 of 24 of the global test set" in note


@pytest.mark.parametrize(
    ("main", "own", "proxy", "words"),
    [
        ("words", "words/inner", None, "'own': data.path: '{own}' overlaps data.path="),
        ("words/inner", "words", None, "'own': data.path: '{own}' overlaps data.path="),
        ("words", None, "words", "data.proxy.source.path: '{proxy}' overlaps data.path="),
        ("words", None, "words/inner", "data.proxy.source.path: '{proxy}' overlaps data.path="),
        ("other", "words", "words/inner", "'own': data.path: '{own}' overlaps data.proxy.source"),
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

    assert "several sets, so scores may be too high: 200 of 200 of the proxy set; " in note


@each_case(("dtype", "pixel_range"), ((np.uint8, 255), (np.uint16, 4095)))
def test_copies_of_images_of_another_type_are_found(dtype: Any, pixel_range: int) -> None:
    y = np.arange(40) % 2
    pixels = np.random.default_rng(0).integers(0, pixel_range + 1, (80, 8, 8)).astype(dtype)
    pixels[:2, 0, 0] = pixel_range
    as_floats = (pixels[:, None] / pixel_range).astype(np.float32)
    clients = [hfl.Client(name, "linear", (pixels[rows], y)) for name, rows in ROWS.items()]

    copied = hfl.Federation(clients, test=(as_floats[:40], y), proxy=as_floats[40:])

    (note,) = shared(list(copied.prepare(hfl.FedMD()).notes))
    assert "40 of 40 of the proxy set" in note and "40 of 40 of the global test set" in note


@pytest.mark.parametrize("is_own", [False, True])
def test_test_rows_in_a_given_validation_set_are_noted(is_own: bool) -> None:
    x, y = np.random.default_rng(0).normal(size=(120, 3)).astype(np.float32), np.arange(120) % 2
    given = (x[80:], y[80:])
    clients = [
        hfl.Client(name, "linear", (x[rows], y[rows]), validation=given if is_own else None)
        for name, rows in ROWS.items()
    ]

    same = hfl.Federation(clients, test=given, validation=None if is_own else given)

    (note,) = shared(list(same.prepare(hfl.FedAvg()).notes))
    assert "40 of 40 of the global test set" in note
