"""Robustness against crashes, killed processes, real deployments and malicious clients."""
