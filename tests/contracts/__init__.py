"""Promises of the framework, each tested for every method or feature that it concerns."""
