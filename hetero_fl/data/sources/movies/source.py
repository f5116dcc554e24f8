"""Sources of movies: folders in the layouts of MovieLens, and a download."""

from __future__ import annotations

from pathlib import Path

from hetero_fl.config.data import MoviesConfig, SourceConfig
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.files import EMBEDDED, download_archive
from hetero_fl.data.sources.movies.histories import (
    Ratings,
    make_dataset,
    make_public_dataset,
)
from hetero_fl.data.sources.movies.movielens import read_ratings

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
    """Read the movies of users from a folder (see `read_movies`).

    The simulated folder has 720 users in six regions (groups).
    """
    path = Path(str(config.path)).expanduser()
    return read_movies(path, config.movies or MoviesConfig(), config.group)


@register_source("movies_public", keys=("path", "movies"), default_path=EMBEDDED / "movies")
def movies_public(config: SourceConfig, _root: Path) -> Dataset:
    """Read the movies of the public users, for use as a proxy set."""
    settings = config.movies or MoviesConfig()
    path = Path(str(config.path)).expanduser()
    ratings = read_ratings(path, "user", settings.min_rating)
    return make_public_dataset("movies_public", ratings, settings, _describe(ratings, path))


@register_source("movielens_100k", keys=("group", "movies"))
def movielens_100k(config: SourceConfig, root: Path) -> Dataset:
    """Download MovieLens 100K (Harper & Konstan 2015), with 943 users and 1,682 movies.

    The license permits research, but neither commercial use nor redistribution.
    """
    settings = config.movies or MoviesConfig()
    dataset = read_movies(_download(root), settings, config.group)
    dataset.name = dataset.source = "movielens_100k"
    return dataset


@register_source("movielens_100k_public", keys=("movies",))
def movielens_100k_public(config: SourceConfig, root: Path) -> Dataset:
    """Download MovieLens 100K, and return its public users, for use as a proxy set."""
    settings = config.movies or MoviesConfig()
    path = _download(root)
    ratings = read_ratings(path, "user", settings.min_rating)
    return make_public_dataset("movielens_100k_public", ratings, settings, _describe(ratings, path))


def read_movies(path: Path, settings: MoviesConfig, group: str | None = None) -> Dataset:
    """Read a folder in a layout of MovieLens.

    Args:
        path: Folder to read.
        settings: Movie settings.
        group: `region` for the first digit of the zip code of a user, `user` for one group per
            user, or None for `region` if the folder has zip codes, otherwise `user`.

    Returns:
        A data set of next-movie prediction, whose groups are regions or users.

    Raises:
        UserError: If a file is missing or malformed, or there are too few users.
    """
    ratings = read_ratings(path, group, settings.min_rating)
    return make_dataset("movies", ratings, settings, _describe(ratings, path))


def _describe(ratings: Ratings, path: Path) -> str:
    count = sum(len(user.movies) for user in ratings.users)
    return (
        f"{count:,} ratings of {len(ratings.titles):,} movies by {len(ratings.users):,} users in "
        f"{path.name}"
    )


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
