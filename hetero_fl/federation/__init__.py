"""Rounds of a federation: trainers, executors, simulation, checkpoints."""
