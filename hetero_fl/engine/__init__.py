"""Compute the steps of plans, serially or vectorized over clients."""
