"""Files of ratings, read in blocks of bytes into arrays.

A file of MovieLens has up to 33 million lines, so that an object for each rating would need several
gigabytes. Names of users and movies are stored once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from hetero_fl.data.checks import first_true
from hetero_fl.data.sources.files import MARK, decode
from hetero_fl.utils.errors import UserError, one_line

BLOCK = 1 << 23
"""Number of bytes that are read at once."""
MAX_WIDTH = 64
"""Maximum number of bytes of a column."""
COLUMNS = ("user", "movie", "rating", "time")
SPACES = np.frombuffer(b" \t\r\n\v\f", np.uint8)
QUOTE = ord('"')


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
