"""Backends that compute the steps of plans, serially or vectorized over clients."""
