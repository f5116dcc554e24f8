"""Differential privacy: noise, releases with noise, and their cost."""
