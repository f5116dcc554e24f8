"""Histories of movies for recommendation: MovieLens folders, a download and generated users."""

from hetero_fl.data.sources.movies.movielens import read_ratings
from hetero_fl.data.sources.movies.source import read_movies

__all__ = ["read_movies", "read_ratings"]
