"""The benchmark of docs/benchmark: tuned comparisons of methods in several federations."""
