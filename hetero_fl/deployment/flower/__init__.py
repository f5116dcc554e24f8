"""Federated runs over Flower."""
