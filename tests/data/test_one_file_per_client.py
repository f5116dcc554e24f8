"""One file per client: the common sets are drawn from all files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import hetero_fl
from hetero_fl.data import FederatedData
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import load_federated_data
from hetero_fl.utils.text import Caution
from tests.support.cases import each_case
from tests.support.mistakes import check_refused

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
    separate, together = dealt(configuration(tmp_path)), dealt(pooled_file(tmp_path, frames))

    assert separate.content_hash() == together.content_hash()
    assert separate.layout == together.layout
    assert (separate.n_test, separate.n_proxy) == (48, 24)


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


def test_proxy_set_depends_on_seed_but_test_set_does_not(tmp_path: Path) -> None:
    write(tmp_path)
    one, other = (dealt({**configuration(tmp_path), "seed": seed}) for seed in (0, 1))

    assert one.raw_examples("common_test").equal(other.raw_examples("common_test"))
    assert not one.raw_examples("proxy").equal(other.raw_examples("proxy"))


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


def test_missing_keys_of_files_are_inherited(tmp_path: Path) -> None:
    write(tmp_path)
    config = configuration(tmp_path, label="ill", patient="patient")
    for group in config["clients"]["groups"]:
        group["data"] = {key: group["data"][key] for key in ("name", "path")}

    assert dealt(config).content_hash() == dealt(configuration(tmp_path)).content_hash()


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


def test_real_sites_require_common_file(tmp_path: Path) -> None:
    write(tmp_path)

    check_refused(
        r"^data\.path: required if clients keep their files on their machines",
        dealt,
        configuration(tmp_path),
        absent=HOSPITALS,
    )


def test_images_of_several_folders_or_files_are_pooled(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    config = configuration(tmp_path)
    config["data"] = {"name": "npz", "proxy": {"size": 10}}
    config["clients"]["defaults"] = {"model": "mlp"}
    for number, name in enumerate(HOSPITALS):
        images = draws.integers(0, 256, (60, 8, 8), dtype=np.uint8)
        np.savez(
            tmp_path / f"{name}.npz", train_images=images, train_labels=np.arange(60) % (number + 2)
        )
        config["clients"]["groups"][number]["data"] = {
            "name": "npz",
            "path": str(tmp_path / f"{name}.npz"),
        }

    data = dealt(config)

    assert data.task.outputs == 4 and (data.n_test, data.n_proxy) == (36, 10)


@each_case("common", (False, True))
def test_unused_test_rows_of_a_clients_file_are_noted(common: bool, tmp_path: Path) -> None:
    images, labels = np.zeros((60, 8, 8), dtype=np.uint8), np.arange(60) % 2
    for name in (*HOSPITALS, "common"):
        np.savez(tmp_path / f"{name}.npz", train_images=images, train_labels=labels)
    np.savez(
        tmp_path / "north.npz",
        train_images=images,
        train_labels=labels,
        test_images=images[:9],
        test_labels=labels[:9],
    )
    config = configuration(tmp_path)
    config["data"] = {"name": "npz", "proxy": {"size": 10}}
    if common:
        config["data"]["path"] = str(tmp_path / "common.npz")
    config["clients"]["defaults"] = {"model": "mlp"}
    for group in config["clients"]["groups"]:
        group["data"] = {"name": "npz", "path": str(tmp_path / f"{group['name']}.npz")}

    notes = [note for note in dealt(config).notes if "not used" in note]

    assert notes == [
        "clients: 'north': data: the test rows of the source are not used; rows are held "
        "out of its training rows instead (data.split)"
    ]


def test_run_without_common_file_is_evaluated(tmp_path: Path) -> None:
    write(tmp_path)
    config = configuration(tmp_path, label="ill", patient="patient")

    run = hetero_fl.run(config, out=tmp_path / "run")

    assert set(run.models) == set(HOSPITALS) and run.summary["data"]["n_test"] == 48
    assert "held out of the files of all 3 clients" in (tmp_path / "run" / "log.txt").read_text()
    hospital("west", 5).to_csv(tmp_path / "new.csv", index=False)
    with pytest.warns(UserWarning, match="of the 80 rows"):
        scores = hetero_fl.evaluate(run, str(tmp_path / "new.csv"))
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
