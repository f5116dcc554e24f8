"""Scores of methods in replications of published tables and in studies."""
