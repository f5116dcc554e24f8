"""Federations over Flower."""
