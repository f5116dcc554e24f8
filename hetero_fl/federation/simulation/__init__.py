"""Simulation of devices, faults and time."""
