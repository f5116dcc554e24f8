"""Benchmarks, grouped by question; `python -m benchmarks` lists them."""
