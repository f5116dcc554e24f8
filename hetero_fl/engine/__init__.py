"""Backends that compute the steps of plans (`hetero_fl.core.plan`), serially or vectorized."""
