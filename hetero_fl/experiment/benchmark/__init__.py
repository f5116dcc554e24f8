"""Benchmarks: tuned comparisons of methods in several federations, archived run by run."""
