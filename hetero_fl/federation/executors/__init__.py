"""Executors that run clients in this process, worker processes, Ray actors or torchrun ranks."""
