"""Histories of movies for recommendation: MovieLens folders, and a download."""

from hetero_fl.data.sources.movies.movielens import read_ratings
from hetero_fl.data.sources.movies.source import read_movies

__all__ = ["read_movies", "read_ratings"]
