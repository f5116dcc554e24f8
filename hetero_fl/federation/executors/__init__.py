"""Executors: in this process, worker processes, Ray actors and ranks of torchrun."""
