"""Comparison of methods over seeds: plan, search for settings, runs and results."""
