"""Generated users who watch movies, with tastes by region, popular movies and sequels.

A user chooses the next movie in one of two ways. With probability `FOLLOW`, the user watches one of
the `FOLLOWERS` movies that often follow the last one, such as its sequel; the followers of a movie
are the same in all regions. Otherwise, the movie i of genre g has a probability proportional to
`taste[user, g] * popularity[region, i]`. No movie is watched twice. The taste of a user is sampled
from a Dirichlet distribution around the taste of the region. The popularity of the movies of a
genre falls with their rank as `rank ** -LONG_TAIL`, times a log-normal factor of the region.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetero_fl.data.sources.movies.histories import Ratings, User
from hetero_fl.utils.seeding import keyed_numpy_generator

REGIONS = ("capital", "coast", "islands", "lakes", "mountains", "plains")
USERS = 120
"""Number of users of each region."""
GENRES = (
    "action",
    "adventure",
    "animation",
    "comedy",
    "crime",
    "drama",
    "family",
    "horror",
    "romance",
    "western",
)
MOVIES_PER_GENRE = 20
HISTORY = (20, 41)
"""Half-open range of the number of movies of a user."""
REGION_TASTE = 0.4
"""Concentration of the genres of a region. Smaller values are more skewed."""
USER_TASTE = 6.0
"""Concentration of the genres of a user around the taste of the region."""
LONG_TAIL = 0.8
REGION_POPULARITY = 0.5
"""Standard deviation of the logarithm of the factor by which regions differ in popularity."""
FOLLOW = 0.6
FOLLOWERS = (0.6, 0.25, 0.15)
"""Probabilities of the movies that often follow a movie."""
SAME_GENRE = 0.7
"""Probability that a follower has the genre of the movie."""
ABOUT = "generated: users of six regions watch movies by taste, by popularity and in sequence"


@dataclass(frozen=True)
class World:
    """Movies that users choose from.

    Attributes:
        titles: Titles of all movies, such as `comedy 7`.
        genre: Genre of each movie, int64 `[movies]`.
        followers: Movies that often follow each movie, int64 `[movies, 3]`.
        taste: Shares of the genres in each region, `[regions, genres]`.
        popularity: Popularity of each movie in each region, `[regions, movies]`.
    """

    titles: tuple[str, ...]
    genre: np.ndarray
    followers: np.ndarray
    taste: np.ndarray
    popularity: np.ndarray


def make_world(seed: int) -> World:
    """Generate the movies and the regions."""
    rng = keyed_numpy_generator("data", "movies", seed, "world")
    genre = np.repeat(np.arange(len(GENRES)), MOVIES_PER_GENRE)
    titles = tuple(f"{name} {i + 1}" for name in GENRES for i in range(MOVIES_PER_GENRE))
    followers = np.stack([_sample_followers(movie, genre, rng) for movie in range(len(genre))])
    taste = rng.dirichlet([REGION_TASTE] * len(GENRES), len(REGIONS))
    # The ranks of popularity are not those of the titles.
    ranks = np.concatenate([rng.permutation(MOVIES_PER_GENRE) + 1 for _ in GENRES])
    factor = rng.lognormal(0.0, REGION_POPULARITY, (len(REGIONS), len(genre)))
    return World(titles, genre, followers, taste, ranks**-LONG_TAIL * factor)


def _sample_followers(movie: int, genre: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    chosen: list[int] = []
    while len(chosen) < len(FOLLOWERS):
        same = rng.random() < SAME_GENRE
        pool = np.flatnonzero((genre == genre[movie]) == same)
        follower = int(rng.choice(pool))
        if follower != movie and follower not in chosen:
            chosen.append(follower)
    return np.array(chosen)


def simulate_ratings(seed: int) -> Ratings:
    """Generate the movies of `USERS` users of each region."""
    world = make_world(seed)
    users = []
    for region, name in enumerate(REGIONS):
        for number in range(USERS):
            rng = keyed_numpy_generator("data", "movies", seed, "user", name, number)
            movies = _watch(world, region, int(rng.integers(*HISTORY)), rng)
            users.append(User(f"{name} {number + 1}", name, movies, np.ones(len(movies), bool)))
    return Ratings(world.titles, tuple(users), "name: movies")


def _watch(world: World, region: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the movies of a user in chronological order."""
    taste = rng.dirichlet(USER_TASTE * world.taste[region] + 0.05)
    weight = taste[world.genre] * world.popularity[region]
    watched: list[int] = []
    while len(watched) < count:
        if watched and rng.random() < FOLLOW:
            movie = int(rng.choice(world.followers[watched[-1]], p=FOLLOWERS))
        else:
            movie = int(rng.choice(len(weight), p=weight / weight.sum()))
        if movie not in watched:
            watched.append(movie)
            weight[movie] = 0.0
    return np.array(watched, np.int64)
