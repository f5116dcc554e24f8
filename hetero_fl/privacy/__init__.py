"""Differential privacy: noise, what is released with it, and what that costs."""
