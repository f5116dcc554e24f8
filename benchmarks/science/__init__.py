"""Scores of methods: replications of published tables, and studies."""
