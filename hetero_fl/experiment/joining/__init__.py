"""Clients that join after training."""
