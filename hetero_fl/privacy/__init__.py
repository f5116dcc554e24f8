"""Differential privacy: mechanisms, private training and privacy accounting."""
