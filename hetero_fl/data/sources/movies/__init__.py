"""Histories of movies for recommendation: MovieLens folders, and a download."""

from hetero_fl.data.sources.movies.movielens import read_ratings

__all__ = ["read_ratings"]
