"""The source `traffic`: generated junctions, files and errors in files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hetero_fl.config.data import SeriesConfig, SourceConfig
from hetero_fl.data import Dataset, load_source
from hetero_fl.data.sources.traffic import BEGIN, JUNCTIONS, make_junctions
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case

LEAN = {"window": 6, "horizons": (1, 3)}


def load(
    path: Path | None = None, label: str | None = None, group: str | None = None, **series: object
) -> Dataset:
    settings = SeriesConfig(**{**LEAN, **series})
    config = SourceConfig(
        name="traffic",
        path=None if path is None else str(path),
        label=label,
        group=group,
        series=settings,
    )
    return load_source(config, Path(), missing=True)


def table(hours: int = 400, sites: tuple[str, ...] = ("1", "2")) -> pd.DataFrame:
    frames = []
    for place, name in enumerate(sites):
        dates = pd.Timestamp("2023-01-01") + pd.to_timedelta(np.arange(hours), unit="h")
        count = 20 + 10 * place + np.arange(hours) % 24
        frames.append(
            pd.DataFrame(
                {"DateTime": dates.strftime("%m/%d/%Y %H:%M"), "Junction": name, "Vehicles": count}
            )
        )
    return pd.concat(frames, ignore_index=True)


def written(frame: pd.DataFrame, tmp_path: Path, name: str = "t.csv") -> Path:
    path = tmp_path / name
    frame.to_csv(path, index=False, sep="\t" if name.endswith(".tsv") else ",")
    return path


def test_generated_junctions_match_the_description() -> None:
    assert pd.Timestamp(BEGIN, unit="h").day_name() == "Monday"
    sites, again = make_junctions(), make_junctions()
    assert [s.name for s in sites] == list(JUNCTIONS)
    assert all(np.array_equal(a.value, b.value) for a, b in zip(sites, again, strict=True))
    for one in sites:
        level, day, *_, cameras = JUNCTIONS[one.name]
        assert len(one.value) == (300 - day) * 24 and one.value.mean() == pytest.approx(
            level * 1.1, rel=0.15
        )
        assert np.isnan(one.lanes).all() != cameras and np.isnan(one.weather).all() == cameras
        if cameras:
            assert np.array_equal(one.lanes.sum(1), one.value)
    first = sites[0]
    hours = first.value.reshape(-1, 24)
    working = hours[[d for d in range(300) if d % 7 < 5]].mean(0)
    assert {int(working[:12].argmax()), 12 + int(working[12:].argmax())} == {8, 17} | {
        12 + int(working[12:].argmax())
    }
    assert hours[5::7].mean() < hours[:5].mean()  # weekends
    dry, wet = (
        sites[2].value[m].mean() for m in (sites[2].weather[:, 1] == 0, sites[2].weather[:, 1] > 1)
    )
    assert wet < 0.95 * dry


def test_generated_sets_are_marked_and_disjoint_from_proxy() -> None:
    data, public = load(), load(sites=("public",))
    assert (
        data.simulated
        and data.task.unit == "vehicles"
        and data.task.names == ("1 h ahead", "3 h ahead")
    )
    assert data.train.group_names == ("camera_1", "camera_2", "sensor_1", "sensor_2")
    assert public.train.group_names == ("public",) and public.columns == data.columns
    assert data.columns[-5:] == ("temperature", "rain", "lane_1", "lane_2", "lane_3")


@each_case("name", ("t.csv", "t.tsv"))
def test_junctions_are_loaded_from_file(name: str, tmp_path: Path) -> None:
    data = load(written(table(), tmp_path, name))
    assert not data.simulated and data.train.group_names == ("1", "2") and data.test is not None
    # no weather, no lanes
    assert data.train.x[..., -5:].isnan().all() and torch.isfinite(data.train.x[..., :-5]).all()
    assert data.notes[0].startswith("traffic: training until 2023-01-1")
    shuffled = (
        table().sample(frac=1, random_state=0).sort_values("DateTime", kind="stable")
    )  # hour by hour, sites mixed
    assert torch.equal(
        load(written(shuffled, tmp_path, name)).train.x.nan_to_num(),
        data.train.x.nan_to_num(),
    )


def test_columns_are_configurable(tmp_path: Path) -> None:
    frame = table().rename(columns={"DateTime": "when", "Vehicles": "cars", "Junction": "place"})
    frame["left"], frame["warm"] = (
        frame["cars"] / 2,
        np.where(np.arange(len(frame)) % 50 == 3, np.nan, 4.0),
    )
    path = written(frame, tmp_path)
    data = load(
        path, "cars", "place", time="when", lanes=("left",), weather=("warm",), sites=("2",)
    )
    assert (
        data.columns[-2:] == ("warm", "left")
        and data.task.unit == "cars"
        and data.train.group_names == ("2",)
    )
    assert torch.allclose(data.train.x[..., -1], data.train.x[..., 0] / 2)
    assert 0 < data.train.x[..., -2].isnan().float().mean() < 0.05


@each_case(
    "form",
    (
        "%Y-%m-%d %H:%M",
        "%Y-%m-%dT%H:%M:%S",
        "%d/%m/%Y %H:%M",
        "%d.%m.%Y %H:%M",
        "%m/%d/%Y %H:%M",
    ),
)
def test_date_formats_are_parsed(form: str, tmp_path: Path) -> None:
    frame, plain = table(), table()
    frame["DateTime"] = pd.to_datetime(frame["DateTime"], format="%m/%d/%Y %H:%M").dt.strftime(form)
    a, b = (
        load(written(frame, tmp_path)).train.time,
        load(written(plain, tmp_path, "p.csv")).train.time,
    )
    assert a is not None and b is not None and torch.equal(a, b)


def test_ambiguous_dates_are_refused(tmp_path: Path) -> None:
    frame = table(hours=2, sites=("1",))
    frame["DateTime"] = ["03/04/2023 10:00", "03/04/2023 11:00"]
    with pytest.raises(
        UserError,
        match=(
            r"series\.format: missing; .* column 'DateTime' of .*t\.csv "
            r"are ambiguous, choose '%m/%d/%Y %H:%M' or '%d/%m"
        ),
    ):
        load(written(frame, tmp_path))


def with_cell(row: int, column: str, value: object) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame = frame.astype({"Vehicles": object})
        frame.loc[row, column] = value
        return frame

    return change


# Rows from 401 belong to junction 2.
MISTAKES: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "column": (
        lambda frame: frame.rename(columns={"Vehicles": "Cars"}),
        "data.label: column 'Vehicles' not found in PATH",
    ),
    "text in a number": (
        with_cell(7, "Vehicles", "many"),
        "data.path: PATH: row 8, column 'Vehicles': expected a number, got 'many'",
    ),
    "empty": (
        with_cell(7, "Vehicles", None),
        "data.path: PATH: row 8, column 'Vehicles': missing value",
    ),
    "no date": (
        with_cell(450, "DateTime", "yesterday"),
        "data.path: PATH: row 451, column 'DateTime': expected a date as YYYY-MM-DD hh:mm, got "
        "'yesterday'",
    ),
    "order": (
        lambda frame: frame.iloc[[*range(410), 411, 410, *range(412, 800)]],
        "data.path: PATH: row 412, column 'DateTime': rows of site '2' must be sorted by date, "
        "got '01/01/2023 10:00' after '01/01/2023 11:00'",
    ),
    "twice": (
        lambda frame: frame.iloc[[*range(6), *range(5, 800)]],
        "data.path: PATH: row 7, column 'DateTime': duplicate date '01/01/2023 05:00' of site "
        "'1', first in row 6",
    ),
    "gap": (
        lambda frame: frame.drop(index=range(20, 23)),
        "data.path: PATH: row 21, column 'DateTime': 3 hours of site '1' missing before "
        "'01/01/2023 23:00'; add them",
    ),
    "minutes": (
        with_cell(9, "DateTime", "01/01/2023 09:20"),
        "data.path: PATH: row 10, column 'DateTime': dates must be whole hours apart, got "
        "'01/01/2023 09:20' and",
    ),
}


def test_error_names_file_row_and_column(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for what, (change, line) in MISTAKES.items():
        path = written(change(table()), tmp_path)
        with subtests.test(what=what), pytest.raises(UserError) as refused:
            load(path)
        assert line.replace("PATH", str(path)) in str(refused.value)


def test_gaps_may_be_skipped(tmp_path: Path) -> None:
    full = load(written(table(), tmp_path)).train
    for what in ("gap", "empty"):
        change, _ = MISTAKES[what]
        skipped = load(written(change(table()), tmp_path), gaps="skip").train
        assert 0 < len(skipped) < len(full)


def test_named_columns_must_exist(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for keys, message in (
        ({"weather": ("rian",)}, r"data\.series\.weather: column 'rian' not found in"),
        ({"sites": ("3",)}, r"data\.series\.sites: site '3' not found in .*; choose from 1, 2"),
        (
            {"group": "Juncton"},
            r"data\.group: column 'Juncton' not found in .*; did you mean 'Junction'",
        ),
    ):
        with subtests.test(message=message), pytest.raises(UserError, match=message):
            load(written(table(), tmp_path), **keys)
