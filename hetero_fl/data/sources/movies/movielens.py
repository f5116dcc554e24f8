"""Sources of movies: folders in the layouts of MovieLens, and a download."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hetero_fl.config.data import MoviesConfig, SourceConfig
from hetero_fl.data.checks import first_true
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.files import (
    EMBEDDED,
    check_folder,
    download_archive,
    read_lines,
    split_cells,
)
from hetero_fl.data.sources.movies.histories import (
    Ratings,
    User,
    make_dataset,
    make_public_dataset,
)
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.ordering import natural_order

URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
MD5 = "0e33842e24a9c977be4e0107933c0723"
FOLDER = "ml-100k"


@register_source(
    "movies",
    keys=("path", "group", "movies"),
    default_path=EMBEDDED / "movies",
    folder_files=("u.data", "ratings.dat", "ratings.csv"),
)
def movies(config: SourceConfig, _root: Path) -> Dataset:
    """Read the movies of users from a folder (see `read_ratings`).

    The simulated folder has 720 users in six regions (groups).
    """
    return _read_movies("movies", Path(str(config.path)), config)


@register_source("movies_public", keys=("path", "movies"), default_path=EMBEDDED / "movies")
def movies_public(config: SourceConfig, _root: Path) -> Dataset:
    """Read the movies of the public users, for use as a proxy set."""
    return _read_movies("movies_public", Path(str(config.path)), config, public=True)


@register_source("movielens_100k", keys=("group", "movies"))
def movielens_100k(config: SourceConfig, root: Path) -> Dataset:
    """Download MovieLens 100K (Harper & Konstan 2015), with 943 users and 1,682 movies.

    The license permits research, but neither commercial use nor redistribution.
    """
    return _read_movies("movielens_100k", _download(root), config)


@register_source("movielens_100k_public", keys=("movies",))
def movielens_100k_public(config: SourceConfig, root: Path) -> Dataset:
    """Download MovieLens 100K, and return its public users, for use as a proxy set."""
    return _read_movies("movielens_100k_public", _download(root), config, public=True)


def _read_movies(name: str, path: Path, config: SourceConfig, *, public: bool = False) -> Dataset:
    """Read a folder in a layout of MovieLens as a data set of next-movie prediction.

    The groups are regions or users (see `read_ratings`).

    Args:
        name: Name of the data set.
        path: Folder to read.
        config: Source configuration.
        public: Whether to read the movies of the public users, who have no groups, instead of those
            of the other users.
    """
    path = path.expanduser()
    settings = config.movies or MoviesConfig()
    ratings = read_ratings(path, config.group, settings.min_rating)
    count = sum(len(user.movies) for user in ratings.users)
    about = (
        f"{count:,} ratings of {len(ratings.titles):,} movies by {len(ratings.users):,} users in "
        f"{path.name}"
    )
    make = make_public_dataset if public else make_dataset
    return make(name, ratings, settings, about)


def _download(root: Path) -> Path:
    """Return the folder of MovieLens 100K, which is downloaded on first use."""
    return download_archive(
        "movielens_100k",
        URL,
        MD5,
        root / FOLDER,
        inner=FOLDER,
        advice="set data.name=movies and data.path to a local folder",
    )


MAX_RATING = 5.0
ZIP_COLUMNS = 5
"""Number of columns of a file of users, the last of which is the zip code."""
OTHER = "other"
"""Region of zip codes that do not start with a digit."""
ROW = np.dtype([("user", np.int64), ("movie", np.int64), ("rating", float), ("time", float)])
"""A row of a file of ratings, with the indices of the user and of the movie in the catalog."""


@dataclass(frozen=True)
class Layout:
    """The files of a MovieLens data set.

    Attributes:
        ratings: File with the columns user, movie, rating and time.
        movies: File whose first two columns are the movie and its title.
        users: File with the users and zip codes, or regions. It may be missing.
        separator: Separator of the columns in the file of ratings.
        other_separator: Separator of the columns in the other files.
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
        columns = layout.users_header or f"{ZIP_COLUMNS} columns, the last a zip code"
        raise UserError(
            f"group: 'region' needs {layout.users} ({columns}), which {path} does not contain; "
            "add the file, or set group=user"
        )
    regions = _read_regions(path / layout.users, layout) if has_users else None
    file = path / layout.ratings
    where = f"path: {file}"
    names: dict[str, int] = {}
    rows = np.fromiter(_read_ratings(file, layout, tuple(titles), regions, names), ROW)
    pairs = rows["user"] * len(titles) + rows["movie"]
    repeated = np.ones(len(rows), bool)
    repeated[np.unique(pairs, return_index=True)[1]] = False
    if (row := first_true(repeated)) is not None:
        user = tuple(names)[rows["user"][row]]
        movie = tuple(titles)[rows["movie"][row]]
        raise UserError(f"{where}: row {row + 1}: user '{user}' has rated movie '{movie}' twice")
    users = tuple(_make_users(rows, names, min_rating, None if group == "user" else regions))
    if not users:
        raise UserError(f"{where}: no user has two ratings of at least {min_rating:g}")
    return Ratings(_distinct(titles), users, where)


def _read_ratings(
    file: Path,
    layout: Layout,
    movies: Sequence[str],
    regions: Mapping[str, str] | None,
    names: dict[str, int],
) -> Iterator[tuple[int, int, float, float]]:
    """Yield the rows of a file of ratings, which has up to 33 million rows.

    Args:
        file: File to read.
        layout: Layout of the file.
        movies: The movies of the catalog.
        regions: Region of each user. If None, users are not listed in another file.
        names: Dictionary to which the index of each user is added.

    Yields:
        The fields of `ROW`.

    Raises:
        UserError: If a row is malformed, or a user or movie is unknown.
    """
    where = f"path: {file}"
    index = {movie: i for i, movie in enumerate(movies)}
    for row, (user, movie, rating, time) in enumerate(_rating_rows(file, layout), 1):
        stars = _parse_number(rating)
        seconds = _parse_number(time)
        if not user:
            raise _cell_error(where, row, "user", "a name", user)
        if regions is not None and user not in regions:
            raise _cell_error(where, row, "user", f"a user of {layout.users}", user)
        if movie not in index:
            raise _cell_error(where, row, "movie", f"a movie of {layout.movies}", movie)
        if not 0 <= stars <= MAX_RATING:
            expected = f"a number from 0 to {MAX_RATING:g}"
            raise _cell_error(where, row, "rating", expected, rating)
        if not seconds.is_integer():
            raise _cell_error(where, row, "time", "an integer", time)
        yield names.setdefault(user, len(names)), index[movie], stars, seconds


def _rating_rows(file: Path, layout: Layout) -> Iterator[list[str]]:
    """Yield the cells of each nonblank row of a file of ratings.

    Raises:
        UserError: If the file cannot be read, or a row has too few or too many cells.
    """
    where = f"path: {file}"
    expected = f"expected a user, a movie, a rating and a time, separated by {layout.separator!r}"
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            lines: Iterator[str] = opened
            if layout.header:
                _check_header(file, next(lines, ""), layout.header)
            delimiter = layout.separator
            if len(delimiter) > 1:
                # The csv module splits at one character.
                lines = (line.replace(layout.separator, "\t") for line in opened)
                delimiter = "\t"
            cells = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
            for row, found in enumerate(filter(None, cells), 1):
                if len(found) != 4:
                    text = one_line(layout.separator.join(found), 60)
                    raise UserError(f"{where}: row {row}: {expected}, got '{text}'")
                yield found
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not encoded in UTF-8; save the file as UTF-8") from error
    except (csv.Error, OSError) as error:
        raise UserError(f"{where}: {expected} ({one_line(str(error), 200)})") from error


def _check_header(file: Path, line: str, header: str) -> None:
    if line.strip() != header:
        raise UserError(f"path: {file}: line 1: expected '{header}', got '{one_line(line, 60)}'")


def _parse_number(cell: str) -> float:
    """Return the number in a cell, or NaN."""
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _cell_error(where: str, row: int, column: str, expected: str, cell: str) -> UserError:
    found = f"'{one_line(cell, 40)}'" if cell else "nothing"
    return UserError(f"{where}: row {row}, column '{column}': expected {expected}, got {found}")


def _make_users(
    rows: np.ndarray,
    names: Mapping[str, int],
    min_rating: float,
    owners: Mapping[str, str] | None,
) -> Iterator[User]:
    """Yield the users with at least two movies in their histories, in natural order.

    Ratings at the same time remain in the order of the file.

    Args:
        rows: All ratings, as `ROW` `[N]`.
        names: Index of each user.
        min_rating: Minimum rating of a movie in a history.
        owners: Name of the client of each user. If None, each user is a client.
    """
    # The sort is stable.
    order = np.lexsort((rows["time"], rows["user"]))
    rated = rows["movie"][order]
    is_used = rows["rating"][order] >= min_rating
    stops = np.bincount(rows["user"], minlength=len(names)).cumsum()
    starts = np.concatenate([[0], stops[:-1]])
    for name in natural_order(names):
        own = slice(starts[names[name]], stops[names[name]])
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
        f"{ZIP_COLUMNS} columns, a user and lastly a zip code" if is_zip else "a user and a region"
    )
    count = ZIP_COLUMNS if is_zip else 2
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
