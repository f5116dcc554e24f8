"""Simulated devices, faults and time."""
