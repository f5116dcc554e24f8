"""Folders in the layouts of MovieLens: ratings, movies and users in text files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hetero_fl.data.checks import first_true
from hetero_fl.data.sources.files import check_folder, read_lines, split_cells
from hetero_fl.data.sources.movies.histories import Ratings, User
from hetero_fl.data.sources.movies.rating_files import RatingFile, RatingTable
from hetero_fl.utils.errors import UserError, suggest_similar
from hetero_fl.utils.ordering import natural_order

MAX_RATING = 5.0
OTHER = "other"
"""Region of zip codes that do not start with a digit."""


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
    file = RatingFile(
        path / layout.ratings,
        layout.separator,
        layout.encodings,
        layout.header,
    )
    table = file.read()
    indices = _movie_indices(table, file, layout, titles)
    _check_ratings(table, file, layout, regions)
    owners = None if group == "user" else regions
    users = tuple(_make_users(table, indices, min_rating, owners))
    where = f"path: {path / layout.ratings}"
    if not users:
        raise UserError(f"{where}: no user has two ratings of at least {min_rating:g}")
    return Ratings(_distinct(titles), users, where)


def _movie_indices(
    table: RatingTable, file: RatingFile, layout: Layout, titles: dict[str, str]
) -> np.ndarray:
    """Return the index of each rated movie in the file of movies, int64 `[N]`."""
    index = {movie: i for i, movie in enumerate(titles)}
    codes = np.array([index.get(movie, -1) for movie in table.movies], np.int64)
    if (code := first_true(codes < 0)) is not None:
        movie = table.movies[code]
        line = int(table.line[(table.movie == code).argmax()])
        hint = suggest_similar(movie, index)
        file.fail(line, f"movie '{movie}' not found in {layout.movies}{hint}")
    return codes[table.movie]


def _check_ratings(
    table: RatingTable, file: RatingFile, layout: Layout, regions: dict[str, str] | None
) -> None:
    """Check users, stars and that no user has rated a movie twice."""
    for code, user in enumerate(table.users):
        problem = ""
        if not user:
            problem = "user: expected a name, got ''"
        elif '"' in user:
            problem = f"user: expected a name without quotes, got '{user}'"
        elif regions is not None and user not in regions:
            problem = f"user '{user}' not found in {layout.users}"
        if problem:
            file.fail(int(table.line[(table.user == code).argmax()]), problem)
    if (row := first_true((table.stars < 0) | (table.stars > MAX_RATING))) is not None:
        line = int(table.line[row])
        file.fail(line, f"rating: must be >= 0 and <= {MAX_RATING:g}, got {table.stars[row]:g}")
    pairs = table.user.astype(np.int64) * len(table.movies) + table.movie
    order = pairs.argsort(kind="stable")
    repeated = order[1:][pairs[order[1:]] == pairs[order[:-1]]]
    if len(repeated):
        row = int(repeated.min())
        user = table.users[table.user[row]]
        movie = table.movies[table.movie[row]]
        file.fail(int(table.line[row]), f"user '{user}' has rated movie '{movie}' twice")


def _make_users(
    table: RatingTable, indices: np.ndarray, min_rating: float, owners: Mapping[str, str] | None
) -> Iterator[User]:
    """Yield the users with at least two movies in their histories, in natural order.

    Ratings at the same time remain in the order of the file.

    Args:
        table: All ratings.
        indices: Index of the movie of each rating.
        min_rating: Minimum rating of a movie in a history.
        owners: Name of the client of each user. If None, each user is a client.
    """
    # The sort is stable.
    order = np.lexsort((table.time, table.user))
    rated = indices[order]
    is_used = table.stars[order] >= min_rating
    stops = np.bincount(table.user, minlength=len(table.users)).cumsum()
    starts = np.concatenate([[0], stops[:-1]])
    codes = {name: code for code, name in enumerate(table.users)}
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
        first = lines.pop(0)[1].strip() if lines else ""
        if first != header:
            raise UserError(f"path: {file}: line 1: expected '{header}', got '{first[:60]}'")
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
