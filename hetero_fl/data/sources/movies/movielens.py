"""Folders in the layouts of MovieLens: ratings, movies and users in text files."""

from __future__ import annotations

import contextlib
import csv
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hetero_fl.data.sources.benchmark_files.client_sets import check_folder
from hetero_fl.data.sources.movies.histories import Ratings, User
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
        users: File with the users and zip codes, or an empty string if the layout has no such file.
        separator: Separator of the columns in the file of ratings.
        other_separator: Separator of the columns in the other files.
        zip_column: Index of the column of zip codes.
        encodings: Encodings of the files, of which the first that fits is used.
        header: First line of the file of ratings, or an empty string if there is none.
    """

    ratings: str
    movies: str
    users: str
    separator: str
    other_separator: str
    zip_column: int = 4
    encodings: tuple[str, ...] = ("utf-8", "latin-1")
    header: str = ""


LAYOUTS = (
    Layout("u.data", "u.item", "u.user", "\t", "|"),
    Layout("ratings.dat", "movies.dat", "users.dat", "::", "::"),
    Layout(
        "ratings.csv",
        "movies.csv",
        "",
        ",",
        ",",
        encodings=("utf-8-sig",),
        header="userId,movieId,rating,timestamp",
    ),
)
"""Layouts of MovieLens 100K, of MovieLens 1M and 10M, and of MovieLens 20M, 25M, 32M and latest."""


def read_ratings(path: Path, group: str | None, min_rating: float) -> Ratings:
    """Read a folder in a layout of MovieLens.

    Args:
        path: Folder to read.
        group: `region` for the first digit of the zip code of a user, `user` for one group per
            user, or None for `region` if the folder has zip codes, otherwise `user`.
        min_rating: Ratings below this value are ignored.

    Returns:
        All movies, and the users with at least two ratings that are not ignored. The movies of a
        user are in the order of time, or of the file if the times are equal.

    Raises:
        UserError: If a file is missing or malformed.
    """
    check_folder(path)
    if group not in (None, "region", "user"):
        raise UserError(f"group: must be 'region' or 'user' for movies, got '{group}'")
    layout = _find_layout(path)
    titles = _read_titles(path / layout.movies, layout)
    has_users = layout.users != "" and (path / layout.users).is_file()
    if group == "region" and not has_users:
        wanted = f"{layout.users} not found" if layout.users else "this layout has no zip codes"
        raise UserError(f"group: 'region' needs zip codes, but {path}: {wanted}; set group=user")
    regions = _read_regions(path / layout.users, layout) if has_users else None
    index = {movie: i for i, movie in enumerate(titles)}
    found = _read_times(path / layout.ratings, layout, index, regions, min_rating)
    users = []
    for name in natural_order(found):
        owner = name if group == "user" or regions is None else regions[name]
        # The sort is stable, so ratings at the same time remain in the order of the file.
        movies = [movie for _, movie in sorted(found[name], key=lambda rating: rating[0])]
        if len(movies) > 1:
            users.append(User(name, owner, np.array(movies, np.int64)))
    where = f"path: {path / layout.ratings}"
    if not users:
        raise UserError(f"{where}: no user has two ratings of at least {min_rating:g}")
    return Ratings(_distinct(titles), tuple(users), where)


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


def _read_rows(
    file: Path, layout: Layout, separator: str, header: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """Yield the place and the columns of each nonblank line of a file.

    Args:
        file: File to read.
        layout: Layout, which determines the possible encodings.
        separator: Separator of the columns.
        header: Expected first line. If empty, the file has no header.
    """
    try:
        content = _decode(file.read_bytes(), layout.encodings)
    except UnicodeDecodeError as error:
        number = file.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(
            f"path: {file}: line {number}: not encoded in UTF-8; save the file as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"path: {file}: {error.strerror}") from error
    # Titles may contain characters that `str.splitlines` treats as the end of a line.
    lines = content.replace("\r\n", "\n").split("\n")
    if header and (first := lines[0].strip()) != header:
        raise UserError(f"path: {file}: line 1: expected '{header}', got '{first[:60]}'")
    for number, line in enumerate(lines, 1):
        if not line.strip() or (header and number == 1):
            continue
        place = f"path: {file}: line {number}"
        row = next(csv.reader([line])) if separator == "," else line.rstrip("\r").split(separator)
        yield place, [column.strip() for column in row]


def _decode(content: bytes, encodings: Sequence[str]) -> str:
    """Decode text with the first encoding that fits.

    Raises:
        UnicodeDecodeError: If no encoding fits.
    """
    *others, last = encodings
    for encoding in others:
        with contextlib.suppress(UnicodeDecodeError):
            return content.decode(encoding)
    return content.decode(last)


def _read_titles(file: Path, layout: Layout) -> dict[str, str]:
    """Return the title of each movie, keyed by its number."""
    titles: dict[str, str] = {}
    header = "movieId,title,genres" if layout.header else ""
    for place, row in _read_rows(file, layout, layout.other_separator, header):
        if len(row) < 3 or not row[0] or not row[1]:
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
    for place, row in _read_rows(file, layout, layout.other_separator):
        if len(row) != layout.zip_column + 1 or not row[0] or not row[-1]:
            raise UserError(
                f"{place}: expected {layout.zip_column + 1} columns, a user and lastly a zip code, "
                f"separated by '{layout.other_separator}', got "
                f"'{layout.other_separator.join(row)[:60]}'"
            )
        if row[0] in regions:
            raise UserError(f"{place}: user '{row[0]}' occurs twice")
        first = row[-1][0]
        is_digit = first.isascii() and first.isdigit()
        regions[row[0]] = f"zip_{first}" if is_digit else OTHER
    return regions


def _read_times(
    file: Path,
    layout: Layout,
    index: dict[str, int],
    regions: dict[str, str] | None,
    min_rating: float,
) -> dict[str, list[tuple[int, int]]]:
    """Return the time and the index of each rated movie, keyed by user."""
    found: dict[str, list[tuple[int, int]]] = {}
    seen: set[tuple[str, str]] = set()
    for place, row in _read_rows(file, layout, layout.separator, layout.header):
        if len(row) != 4:
            raise UserError(
                f"{place}: expected a user, a movie, a rating and a time, separated by "
                f"{layout.separator!r}, got {len(row)} columns"
            )
        user, movie, rating, time = row
        if movie not in index:
            raise UserError(
                f"{place}: movie '{movie}' not found in {layout.movies}"
                f"{suggest_similar(movie, index)}"
            )
        if not user or (regions is not None and user not in regions):
            raise UserError(f"{place}: user '{user}' not found in {layout.users or 'the ratings'}")
        if (user, movie) in seen:
            raise UserError(f"{place}: user '{user}' has rated movie '{movie}' twice")
        seen.add((user, movie))
        stars = _number(rating, float, f"{place}: rating", "a number")
        if not 0 <= stars <= MAX_RATING:
            raise UserError(f"{place}: rating: must be >= 0 and <= {MAX_RATING:g}, got {rating}")
        seconds = _number(time, int, f"{place}: time", "an integer")
        if stars >= min_rating:
            found.setdefault(user, []).append((int(seconds), index[movie]))
    return found


def _number(text: str, kind: Callable[[str], float], where: str, expected: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: expected {expected}, got '{text[:40]}'")
    return value


def _distinct(titles: dict[str, str]) -> tuple[str, ...]:
    """Return the titles, followed by the number of the movie if several movies have the title."""
    count = Counter(titles.values())
    return tuple(
        title if count[title] == 1 else f"{title} [{movie}]" for movie, title in titles.items()
    )
