"""Tests of the whole project: layout, documentation, examples, notebooks, benchmarks."""
