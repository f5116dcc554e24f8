"""Folders in the layouts of MovieLens: ratings, movies and users in text files.

A file of ratings has up to 33 million lines, so that an object for each rating would need several
gigabytes. It is read in blocks of bytes into arrays, and names of users and movies are stored once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from hetero_fl.data.checks import first_true
from hetero_fl.data.sources.files import MARK, check_folder, decode, read_lines, split_cells
from hetero_fl.data.sources.movies.histories import Ratings, User
from hetero_fl.utils.errors import UserError, one_line, suggest_similar
from hetero_fl.utils.ordering import natural_order

MAX_RATING = 5.0
OTHER = "other"
"""Region of zip codes that do not start with a digit."""
BLOCK = 1 << 23
"""Number of bytes that are read at once."""
MAX_WIDTH = 64
"""Maximum number of bytes of a column."""
COLUMNS = ("user", "movie", "rating", "time")
SPACES = np.frombuffer(b" \t\r\n\v\f", np.uint8)
QUOTE = ord('"')


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


@dataclass(frozen=True, eq=False)
class RatingTable:
    """The ratings of a file, in the order of the file.

    Attributes:
        users: Names of the users, in the order of their first ratings.
        movies: Names of the movies, in the order of their first ratings.
        user: Index into `users` of each rating, int32 `[N]`.
        movie: Index into `movies` of each rating, int32 `[N]`.
        stars: Number of stars of each rating, float64 `[N]`.
        time: Time of each rating, int64 `[N]`.
        line: Line of each rating in the file, int32 `[N]`.
    """

    users: tuple[str, ...]
    movies: tuple[str, ...]
    user: np.ndarray
    movie: np.ndarray
    stars: np.ndarray
    time: np.ndarray
    line: np.ndarray


class RatingFile:
    """A file whose lines contain a user, a movie, a rating and a time.

    Args:
        path: The file.
        separator: Separator of the columns, one character or the same character twice.
        encodings: Possible encodings of a name, of which the first that fits is used.
        header: Expected first line. If empty, the file has no header.
    """

    def __init__(self, path: Path, separator: str, encodings: Sequence[str], header: str) -> None:
        self.path = path
        self.separator = separator
        self.encodings = encodings
        self.header = header

    def read(self) -> RatingTable:
        """Read the file.

        Raises:
            UserError: If the file cannot be read or a line is malformed.
        """
        names: tuple[dict[str, int], dict[str, int]] = ({}, {})
        parts: list[tuple[np.ndarray, ...]] = [_no_ratings()]
        try:
            for block, first_line in self._blocks():
                parts.append(self._read_block(block, first_line, names))
        except OSError as error:
            raise UserError(f"path: {self.path}: {error.strerror}") from error
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        return RatingTable(tuple(names[0]), tuple(names[1]), *columns)

    def fail(self, line: int, reason: str) -> NoReturn:
        """Raise UserError for a line of the file."""
        raise UserError(f"path: {self.path}: line {line}: {reason}")

    def _blocks(self) -> Iterator[tuple[bytes, int]]:
        """Yield whole lines, and the number of the first of them."""
        with open(self.path, "rb") as file:
            if file.read(len(MARK)) != MARK:
                file.seek(0)
            line = 1
            if self.header:
                first = file.readline().decode("latin-1").strip()
                if first != self.header:
                    self.fail(1, f"expected '{self.header}', got '{one_line(first, 60)}'")
                line = 2
            while lines := file.readlines(BLOCK):
                yield b"".join(lines).removesuffix(b"\n") + b"\n", line
                line += len(lines)

    def _read_block(
        self, block: bytes, first_line: int, names: tuple[dict[str, int], dict[str, int]]
    ) -> tuple[np.ndarray, ...]:
        data = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(data == ord("\n"))
        starts = np.concatenate([[0], ends[:-1] + 1])
        length = np.concatenate([[0], np.cumsum(~np.isin(data, SPACES), dtype=np.int32)])
        used = length[ends] > length[starts]
        line = first_line + np.flatnonzero(used)
        starts = starts[used]
        ends = ends[used]
        inner = self._separators(data, starts, ends, line)
        width = len(self.separator)
        begins = [starts, *(inner[:, i] + width for i in range(3))]
        fields = [
            _trimmed(data, begin, end, has_quotes=self.separator == ",")
            for begin, end in zip(begins, [*inner.T, ends], strict=True)
        ]
        for name, (begin, end) in zip(COLUMNS, fields, strict=True):
            if (row := first_true(end - begin > MAX_WIDTH)) is not None:
                self.fail(line[row], f"{name}: must have at most {MAX_WIDTH} bytes")
        return (
            self._codes(data, fields[0], line, names[0]),
            self._codes(data, fields[1], line, names[1]),
            self._stars(data, fields[2], line),
            self._times(data, fields[3], line),
            line.astype(np.int32),
        )

    def _separators(
        self, data: np.ndarray, starts: np.ndarray, ends: np.ndarray, line: np.ndarray
    ) -> np.ndarray:
        """Return the positions of the three separators of each line, `[lines, 3]`."""
        width = len(self.separator)
        found = np.flatnonzero(data == ord(self.separator[0]))
        row = np.searchsorted(ends, found)
        # Blank lines may contain separators that are spaces.
        inside = row < len(ends)
        inside[inside] = found[inside] >= starts[row[inside]]
        found = found[inside]
        is_wrong = np.bincount(row[inside], minlength=len(ends)) != 3 * width
        if not is_wrong.any():
            pairs = found.reshape(-1, 3, width)
            is_wrong = (pairs[:, :, -1] - pairs[:, :, 0] != width - 1).any(1)
        if (wrong := first_true(is_wrong)) is not None:
            text = data[starts[wrong] : ends[wrong]].tobytes().decode("latin-1")
            self.fail(
                line[wrong],
                "expected a user, a movie, a rating and a time, separated by "
                f"{self.separator!r}, got {len(text.split(self.separator))} columns",
            )
        return found.reshape(-1, 3, width)[:, :, 0]

    def _codes(
        self,
        data: np.ndarray,
        field: tuple[np.ndarray, np.ndarray],
        line: np.ndarray,
        names: dict[str, int],
    ) -> np.ndarray:
        """Return the index of each name in `names`, to which new names are added."""
        texts, inverse = _distinct_texts(data, field)
        codes = []
        for i, text in enumerate(texts):
            try:
                name = decode(text, self.encodings)
            except UnicodeDecodeError:
                row = int((inverse == i).argmax())
                self.fail(line[row], "not encoded in UTF-8; save the file as UTF-8")
            codes.append(names.setdefault(name, len(names)))
        return np.array(codes, np.int32)[inverse]

    def _stars(
        self, data: np.ndarray, field: tuple[np.ndarray, np.ndarray], line: np.ndarray
    ) -> np.ndarray:
        texts, inverse = _distinct_texts(data, field)
        values = np.full(len(texts), np.nan)
        for i, text in enumerate(texts):
            try:
                values[i] = float(text)
            except ValueError:
                continue
        found = values[inverse]
        self._check(np.isfinite(found), "rating: expected a number", data, field, line)
        return found

    def _times(
        self, data: np.ndarray, field: tuple[np.ndarray, np.ndarray], line: np.ndarray
    ) -> np.ndarray:
        start, end = field
        is_negative = data[start] == ord("-")
        start = start + is_negative
        width = end - start
        # Larger numbers do not fit into 64 bits.
        valid = (width > 0) & (width <= 18)
        found = np.zeros(len(start), np.int64)
        for i in range(int(width[valid].max(initial=0))):
            used = i < width
            digit = data[np.where(used, start + i, 0)].astype(np.int64) - ord("0")
            valid &= ~used | ((digit >= 0) & (digit <= 9))
            found = np.where(used, 10 * found + digit, found)
        self._check(valid, "time: expected an integer", data, field, line)
        return np.where(is_negative, -found, found)

    def _check(
        self,
        valid: np.ndarray,
        expected: str,
        data: np.ndarray,
        field: tuple[np.ndarray, np.ndarray],
        line: np.ndarray,
    ) -> None:
        """Raise UserError for the first value that is not valid."""
        if (row := first_true(~valid)) is not None:
            text = data[field[0][row] : field[1][row]].tobytes().decode("utf-8", "replace")
            self.fail(line[row], f"{expected}, got '{one_line(text, 40)}'")


def _no_ratings() -> tuple[np.ndarray, ...]:
    return tuple(
        np.empty(0, dtype) for dtype in (np.int32, np.int32, np.float64, np.int64, np.int32)
    )


def _trimmed(
    data: np.ndarray, start: np.ndarray, end: np.ndarray, has_quotes: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the range of each field without spaces around it, and without quotes."""
    while (spaces := (start < end) & np.isin(data[start], SPACES)).any():
        start = start + spaces
    while (spaces := (start < end) & np.isin(data[end - 1], SPACES)).any():
        end = end - spaces
    if has_quotes:
        quoted = (end - start > 1) & (data[start] == QUOTE) & (data[end - 1] == QUOTE)
        start = start + quoted
        end = end - quoted
    return start, end


def _distinct_texts(
    data: np.ndarray, field: tuple[np.ndarray, np.ndarray]
) -> tuple[list[bytes], np.ndarray]:
    """Return the distinct values of a field, and the index of the value of each row."""
    start, end = field
    width = int((end - start).max(initial=0))
    # Numbers are faster to sort than texts.
    stored = 8 if width <= 8 else width
    characters = np.zeros((len(start), stored), np.uint8)
    for i in range(width):
        used = start + i < end
        characters[:, i] = np.where(used, data[np.where(used, start + i, 0)], 0)
    values = characters.view(np.uint64 if stored == 8 else f"S{stored}")[:, 0]
    distinct, inverse = np.unique(values, return_inverse=True)
    return distinct.view(f"S{stored}").tolist(), inverse
