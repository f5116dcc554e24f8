"""Attacks, malicious clients and robust aggregation rules."""
