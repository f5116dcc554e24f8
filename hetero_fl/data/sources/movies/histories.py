"""Histories of movies as examples of next-movie prediction, and the roles of users and movies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from hetero_fl.config.data import MoviesConfig
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import EMPTY, FIRST, Dataset, Examples, Vocabulary
from hetero_fl.data.partition.groups import largest_groups
from hetero_fl.utils.arrays import index_names
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import natural_key
from hetero_fl.utils.seeding import keyed_numpy_generator
from hetero_fl.utils.text import pluralize

UNKNOWN_USER = 0
"""Number of a user who does not train, in the first column of the examples."""


@dataclass(frozen=True, eq=False)
class User:
    """A user and the movies that the user has rated.

    Attributes:
        name: Name of the user.
        group: Name of the client of the user.
        rated: Indices of the movies in the catalog, in chronological order, int64 `[M]`.
        is_used: Whether a movie is part of histories and predicted, bool `[M]`. The others have low
            ratings, and are only known as movies that the user has rated.
    """

    name: str
    group: str
    rated: np.ndarray
    is_used: np.ndarray

    @property
    def movies(self) -> np.ndarray:
        """Movies of histories in chronological order."""
        return self.rated[self.is_used]


@dataclass(frozen=True)
class Ratings:
    """A catalog of movies and the users who have rated them.

    Attributes:
        titles: Titles of all movies, which are distinct.
        users: The users.
        where: Place of the ratings, for error messages.
    """

    titles: tuple[str, ...]
    users: tuple[User, ...]
    where: str

    @property
    def vocabulary(self) -> Vocabulary:
        """Vocabulary whose words are the titles."""
        return Vocabulary(self.titles)

    @property
    def task(self) -> Task:
        """Task of predicting the next movie."""
        return Task("multiclass", len(self.titles), self.titles, is_ranking=True)


def assign_roles(users: Sequence[User], settings: MoviesConfig) -> dict[str, list[User]]:
    """Assign each user to one role, at random but the same for the same seed.

    Args:
        users: All users.
        settings: Shares of the users that do not train, and the seed.

    Returns:
        Users in natural order, keyed by "public", "validation", "test" and "train".
    """
    ordered = sorted(users, key=lambda user: natural_key(user.name))
    order = keyed_numpy_generator("data", "movies", settings.seed, "roles").permutation(
        len(ordered)
    )
    found: dict[str, list[User]] = {}
    start = 0
    for role, share in (
        ("public", settings.public_users),
        ("validation", settings.validation_users),
        ("test", settings.test_users),
    ):
        count = max(1, round(share * len(ordered))) if share else 0
        found[role] = [ordered[i] for i in sorted(order[start : start + count])]
        start += count
    found["train"] = [ordered[i] for i in sorted(order[start:])]
    return found


def make_dataset(name: str, ratings: Ratings, settings: MoviesConfig, about: str) -> Dataset:
    """Create a data set from the ratings of users.

    The movies of a user who trains are divided in chronological order: training movies, then
    `validation_movies` and `test_movies`, which belong to the user's group. If fewer
    than three movies are left for training, the user has training movies only. The global sets
    contain the last movies of users who do not train, whose number is 0.

    The rankings of held-out movies leave out the movies that the user has rated before, and are
    compared with the popularity of the movies among the public users, if there are any.

    Args:
        name: Name of the data set.
        ratings: The ratings.
        settings: Movie settings.
        about: Short description.

    Raises:
        UserError: If there are too few users, or more users than tokens.
    """
    roles = assign_roles(ratings.users, settings)
    training = _select_groups(roles["train"], settings)
    numbers = _number_users(training, ratings)
    rows: dict[str, list[_Rows]] = {"train": [], "validation": [], "test": []}
    for user, number in zip(training, numbers, strict=True):
        for split, positions in _split_positions(user, settings).items():
            rows[split].append(_Rows(user, number, positions))
    common = {
        split: [_Rows(user, UNKNOWN_USER, _last_movies(user, count)) for user in roles[split]]
        for split, count in (
            ("validation", settings.validation_movies),
            ("test", settings.test_movies),
        )
    }
    popularity = _popularity(roles["public"], ratings)
    train = _make_examples(rows["train"], settings)
    group_names = _with_owners(train, rows["train"])
    local_sets = {}
    for split in ("validation", "test"):
        local_sets[split] = _make_held_out(rows[split], ratings, settings, popularity)
        _with_owners(local_sets[split], rows[split])
    return Dataset(
        name,
        ratings.task,
        train,
        _make_held_out(common["validation"], ratings, settings, popularity),
        _make_held_out(common["test"], ratings, settings, popularity),
        about=f"{about}; {pluralize(len(training), 'user')} in {len(group_names)} groups train",
        vocabulary=ratings.vocabulary,
        local_sets={split: part for split, part in local_sets.items() if len(part)},
    )


def make_public_dataset(name: str, ratings: Ratings, settings: MoviesConfig, about: str) -> Dataset:
    """Create a data set of the public users, whose number is 0, for use as a proxy set.

    Args:
        name: Name of the data set.
        ratings: The ratings.
        settings: Movie settings.
        about: Short description.

    Raises:
        UserError: If there are no public users.
    """
    if not settings.public_users:
        raise UserError("movies.public_users: must be > 0 for a proxy set, got 0")
    users = assign_roles(ratings.users, settings)["public"]
    rows = [_Rows(user, UNKNOWN_USER, range(1, len(user.movies))) for user in users]
    train = _make_examples(rows, settings)
    return Dataset(name, ratings.task, train, about=about, vocabulary=ratings.vocabulary)


@dataclass(frozen=True)
class _Rows:
    """The movies of a user that are predicted, as positions in the user's movies."""

    user: User
    number: int
    positions: range


def _split_positions(user: User, settings: MoviesConfig) -> dict[str, range]:
    count = len(user.movies)
    test = count - settings.test_movies
    validation = test - settings.validation_movies
    if validation < 3:
        return {"train": range(1, count), "validation": range(0), "test": range(0)}
    return {
        "train": range(1, validation),
        "validation": range(validation, test),
        "test": range(test, count),
    }


def _last_movies(user: User, count: int) -> range:
    return range(max(1, len(user.movies) - count), len(user.movies))


def _make_examples(rows: Sequence[_Rows], settings: MoviesConfig) -> Examples:
    """Return the examples of rows, without columns for rankings."""
    total = sum(len(each.positions) for each in rows)
    x = np.zeros((total, 1 + settings.length), np.int64)
    y = np.zeros(total, np.int64)
    padding = np.full(settings.length, EMPTY)
    stop = 0
    for each in rows:
        start = stop
        stop += len(each.positions)
        positions = slice(each.positions.start, each.positions.stop)
        # Window i contains the movies before movie i.
        tokens = np.concatenate([padding, FIRST + each.user.movies])
        x[start:stop, 0] = each.number
        x[start:stop, 1:] = sliding_window_view(tokens, settings.length)[positions]
        y[start:stop] = each.user.movies[positions]
    return Examples(torch.from_numpy(x), torch.from_numpy(y))


def _make_held_out(
    rows: Sequence[_Rows], ratings: Ratings, settings: MoviesConfig, popularity: np.ndarray | None
) -> Examples:
    """Return the examples of rows with the columns for rankings."""
    found = _make_examples(rows, settings)
    num_movies = len(ratings.titles)
    excluded = np.zeros((len(found), -(-num_movies // 8)), np.uint8)
    stop = 0
    for each in rows:
        if each.positions:
            start = stop
            stop += len(each.positions)
            excluded[start:stop] = _seen_before(each, num_movies)
    found.excluded = torch.from_numpy(excluded)
    if popularity is not None:
        # All rows are one row in memory.
        outputs = torch.from_numpy(popularity).expand(len(found), num_movies)
        found.baselines = {"popularity": outputs}
    return found


def _seen_before(rows: _Rows, num_movies: int) -> np.ndarray:
    """Return the movies that a user has rated before each position.

    Returns:
        Bits of the movies, uint8 `[positions, ceil(movies / 8)]`.
    """
    seen = np.zeros((len(rows.positions), num_movies), bool)
    places = np.flatnonzero(rows.user.is_used)
    for row, place in enumerate(places[rows.positions]):
        seen[row, rows.user.rated[:place]] = True
    return np.packbits(seen, axis=1)


def _popularity(users: Sequence[User], ratings: Ratings) -> np.ndarray | None:
    """Return the logarithms of the shares of movies among the ratings of users, float32 `[movies]`.

    Each movie has one rating more, so that no share is 0. The result is None if there are no users.
    """
    if not users:
        return None
    movies = np.concatenate([user.movies for user in users])
    counts = 1 + np.bincount(movies, minlength=len(ratings.titles))
    return np.log(counts / counts.sum()).astype(np.float32)


def _with_owners(examples: Examples, rows: Sequence[_Rows]) -> tuple[str, ...]:
    """Set the groups and users of examples in place, and return the names of the groups.

    Partitions do not divide the examples of a user, which are stored as those of a patient.
    """
    used = [each for each in rows if each.positions]
    counts = torch.tensor([len(each.positions) for each in used], dtype=torch.int64)
    group, examples.group_names = index_names(each.user.group for each in used)
    patient, examples.patient_names = index_names(each.user.name for each in used)
    examples.group = group.repeat_interleave(counts)
    examples.patient = patient.repeat_interleave(counts)
    return examples.group_names


def _select_groups(users: Sequence[User], settings: MoviesConfig) -> list[User]:
    """Return the users of the groups with the most movies."""
    totals: Counter[str] = Counter()
    for user in users:
        totals[user.group] += len(user.movies)
    kept = largest_groups(totals, settings.groups, "movies.groups", "groups with users to train on")
    return [user for user in users if user.group in kept]


def _number_users(users: Sequence[User], ratings: Ratings) -> list[int]:
    """Return the number of each user, which is a token and starts at 1.

    All users are numbered in order. If there are more users than tokens, the users of each group
    are numbered.
    """
    if not users:
        raise UserError(f"{ratings.where}: no user is left for training; choose smaller shares")
    most = ratings.vocabulary.size - 1
    if len(users) <= most:
        return list(range(1, len(users) + 1))
    counts: Counter[str] = Counter()
    numbers = []
    for user in users:
        counts[user.group] += 1
        numbers.append(counts[user.group])
    group, count = counts.most_common(1)[0]
    if count > most:
        raise UserError(
            f"{ratings.where}: group '{group}' has {count:,} users to train on, but a model for "
            f"{pluralize(len(ratings.titles), 'movie')} has vectors of at most {most:,} users; "
            "divide the group, or set group=user"
        )
    return numbers
