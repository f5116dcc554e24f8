"""Patients of rows that a program passes, and warnings about rows on both sides of a cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import hetero_fl as hfl
from hetero_fl.config.data import SourceConfig
from hetero_fl.data import from_arrays, load_source
from hetero_fl.data.sources.objects import to_dataset
from hetero_fl.experiment import PreparedRun
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.text import Caution
from tests.support.cases import each_case
from tests.support.mistakes import refusal

COLUMNS = ["a", "b", "c"]


def visits(patients: int, rows: int = 4, seed: int = 0) -> tuple[Any, Any, Any]:
    """Return x, y and the patient of each row. All rows of a patient are equal."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(patients, 3)).astype(np.float32).repeat(rows, 0)
    return x, rng.integers(0, 2, patients).repeat(rows), np.arange(patients).repeat(rows)


def frame(patients: int, rows: int = 4, seed: int = 0, prefix: str = "") -> pd.DataFrame:
    x, y, who = visits(patients, rows, seed)
    names = [f"{prefix}{each}" for each in who] if prefix else who
    return pd.DataFrame(x, columns=COLUMNS).assign(pid=names, ill=y)


def clients(first: Any, second: Any, **options: Any) -> list[hfl.Client]:
    return [
        hfl.Client(name, model="mlp", data=data, **options)
        for name, data in (("north", first), ("south", second))
    ]


def warnings_of(federation: hfl.Federation, **options: Any) -> list[str]:
    prepared = federation.prepare(hfl.FedAvg(), rounds=1, **options)
    return [note for note in prepared.notes if isinstance(note, Caution)]


FEDERATIONS: dict[str, Callable[[], hfl.Federation]] = {
    "arrays of clients": lambda: hfl.Federation(
        [
            hfl.Client(name, "mlp", (x, y), patient=who)
            for name, (x, y, who) in (("north", visits(40)), ("south", visits(40, seed=1)))
        ],
        proxy=20,
    ),
    "frames of clients": lambda: hfl.Federation(
        clients(frame(40, prefix="p"), frame(40, seed=1, prefix="q")),
        label="ill",
        patient="pid",
        proxy=20,
    ),
    "divided tensors": lambda: hfl.Federation(
        clients(None, None),
        data=torch.utils.data.TensorDataset(*map(torch.as_tensor, visits(80)[:2])),
        patient=torch.as_tensor(visits(80)[2]),
        proxy=20,
    ),
    "given test": lambda: hfl.Federation(
        clients(frame(40), frame(40, seed=1), label="ill", patient="pid"),
        test=frame(20, 1, seed=2).drop(columns="pid"),
        label="ill",
    ),
    "split clients": lambda: hfl.Federation(
        hfl.split(visits(80)[:2], 2, patient=visits(80)[2], model="mlp")
    ),
}


def values_of_sets(prepared: PreparedRun) -> list[set[float]]:
    """Return the values of the first column or pixel in the public and the clients' sets."""
    data = prepared.data
    parts = [*data.public_sets.values()]
    parts += [part for own in data.client_rows.values() for part in own.values()]
    assert not [note for note in prepared.notes if isinstance(note, Caution)]
    return [set(part.copy_rows().x.flatten(1)[:, 0].tolist()) for part in parts]


@each_case("make", FEDERATIONS.values())
def test_rows_of_a_patient_are_on_one_side_of_every_cut(make: Callable[[], hfl.Federation]) -> None:
    prepared = make().prepare(hfl.FedAvg(), rounds=1)

    sides = values_of_sets(prepared)
    assert prepared.data.input_shape == (3,)
    assert sum(map(len, sides)) == len(set().union(*sides))


def test_equal_rows_on_both_sides_of_a_cut_are_a_warning_with_the_cure(tmp_path: Path) -> None:
    frame(80).drop(columns="pid").to_csv(tmp_path / "visits.csv", index=False)
    config = {
        "data": {"name": "table", "path": str(tmp_path / "visits.csv"), "label": "ill"},
        "clients": {"count": 2, "defaults": {"model": "mlp"}},
    }
    x, y, _ = visits(40)

    in_python = warnings_of(hfl.Federation(clients((x, y), visits(40, seed=1)[:2])))
    in_files = warnings_of(hfl.Federation.from_config(config))

    for notes, cure in ((in_python, "pass patient=..."), (in_files, "set data.patient")):
        (note,) = notes
        assert "of the global test set" in note and "of validation and test of client" in note
        assert cure in note


@each_case(
    ("values", "words"),
    [
        (np.arange(120) // 4, "'pid' seems to identify patients and repeats"),
        ([f"p{i // 4}" for i in range(120)], "'pid' seems to identify patients and repeats"),
        (np.arange(120), "'pid' has another integer in almost every row"),
        (10**9 + 7919 * np.arange(120) % 10**6, "'pid' has another integer in almost every row"),
        ([f"p{min(i, 117)}" for i in range(120)], "'pid' seems to identify patients and repeats"),
    ],
)
def test_columns_of_ids_are_warnings(values: Any, words: str) -> None:
    x, y, _ = visits(120, 1)
    table = pd.DataFrame(x, columns=COLUMNS).assign(pid=values, ill=y)

    found = warnings_of(hfl.Federation(clients(None, None), data=table, label="ill"))

    assert len(found) == 1 and words in found[0] and "pass patient='pid'" in found[0]


@each_case("prefix", ["", "p"])
def test_the_given_patients_are_named_if_they_are_a_feature(prefix: str) -> None:
    sites = frame(40, prefix=prefix), frame(40, seed=1, prefix=prefix)
    own = [
        hfl.Client(str(i), "mlp", site, label="ill", patient=site.pid.to_numpy())
        for i, site in enumerate(sites)
    ]

    found = [note for note in warnings_of(hfl.Federation(own)) if "'pid'" in note]

    named = "column 'pid' identifies the patients, too, and is a feature; remove the column"
    assert [note.partition(": data: ")[2] for note in found] == ([] if prefix else [named] * 2)


@each_case(("kind", "as_array"), [("frame", False), ("frame", True), ("hugging_face", False)])
def test_ids_beside_the_given_patients(kind: str, as_array: bool) -> None:
    x, y, who = visits(60)
    table = pd.DataFrame(x, columns=COLUMNS).assign(
        mrn=who,
        visit_id=np.arange(240) // 2,
        subject=[f"s{each // 2}" for each in who],
        image=np.arange(240),
        ill=y,
    )
    patient = "mrn"
    if as_array:
        table = table.drop(columns="mrn")
        patient = who
    data: Any = table
    if kind == "hugging_face":
        data = pytest.importorskip("datasets").Dataset.from_pandas(table)

    found = to_dataset(data, "data", "ill", patient=patient).notes

    cautions = [note.removeprefix("data: ") for note in found if isinstance(note, Caution)]
    assert cautions == [
        "column 'visit_id' seems to identify rows of a patient, and is a feature; remove the "
        "column",
        "column 'subject' seems to identify patients, too, and repeats; pass patient='subject' to "
        "keep the rows of a patient together, otherwise they are divided between training and test",
        "column 'image' seems to identify rows of a patient, and is a feature; remove the column",
    ]


def test_other_columns_are_no_ids() -> None:
    rng = np.random.default_rng(0)
    x, y, _ = visits(120, 1)
    table = pd.DataFrame(x, columns=COLUMNS).assign(
        age=rng.integers(20, 90, 120),
        paid=rng.integers(0, 30, 120),
        id=rng.poisson(3, 120),
        salary=rng.integers(20_000, 90_000, 120),
        person_height=rng.integers(150, 200, 120),
        patients_per_day=rng.integers(0, 30, 120),
        comment=[f"seen on day {i}" for i in range(120)],
        ill=y,
    )

    found = warnings_of(hfl.Federation(clients(None, None), data=table, label="ill"))
    assert len(found) == 1 and found[0].startswith("columns left out of the features: 'comment';")


def test_ids_in_arrays_are_warnings() -> None:
    x, y, _ = visits(120, 1)
    x[:, 1] = np.arange(120)

    x[:, 0] = np.random.default_rng(0).permutation(100_000)[:120]
    (note,) = from_arrays(x, y).notes

    assert isinstance(note, Caution) and "column 1 of x has another integer" in note
    assert note.endswith("; remove the column, or pass its values as patient=...")
    (note,) = from_arrays(x, y, patient=y).notes
    assert note.endswith(", and is a feature; remove the column")


def write_images(folder: Path, splits: tuple[str, ...] = ("",)) -> Path:
    """Write four images of each of 40 patients, in folders of two classes."""
    rng = np.random.default_rng(0)
    for split in splits:
        for who in range(40):
            place = folder / split / ("ill" if who % 2 else "well")
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            pixels[0, 0] = who
            for view in range(4):
                Image.fromarray(pixels).save(place / f"scan_p{who:02}_{view}.png")
    return folder


def image_config(folder: Path, patient: str | None) -> dict[str, Any]:
    return {
        "data": {"name": "image_folder", "path": str(folder), "patient": patient},
        "clients": {"count": 2, "defaults": {"model": "cnn_bn_small"}},
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("patients") / "images")


@each_case("patient", ["(p[0-9]+)_", "(?:ill|well)/scan_(p..)", "patients.csv"])
def test_patients_of_image_files(patient: str, images: Path, tmp_path: Path) -> None:
    if patient.endswith(".csv"):
        files = sorted(images.rglob("*.png"))
        rows = {"file": [file.name for file in files], "patient": [f.name[5:8] for f in files]}
        patient = str(tmp_path / patient)
        pd.DataFrame(rows).to_csv(patient, index=False)

    sides = values_of_sets(hfl.prepare(image_config(images, patient)))

    assert sum(map(len, sides)) == 40


TWICE = "file,patient\nscan_p01_0.png,p1\nscan_p01_0.png,p1\nscan_p01_0.png,p2\n"


@each_case(
    ("patient", "words"),
    [
        ("p[0-9]+", "expected a pattern of file names with a group"),
        ("(q[0-9]+)", "scan_p01_0.png: the pattern '(q[0-9]+)' is not found in its name"),
        ("(p[", "is no regular expression"),
        ("none.csv", "file 'none.csv' not found"),
        ("twice.csv", "'scan_p01_0.png' has two patients, 'p1' and 'p2'"),
    ],
)
def test_patients_that_images_do_not_have_are_refused(
    patient: str, words: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("twice.csv").write_text(TWICE)

    with pytest.raises(UserError) as caught:
        hfl.prepare(image_config(images, patient))

    assert words in str(caught.value) and str(caught.value).startswith("data.patient: ")


def test_copies_of_images_are_warnings_with_the_cure(images: Path) -> None:
    notes = hfl.prepare(image_config(images, None)).notes

    found = [note for note in notes if isinstance(note, Caution)]
    assert found and all("set data.patient" in note for note in found)


def test_patient_in_two_given_sets_is_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", ("train", "test"))
    table = frame(40)
    options: dict[str, Any] = {"label": "ill", "patient": "pid"}
    own = hfl.Client("north", model="mlp", data=table, test=table[:8])

    for prepare in (
        lambda: hfl.prepare(image_config(folder, "(p[0-9]+)_")),
        hfl.Federation(clients(None, None), data=table, test=table[:8], **options).prepare,
        hfl.Federation([own], test=frame(9, prefix="q"), **options).prepare,
    ):
        with pytest.raises(UserError, match="with rows in the train and the test set, such as"):
            prepare()


@each_case(
    ("part", "title"),
    [
        ("test", "the global test set"),
        ("validation", "the global validation set"),
        ("proxy", "the proxy set"),
        ("data", "the rows of other clients"),
    ],
)
def test_patients_of_a_client_in_common_data_are_a_warning(part: str, title: str) -> None:
    sets = {"test": frame(30, seed=3, prefix="t"), part: frame(60, seed=4, prefix="n")}
    own = [
        hfl.Client(name, "mlp", frame(40, seed=seed, prefix=name[0]))
        for seed, name in enumerate(("north", "south"))
    ]
    rest = [hfl.Client("rest", "mlp")] if part == "data" else []

    federation = hfl.Federation([*own, *rest], label="ill", patient="pid", **sets)
    notes = federation.prepare(hfl.FedAvg()).notes

    (found,) = (note for note in notes if note.startswith("patients are in several sets"))
    assert f"patients of client 'north' in {title}, such as 'n" in found
    assert "'south'" not in found and isinstance(found, Caution)


def test_patient_in_two_splits_of_a_hugging_face_data_set_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": frame(40), "test": frame(9, seed=2)}
    splits = {split: datasets.Dataset.from_pandas(part) for split, part in parts.items()}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "visits"))
    data = {"name": f"hf:{tmp_path / 'visits'}", "label": "ill", "patient": "pid"}

    with pytest.raises(UserError, match="9 patients with rows in the train and the test set"):
        hfl.prepare({"data": data})


def test_patients_of_a_folder_of_arrays(tmp_path: Path) -> None:
    _, y, who = visits(40)
    images = np.random.default_rng(0).integers(0, 256, (len(y), 8, 8), dtype=np.uint8)
    for name, values in (("train_images", images), ("train_labels", y), ("who", who)):
        np.save(tmp_path / f"{name}.npy", values)
    source = {"name": "npz", "path": str(tmp_path), "patient": "who"}

    dataset = load_source(SourceConfig.model_validate(source), tmp_path)

    assert dataset.train.patient is not None
    assert torch.equal(dataset.train.patient, torch.as_tensor(who))


def apart(rows: int, seed: int) -> tuple[Any, Any]:
    x, y, _ = visits(rows, 1, seed)
    return x, y


def given(first: Any, second: Any, held_out: Any) -> list[hfl.Client]:
    """Return two clients that are given the same validation and test set."""
    return [
        hfl.Client(name, "mlp", data, validation=held_out, test=held_out)
        for name, data in (("north", first), ("south", second))
    ]


def test_copies_of_rows_in_objects_are_warnings() -> None:
    first, second, other = apart(100, 0), apart(100, 1), apart(60, 2)
    part = first[0][:30], first[1][:30]
    own = [
        hfl.Client("north", model="mlp", data=first, test=part),
        hfl.Client("south", model="mlp", data=second),
    ]
    cases: list[tuple[hfl.Federation, list[str]]] = [
        (hfl.Federation(clients(first, second), test=other, proxy=apart(60, 3)[0]), []),
        (hfl.Federation(clients(first, first), test=other), ["100 of 100 of client 'south'"]),
        (hfl.Federation(clients(first, second), test=part), ["30 of 30 of the global test set"]),
        (
            hfl.Federation(clients(first, second), test=other, validation=part),
            ["30 of 30 of the global validation set"],
        ),
        (
            hfl.Federation(clients(first, second), test=other, proxy=first[0]),
            ["100 of 100 of the proxy set"],
        ),
        (
            hfl.Federation(clients(first, second), test=other, proxy=other[0]),
            ["60 of 60 of the proxy set"],
        ),
        (hfl.Federation(own, test=other), ["of validation and test of client 'north'"]),
        (hfl.Federation(given(first, second, apart(60, 3)), test=other), []),
        (
            hfl.Federation(given(first, second, part), test=other),
            [
                "60 of 60 of validation and test of client 'north'",
                "60 of 60 of validation and test of client 'south'",
            ],
        ),
    ]

    for federation, expected in cases:
        found = warnings_of(federation)
        assert len(found) == bool(expected)
        assert all(words in found[0] for words in expected)


def test_rows_that_are_equal_by_chance_are_no_warnings() -> None:
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 3, (300, 4)).astype(np.float32), rng.integers(0, 2, 300)
    counts = rng.integers(0, 15, (300, 2)).astype(np.float32), rng.integers(0, 2, 300)
    blank = np.zeros((300, 8, 8), dtype=np.uint8), rng.integers(0, 2, 300)

    for data, model in ((answers, "mlp"), (counts, "mlp"), (blank, "cnn_bn_small")):
        own = [hfl.Client(name, model=model) for name in ("north", "south")]
        assert warnings_of(hfl.Federation(own, data=data)) == []


def test_equal_answers_of_dependent_questions_are_no_warnings_unless_a_set_is_copied() -> None:
    rng = np.random.default_rng(0)
    trait = rng.normal(size=(600, 1))
    answers = (1.5 * trait + rng.normal(size=(600, 20)) > 0).astype(np.float32)
    y = (trait[:, 0] > 0).astype(int)
    pairs = (answers[:300], y[:300]), (answers[300:], y[300:])

    apart = hfl.Federation(clients(*pairs))
    copied = hfl.Federation(clients(*pairs), test=pairs[0])

    assert warnings_of(apart) == []
    assert any("of the global test set" in note for note in warnings_of(copied))


def test_client_with_few_rows_is_refused_from_objects_and_files(tmp_path: Path) -> None:
    cure = "data.partition.min_size=19"
    sets = {"few": frame(19, 1), "many": frame(20, 1, seed=1)}
    objects, files = [], []
    for name, table in sets.items():
        path = tmp_path / f"{name}.csv"
        table.drop(columns="pid").to_csv(path, index=False)
        objects.append(hfl.Client(name, model="mlp", data=table.drop(columns="pid")))
        files.append({"name": name, "data": {"name": "table", "path": str(path)}})
    config = {
        "data": {"name": "table", "label": "ill"},
        "clients": {"defaults": {"model": "mlp"}, "groups": files},
    }

    for own, advice in (
        (hfl.Federation(objects, label="ill"), f'pass overrides=["{cure}"]'),
        (hfl.Federation.from_config(config), cure),
    ):
        message = refusal(own.prepare, hfl.FedAvg())
        assert "'few': data: has 19 rows, fewer than data.partition.min_size=20" in message
        assert advice in message
        assert own.prepare(hfl.FedAvg(), overrides=[cure]).data.n_rows("few", "train") > 0


def test_fewer_rows_than_classes_are_a_warning() -> None:
    x, _, _ = visits(120, 1)
    y = np.arange(120) % 3
    pairs = (x[:60], y[:60]), (x[60:], y[60:])

    few = warnings_of(hfl.Federation(clients(*pairs), proxy=2))
    enough = warnings_of(hfl.Federation(clients(*pairs), proxy=3))

    assert few == [
        "the proxy set has 2 rows, fewer than the 3 classes, so that results mean little"
    ]
    assert enough == []
    tiny = clients(pairs[0], (x[:4], y[:4]))
    lowered = hfl.Federation(tiny).prepare(hfl.Local(), overrides=["data.partition.min_size=1"])
    assert any("has 2 training rows, fewer than the 3 classes" in note for note in lowered.notes)


def test_columns_named_after_persons_are_ids_of_few_persons() -> None:
    x, y, who = visits(4, 30)
    for name in ("participant", "Participant_ID", "subject no", "patientHash"):
        table = pd.DataFrame(x, columns=COLUMNS).assign(ill=y, **{name: [f"p{i}" for i in who]})

        (note,) = [n for n in to_dataset(table, "data", "ill").notes if isinstance(n, Caution)]

        assert f"column '{name}' seems to identify patients and repeats" in note
