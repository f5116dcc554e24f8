"""Histories of movies: folders in the layouts of MovieLens, and a download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hetero_fl.config.data import MoviesConfig
from hetero_fl.data import Dataset
from hetero_fl.data.sources.files import EMBEDDED
from hetero_fl.data.sources.movies import read_ratings
from hetero_fl.data.sources.movies.histories import Ratings, User, assign_roles, make_dataset
from tests.support.federated_data import read_source
from tests.support.mistakes import check_broken_folders, check_refused
from tests.support.movielens_folders import write_movielens_folder


def simulated_ratings() -> Ratings:
    return read_ratings(EMBEDDED / "movies", None, 0.0)


def load(
    path: Path | None = None,
    name: str = "movies",
    root: Path | None = None,
    group: str | None = None,
    **keys: Any,
) -> Dataset:
    return read_source(name, path, root, group=group, movies=keys or None)


def make_user(number: int, movies: Sequence[int]) -> User:
    return User(str(number), "here", np.array(movies), np.ones(len(movies), bool))


def rows_of(dataset: Dataset) -> dict[str, torch.Tensor]:
    return {
        "train": dataset.train.x,
        **{name: part.x for name, part in dataset.local_sets.items()},
    }


def test_movies_of_a_user_are_divided_in_time(tmp_path: Path) -> None:
    users = tuple(make_user(i, range(i, i + 8)) for i in range(10))
    ratings = Ratings(tuple(f"m{i}" for i in range(20)), users, "path: x")
    settings = MoviesConfig(length=3, validation_movies=1, test_movies=2, public_users=0)

    dataset = make_dataset("movies", ratings, settings, "")

    first = assign_roles(users, settings)["train"][0].movies.tolist()
    mine = {name: x[x[:, 0] == 1].tolist() for name, x in rows_of(dataset).items()}
    # Tokens are the indices of the movies plus 2; the first token is the number of the user.
    assert mine["train"] == [
        [1, 0, 0, first[0] + 2],
        [1, 0, first[0] + 2, first[1] + 2],
        [1, *(m + 2 for m in first[0:3])],
        [1, *(m + 2 for m in first[1:4])],
    ]
    assert mine["validation"] == [[1, *(m + 2 for m in first[2:5])]]
    assert mine["test"] == [[1, *(m + 2 for m in first[k : k + 3])] for k in (3, 4)]
    labels = dataset.train.labels[dataset.train.x[:, 0] == 1].tolist()
    assert labels == first[1:5]
    assert dataset.test is not None and bool((dataset.test.x[:, 0] == 0).all())
    assert len(dataset.test) == 2 * len(assign_roles(users, settings)["test"])


def test_roles_are_disjoint_and_public_users_are_in_the_public_source_only(tmp_path: Path) -> None:
    folder = write_movielens_folder(tmp_path)
    ratings = read_ratings(folder, None, 0.0)
    roles = assign_roles(ratings.users, MoviesConfig())
    names = [user.name for users in roles.values() for user in users]
    assert sorted(names) == sorted(user.name for user in ratings.users)
    assert [len(roles[role]) for role in ("public", "validation", "test")] == [2, 1, 4]

    public = load(folder, "movies_public")

    assert len(public.train) == 2 * 11 and not bool(public.train.x[:, 0].any())
    assert public.vocabulary == load(folder).vocabulary
    check_refused(
        r"public_users: must be > 0 for a proxy set, got 0",
        load,
        folder,
        "movies_public",
        public_users=0,
    )


def test_movies_seen_before_are_excluded() -> None:
    dataset = load()
    movies_of = {user.name: user.movies.tolist() for user in simulated_ratings().users}

    for part in (dataset.local_sets["validation"], dataset.local_sets["test"]):
        assert part.excluded is not None and part.patient is not None
        for row in range(0, len(part), 5):
            bits = "".join(f"{byte:08b}" for byte in part.excluded[row].tolist())
            found = {movie for movie in range(200) if bits[movie] == "1"}
            movies = movies_of[part.patient_names[int(part.patient[row])]]
            assert found == set(movies[: movies.index(int(part.labels[row]))])
    test = dataset.test
    assert test is not None and test.excluded is not None and dataset.train.excluded is None
    seen = torch.from_numpy(np.unpackbits(test.excluded.numpy(), axis=1))
    # The histories in x have ten movies, which are part of the movies seen before.
    assert bool(seen.gather(1, test.x[:, 1:] - 2).all()) and float(seen.sum(1).min()) >= 15


def test_low_ratings_are_not_ranked(tmp_path: Path) -> None:
    folder = write_movielens_folder(tmp_path)
    rated = {user.name: user.movies.tolist() for user in read_ratings(folder, None, 0.0).users}
    high = {user.name: user.movies.tolist() for user in read_ratings(folder, None, 4.0).users}

    dataset = load(folder, min_rating=4.0)

    part = dataset.local_sets["test"]
    assert part.excluded is not None and part.patient is not None
    assert any(len(high[name]) < len(rated[name]) for name in high)
    for row in range(len(part)):
        name = part.patient_names[int(part.patient[row])]
        target = int(part.labels[row])
        seen = np.flatnonzero(np.unpackbits(part.excluded[row].numpy()))
        assert set(seen) == set(rated[name][: rated[name].index(target)])
        history = [token - 2 for token in part.x[row, 1:].tolist() if token]
        assert target in high[name] and set(history) <= set(high[name])


def test_popularity_is_that_of_public_users() -> None:
    ratings = simulated_ratings()
    counts = np.ones(200)
    for user in assign_roles(ratings.users, MoviesConfig())["public"]:
        counts[user.movies] += 1

    dataset = load()

    for part in (dataset.test, dataset.local_sets["test"]):
        assert part is not None
        shares = part.baselines["popularity"].double().exp()
        assert shares.shape == (len(part), 200)
        np.testing.assert_allclose(shares[-1], counts / counts.sum(), rtol=1e-6)
    assert dataset.simulated and len(dataset.train.group_names) == 6
    assert dataset.task.is_ranking and dataset.task.outputs == 200
    assert load(name="movies_public").simulated
    without = load(public_users=0).test
    assert without is not None and not without.baselines


def change_line(file: Path, number: int, line: str) -> None:
    lines = file.read_text(encoding="latin-1").split("\n")
    lines[number - 1] = line
    file.write_text("\n".join(lines), encoding="latin-1")


BROKEN: list[tuple[str, str, Callable[[Path], object], dict[str, Any], str]] = [
    (
        "no ratings",
        "100k",
        lambda d: (d / "u.data").unlink(),
        {},
        "path: DIR: expected one of u.data, ratings.dat, ratings.csv, got none of them",
    ),
    (
        "two layouts",
        "100k",
        lambda d: (d / "ratings.dat").write_text(""),
        {},
        "expected one of u.data, ratings.dat, ratings.csv, got u.data and ratings.dat",
    ),
    (
        "no movies",
        "1m",
        lambda d: (d / "movies.dat").unlink(),
        {},
        "path: DIR: movies.dat not found, but ratings.dat exists",
    ),
    (
        "other separator",
        "100k",
        lambda d: change_line(d / "u.data", 3, "1::2::3::4"),
        {},
        r"path: DIR/u.data: row 3: expected a user, a movie, a rating and a time, separated by "
        r"'\t', got '1::2::3::4'",
    ),
    (
        "columns",
        "1m",
        lambda d: change_line(d / "ratings.dat", 2, "1::2::3"),
        {},
        "path: DIR/ratings.dat: row 2: expected a user, a movie, a rating and a time, separated by "
        "'::', got '1::2::3'",
    ),
    (
        "rating",
        "1m",
        lambda d: change_line(d / "ratings.dat", 1, "1::1::good::9"),
        {},
        "path: DIR/ratings.dat: row 1, column 'rating': expected a number from 0 to 5, got 'good'",
    ),
    (
        "control characters",
        "1m",
        lambda d: change_line(d / "ratings.dat", 1, "1::1::\x1b[2J::9"),
        {},
        r"row 1, column 'rating': expected a number from 0 to 5, got '\x1b[2J'",
    ),
    (
        "rating out of range",
        "latest",
        lambda d: change_line(d / "ratings.csv", 2, "1,1,50,9"),
        {},
        "path: DIR/ratings.csv: row 1, column 'rating': expected a number from 0 to 5, got '50'",
    ),
    (
        "NaN",
        "latest",
        lambda d: change_line(d / "ratings.csv", 2, "1,1,nan,9"),
        {},
        "path: DIR/ratings.csv: row 1, column 'rating': expected a number from 0 to 5, got 'nan'",
    ),
    (
        "time",
        "100k",
        lambda d: change_line(d / "u.data", 1, "1\t1\t3\t1997-12-04"),
        {},
        "path: DIR/u.data: row 1, column 'time': expected an integer, got '1997-12-04'",
    ),
    (
        "no time",
        "1m",
        lambda d: change_line(d / "ratings.dat", 4, "1::1::3::"),
        {},
        "row 4, column 'time': expected an integer, got nothing",
    ),
    (
        "separators apart",
        "1m",
        lambda d: change_line(d / "ratings.dat", 4, "1:1:1::3::9"),
        {},
        "path: DIR/ratings.dat: row 4: expected a user, a movie, a rating and a time, separated by "
        "'::', got '1:1:1::3::9'",
    ),
    (
        "user in Latin-1",
        "latest",
        lambda d: change_line(d / "ratings.csv", 4, "\xe9,1,3,9"),
        {},
        "path: DIR/ratings.csv: not encoded in UTF-8; save the file as UTF-8",
    ),
    (
        "too many columns",
        "latest",
        lambda d: change_line(d / "ratings.csv", 4, "1,1,3,9,9"),
        {},
        "path: DIR/ratings.csv: row 3: expected a user, a movie, a rating and a time, separated by "
        "',', got '1,1,3,9,9'",
    ),
    (
        "too many columns in the first row",
        "100k",
        lambda d: change_line(d / "u.data", 1, "1\t1\t3\t9\t9"),
        {},
        "path: DIR/u.data: row 1: expected a user, a movie, a rating and a time, separated by ",
    ),
    (
        "unknown movie",
        "100k",
        lambda d: change_line(d / "u.data", 1, "1\t310\t3\t9"),
        {},
        "path: DIR/u.data: row 1, column 'movie': expected a movie of u.item, got '310'",
    ),
    (
        "unknown user",
        "100k",
        lambda d: change_line(d / "u.data", 1, "99\t1\t3\t9"),
        {},
        "path: DIR/u.data: row 1, column 'user': expected a user of u.user, got '99'",
    ),
    (
        "rated twice",
        "100k",
        lambda d: (d / "u.data").write_text("1\t1\t3\t9\n1\t2\t3\t9\n1\t1\t4\t10\n"),
        {},
        "path: DIR/u.data: row 3: user '1' has rated movie '1' twice",
    ),
    (
        "header",
        "latest",
        lambda d: change_line(d / "ratings.csv", 1, "user,item,stars,date"),
        {},
        "path: DIR/ratings.csv: line 1: expected 'userId,movieId,rating,timestamp', got "
        "'user,item,stars,date'",
    ),
    (
        "encoding",
        "latest",
        lambda d: (d / "movies.csv").write_bytes(b"movieId,title,genres\n1,L\xe9on,Drama\n"),
        {},
        "path: DIR/movies.csv: line 2: not encoded in UTF-8; save the file as UTF-8",
    ),
    (
        "title",
        "100k",
        lambda d: change_line(d / "u.item", 5, "5||01-Jan-1995"),
        {},
        "path: DIR/u.item: line 5: expected a movie, a title and genres, separated by '|', got "
        "'5||01-Jan-1995'",
    ),
    (
        "movie twice",
        "1m",
        lambda d: change_line(d / "movies.dat", 5, "4::Other (1990)::Drama"),
        {},
        "path: DIR/movies.dat: line 5: movie '4' occurs twice",
    ),
    (
        "zip code",
        "1m",
        lambda d: change_line(d / "users.dat", 2, "2::F::1::10::"),
        {},
        "path: DIR/users.dat: line 2: expected 5 columns, a user and lastly a zip code, separated "
        "by '::', got '2::F::1::10::'",
    ),
    (
        "user twice",
        "100k",
        lambda d: change_line(d / "u.user", 2, "1|24|M|writer|10001"),
        {},
        "path: DIR/u.user: line 2: user '1' occurs twice",
    ),
    (
        "no regions",
        "latest",
        lambda d: None,
        {"group": "region"},
        "group: 'region' needs users.csv (userId,region), which DIR does not contain; add the "
        "file, or set group=user",
    ),
    (
        "no zip codes",
        "1m",
        lambda d: (d / "users.dat").unlink(),
        {"group": "region"},
        "group: 'region' needs users.dat (5 columns, the last a zip code), which DIR does not "
        "contain; add the file, or set group=user",
    ),
    (
        "region",
        "latest",
        lambda d: (d / "users.csv").write_text("userId,region\n1,north\n2,\n"),
        {},
        "path: DIR/users.csv: line 3: expected a user and a region, separated by ',', got '2,'",
    ),
    (
        "regions without header",
        "latest",
        lambda d: (d / "users.csv").write_text("1,north\n2,south\n"),
        {},
        "path: DIR/users.csv: line 1: expected 'userId,region', got '1,north'",
    ),
    (
        "user without region",
        "latest",
        lambda d: (d / "users.csv").write_text("userId,region\n1,north\n"),
        {},
        "expected a user of users.csv, got",
    ),
    (
        "group",
        "100k",
        lambda d: None,
        {"group": "age"},
        "group: must be 'region' or 'user' for movies, got 'age'",
    ),
    (
        "low ratings",
        "100k",
        lambda d: None,
        {"min_rating": 6.0},
        "path: DIR/u.data: no user has two ratings of at least 6",
    ),
    (
        "groups",
        "100k",
        lambda d: None,
        {"groups": 4},
        "movies.groups: must be <= 3, the number of groups with users to train on, got 4",
    ),
    (
        "no user",
        "latest",
        lambda d: change_line(d / "ratings.csv", 2, ",1,3,9"),
        {},
        "path: DIR/ratings.csv: row 1, column 'user': expected a name, got nothing",
    ),
    (
        "open quote of a user",
        "latest",
        lambda d: change_line(d / "ratings.csv", 2, '"1,1,3,9'),
        {},
        "path: DIR/ratings.csv: expected a user, a movie, a rating and a time, separated by ','",
    ),
    (
        "open quote of a title",
        "latest",
        lambda d: change_line(d / "movies.csv", 3, '2,"A,Drama'),
        {},
        "path: DIR/movies.csv: line 3: expected CSV with closed quotes, got '2,\"A,Drama'",
    ),
    (
        "long title",
        "latest",
        lambda d: change_line(d / "movies.csv", 3, f'2,"{"A" * 200_000}",Drama'),
        {},
        "path: DIR/movies.csv: line 3: expected CSV with closed quotes",
    ),
    (
        "title on two lines",
        "latest",
        lambda d: change_line(d / "movies.csv", 3, "2,A\rB,Drama"),
        {},
        "path: DIR/movies.csv: line 3: expected a movie, a title and genres, separated by ',', "
        "got '2,A'",
    ),
    (
        "comma in a title",
        "latest",
        lambda d: change_line(d / "movies.csv", 3, "2,American President, The (1995),Drama"),
        {},
        "path: DIR/movies.csv: line 3: expected a movie, a title and genres, separated by ',', "
        "got '2,American President,The (1995),Drama'",
    ),
    (
        "separator in a title",
        "1m",
        lambda d: change_line(d / "movies.dat", 3, "3::A::B::Drama"),
        {},
        "path: DIR/movies.dat: line 3: expected a movie, a title and genres, separated by '::', "
        "got '3::A::B::Drama'",
    ),
    (
        "empty",
        "100k",
        lambda d: (d / "u.data").write_text("\n"),
        {},
        "path: DIR/u.data: no user has two ratings of at least 0",
    ),
]


def test_malformed_folder_raises_one_line(subtests: pytest.Subtests) -> None:
    for layout in ("100k", "1m", "latest"):
        cases = [(name, *case) for name, own, *case in BROKEN if own == layout]
        write = partial(write_movielens_folder, layout=layout)
        check_broken_folders(subtests, cases, write, load)
