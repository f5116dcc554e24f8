"""Folders in the layouts of MovieLens: ratings, movies and users in text files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hetero_fl.data.checks import first_true
from hetero_fl.data.sources.files import check_folder, read_lines, split_cells
from hetero_fl.data.sources.movies.histories import Ratings, User
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.ordering import natural_order

if TYPE_CHECKING:
    import pandas as pd

MAX_RATING = 5.0
OTHER = "other"
"""Region of zip codes that do not start with a digit."""
COLUMNS = ("user", "movie", "rating", "time")
"""Columns of a file of ratings."""


@dataclass(frozen=True)
class Layout:
    """The files of a MovieLens data set.

    Attributes:
        ratings: File with the columns user, movie, rating and time.
        movies: File whose first two columns are the movie and its title.
        users: File with the users and zip codes, or regions. It may be missing.
        separator: Separator of the columns in the file of ratings.
        other_separator: Separator of the columns in the other files.
        zip_column: Index of the column of zip codes.
        has_genre_columns: Whether the file of movies has further columns instead of one of genres.
        encodings: Encodings of the files, of which the first that fits is used.
        header: First line of the file of ratings, or an empty string if there is none.
        users_header: First line of the file of users, which contains regions. If empty, the file
            has no header and contains zip codes.
    """

    ratings: str
    movies: str
    users: str
    separator: str
    other_separator: str
    zip_column: int = 4
    has_genre_columns: bool = False
    encodings: tuple[str, ...] = ("utf-8", "latin-1")
    header: str = ""
    users_header: str = ""


LAYOUTS = (
    Layout("u.data", "u.item", "u.user", "\t", "|", has_genre_columns=True),
    Layout("ratings.dat", "movies.dat", "users.dat", "::", "::"),
    Layout(
        "ratings.csv",
        "movies.csv",
        "users.csv",
        ",",
        ",",
        encodings=("utf-8",),
        header="userId,movieId,rating,timestamp",
        users_header="userId,region",
    ),
)
"""Layouts of MovieLens 100K, of MovieLens 1M and 10M, and of MovieLens 20M, 25M, 32M and latest.

The last layout has no file of users at MovieLens; `users.csv` is an extension.
"""


def read_ratings(path: Path, group: str | None, min_rating: float) -> Ratings:
    """Read a folder in a layout of MovieLens.

    Args:
        path: Folder to read.
        group: `region` for the region of a user, which is the first digit of the zip code or, with
            `users.csv`, the second column; `user` for one group per user; or None for `region` if
            the folder has a file of users, otherwise `user`.
        min_rating: Movies with a rating below this value are not part of histories.

    Returns:
        All movies, and the users with at least two movies in their histories. The movies of a user
        are in the order of time, or of the file if the times are equal.

    Raises:
        UserError: If a file is missing or malformed.
    """
    check_folder(path)
    if group not in (None, "region", "user"):
        raise UserError(f"group: must be 'region' or 'user' for movies, got '{group}'")
    layout = _find_layout(path)
    titles = _read_titles(path / layout.movies, layout)
    has_users = (path / layout.users).is_file()
    if group == "region" and not has_users:
        columns = layout.users_header or f"{layout.zip_column + 1} columns, the last a zip code"
        raise UserError(
            f"group: 'region' needs {layout.users} ({columns}), which {path} does not contain; "
            "add the file, or set group=user"
        )
    regions = _read_regions(path / layout.users, layout) if has_users else None
    file = path / layout.ratings
    where = f"path: {file}"
    table = _read_ratings(file, layout)
    _check_names(table, layout, titles, regions, where)
    owners = None if group == "user" else regions
    users = tuple(_make_users(table, titles, min_rating, owners))
    if not users:
        raise UserError(f"{where}: no user has two ratings of at least {min_rating:g}")
    return Ratings(_distinct(titles), users, where)


def _read_ratings(file: Path, layout: Layout) -> pd.DataFrame:
    """Read a file of ratings, which has up to 33 million rows.

    Returns:
        A table in the order of the file, with users and movies as categories, ratings as float64
        and times as int64.

    Raises:
        UserError: If a row is malformed.
    """
    import pandas as pd

    from hetero_fl.data.sources.table_columns import to_numbers

    where = f"path: {file}"
    if layout.header:
        with file.open(encoding="utf-8-sig", errors="replace") as lines:
            _check_header(file, next(lines, ""), layout.header)
    # The parser of pandas splits at one character, so a column between two colons is empty.
    between = len(layout.separator) - 1
    names = [COLUMNS[0]]
    for name in COLUMNS[1:]:
        names += [*(f"before {name}" for _ in range(between)), name]
    expected = f"a user, a movie, a rating and a time, separated by {layout.separator!r}"
    try:
        table = pd.read_csv(
            file,
            sep=layout.separator[0],
            names=names,
            header=0 if layout.header else None,
            dtype=dict.fromkeys(COLUMNS[:2], str),
            # A user may have the name "NA".
            keep_default_na=False,
            na_values=[""],
            skipinitialspace=True,
            low_memory=False,
        )
    except (ValueError, OSError) as error:
        # The errors of pandas are ValueErrors.
        raise UserError(f"{where}: expected {expected} ({one_line(str(error), 200)})") from error
    empty = table[[name for name in names if name not in COLUMNS]]
    # The first columns of a table whose first row has too many cells become its index.
    if not isinstance(table.index, pd.RangeIndex) or bool(empty.notna().any(axis=None)):
        raise UserError(f"{where}: expected {expected}")
    ratings = to_numbers(table["rating"])
    in_range = ratings.between(0, MAX_RATING)
    _check_cells(table["rating"], in_range, f"a number from 0 to {MAX_RATING:g}", where)
    times = to_numbers(table["time"])
    _check_cells(table["time"], (times % 1 == 0) & (times.abs() < 2**63), "an integer", where)
    return (
        table[list(COLUMNS)]
        .assign(rating=ratings, time=times)
        .astype({"user": "category", "movie": "category", "rating": np.float64, "time": np.int64})
    )


def _check_header(file: Path, line: str, header: str) -> None:
    if line.strip() != header:
        raise UserError(f"path: {file}: line 1: expected '{header}', got '{one_line(line, 60)}'")


def _check_cells(column: pd.Series, valid: pd.Series, expected: str, where: str) -> None:
    """Raise UserError for the first cell of a column that is not valid."""
    import pandas as pd

    if (row := first_true(~valid.to_numpy(bool))) is not None:
        cell = column.iloc[row]
        found = "nothing" if pd.isna(cell) else f"'{one_line(str(cell), 40)}'"
        raise UserError(
            f"{where}: row {row + 1}, column '{column.name}': expected {expected}, got {found}"
        )


def _check_names(
    table: pd.DataFrame,
    layout: Layout,
    titles: Mapping[str, str],
    regions: Mapping[str, str] | None,
    where: str,
) -> None:
    """Check that users and movies are known, and that no user has rated a movie twice."""
    users = table["user"]
    movies = table["movie"]
    _check_cells(users, users.notna(), "a name", where)
    if regions is not None:
        _check_cells(users, users.isin(list(regions)), f"a user of {layout.users}", where)
    _check_cells(movies, movies.isin(list(titles)), f"a movie of {layout.movies}", where)
    repeated = table.duplicated(["user", "movie"]).to_numpy()
    if (row := first_true(repeated)) is not None:
        raise UserError(
            f"{where}: row {row + 1}: user '{users[row]}' has rated movie '{movies[row]}' twice"
        )


def _make_users(
    table: pd.DataFrame,
    titles: Mapping[str, str],
    min_rating: float,
    owners: Mapping[str, str] | None,
) -> Iterator[User]:
    """Yield the users with at least two movies in their histories, in natural order.

    Ratings at the same time remain in the order of the file.

    Args:
        table: All ratings.
        titles: Titles of the movies in the order of the catalog, keyed by movie.
        min_rating: Minimum rating of a movie in a history.
        owners: Name of the client of each user. If None, each user is a client.
    """
    index = {movie: i for i, movie in enumerate(titles)}
    indices = np.array([index[movie] for movie in table["movie"].cat.categories], np.int64)
    user = table["user"].cat.codes.to_numpy()
    # The sort is stable.
    order = np.lexsort((table["time"].to_numpy(), user))
    rated = indices[table["movie"].cat.codes.to_numpy()[order]]
    is_used = table["rating"].to_numpy()[order] >= min_rating
    codes = {name: code for code, name in enumerate(table["user"].cat.categories)}
    stops = np.bincount(user, minlength=len(codes)).cumsum()
    starts = np.concatenate([[0], stops[:-1]])
    for name in natural_order(codes):
        own = slice(starts[codes[name]], stops[codes[name]])
        if is_used[own].sum() > 1:
            owner = name if owners is None else owners[name]
            yield User(name, owner, rated[own], is_used[own])


def _find_layout(path: Path) -> Layout:
    found = [layout for layout in LAYOUTS if (path / layout.ratings).is_file()]
    names = [layout.ratings for layout in LAYOUTS]
    if len(found) != 1:
        present = " and ".join(layout.ratings for layout in found) or "none of them"
        raise UserError(f"path: {path}: expected one of {', '.join(names)}, got {present}")
    layout = found[0]
    if not (path / layout.movies).is_file():
        raise UserError(f"path: {path}: {layout.movies} not found, but {layout.ratings} exists")
    return layout


def _read_rows(file: Path, layout: Layout, header: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield the place and the columns of each nonblank line of a file of movies or users.

    Args:
        file: File to read.
        layout: Layout of the file.
        header: Expected first line. If empty, the file has no header.
    """
    lines = read_lines(file, encodings=layout.encodings)
    if header:
        _check_header(file, lines.pop(0)[1] if lines else "", header)
    for number, line in lines:
        place = f"path: {file}: line {number}"
        if layout.other_separator == ",":
            yield place, split_cells(line, place)
        else:
            yield place, [column.strip() for column in line.split(layout.other_separator)]


def _read_titles(file: Path, layout: Layout) -> dict[str, str]:
    """Return the title of each movie, keyed by its number."""
    titles: dict[str, str] = {}
    header = "movieId,title,genres" if layout.header else ""
    for place, row in _read_rows(file, layout, header):
        is_wrong = len(row) < 3 if layout.has_genre_columns else len(row) != 3
        if is_wrong or not row[0] or not row[1]:
            raise UserError(
                f"{place}: expected a movie, a title and genres, separated by "
                f"'{layout.other_separator}', got '{layout.other_separator.join(row)[:60]}'"
            )
        if row[0] in titles:
            raise UserError(f"{place}: movie '{row[0]}' occurs twice")
        titles[row[0]] = row[1]
    if len(titles) < 2:
        raise UserError(f"path: {file}: expected at least two movies, got {len(titles)}")
    return titles


def _read_regions(file: Path, layout: Layout) -> dict[str, str]:
    """Return the region of each user, keyed by the user's number."""
    regions: dict[str, str] = {}
    is_zip = not layout.users_header
    expected = (
        f"{layout.zip_column + 1} columns, a user and lastly a zip code"
        if is_zip
        else "a user and a region"
    )
    count = layout.zip_column + 1 if is_zip else 2
    for place, row in _read_rows(file, layout, layout.users_header):
        if len(row) != count or not row[0] or not row[-1]:
            raise UserError(
                f"{place}: expected {expected}, separated by '{layout.other_separator}', got "
                f"'{layout.other_separator.join(row)[:60]}'"
            )
        if row[0] in regions:
            raise UserError(f"{place}: user '{row[0]}' occurs twice")
        regions[row[0]] = _zip_region(row[-1]) if is_zip else row[-1]
    return regions


def _zip_region(code: str) -> str:
    first = code[0]
    return f"zip_{first}" if first.isascii() and first.isdigit() else OTHER


def _distinct(titles: dict[str, str]) -> tuple[str, ...]:
    """Return the titles, followed by the number of the movie if several movies have the title."""
    count = Counter(titles.values())
    return tuple(
        title if count[title] == 1 else f"{title} [{movie}]" for movie, title in titles.items()
    )
