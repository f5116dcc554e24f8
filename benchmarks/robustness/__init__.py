"""Robustness of real deployments."""
