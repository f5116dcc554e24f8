"""Comparisons of methods: validated runs, worker processes and tuning of settings."""
