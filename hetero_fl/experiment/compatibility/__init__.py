"""Checks of settings and user-defined functions before training.

Features exclude each other, and rules concern the values of settings. Both are functions of the
facts of a run, and are checked as early as these are known: before data is loaded, or before
training.
"""
