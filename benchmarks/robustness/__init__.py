"""Robustness of real deployments, and robustness against malicious clients."""
