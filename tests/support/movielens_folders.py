"""Folders in the layouts of MovieLens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

MOVIES = 30
ZIP_CODES = ("10001", "94110", "T8H1N", "94301")
"""Zip codes of the users, in turn. The regions are `zip_1`, `zip_9` and `other`."""


def draw_ratings(users: int, seed: int = 0) -> list[tuple[int, int, int, int]]:
    """Return ratings (user, movie, stars, time) of 12 movies by each user, in random order.

    A user rates the movies m, m + 1, m + 2, … at increasing times, modulo the number of movies.
    """
    draws = np.random.default_rng(seed)
    rows = []
    for user in range(1, users + 1):
        first = int(draws.integers(MOVIES))
        for step in range(12):
            movie = 1 + (first + step) % MOVIES
            rows.append((user, movie, int(draws.integers(1, 6)), 880_000_000 + 10 * step))
    return [rows[i] for i in draws.permutation(len(rows))]


def write_movielens_folder(
    folder: Path, layout: str = "100k", users: int = 24, seed: int = 0
) -> Path:
    """Write a data set in the layout of MovieLens 100K, 1M or latest.

    Args:
        folder: Folder to write.
        layout: `100k`, `1m` or `latest`.
        users: Number of users.
        seed: Seed of the ratings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ratings = draw_ratings(users, seed)
    titles = {movie: f"Movie {movie}, The (19{50 + movie})" for movie in range(1, MOVIES + 1)}
    titles[2] = "Léon (1994)"
    # Two movies have the same title, as in MovieLens 100K.
    titles[4] = titles[3]
    zip_codes = {user: ZIP_CODES[user % len(ZIP_CODES)] for user in range(1, users + 1)}
    if layout == "100k":
        write(folder / "u.data", ["\t".join(map(str, row)) for row in ratings])
        write(
            folder / "u.item",
            [f"{i}|{title}|01-Jan-1995||http://x|0|1" for i, title in titles.items()],
        )
        write(folder / "u.user", [f"{i}|24|M|writer|{code}" for i, code in zip_codes.items()])
    elif layout == "1m":
        write(folder / "ratings.dat", ["::".join(map(str, row)) for row in ratings])
        write(folder / "movies.dat", [f"{i}::{title}::Drama" for i, title in titles.items()])
        write(folder / "users.dat", [f"{i}::F::1::10::{code}" for i, code in zip_codes.items()])
    else:
        rows = [f"{user},{movie},{stars}.0,{time}" for user, movie, stars, time in ratings]
        write(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *rows], "utf-8")
        movies = [f'{i},"{title}",Drama|Crime' for i, title in titles.items()]
        write(folder / "movies.csv", ["movieId,title,genres", *movies], "utf-8")
    return folder


def write(file: Path, lines: list[str], encoding: str = "latin-1") -> None:
    file.write_text("\n".join(lines) + "\n", encoding=encoding)
