"""Folders of benchmarks with the rows of natural clients."""

from hetero_fl.data.sources.benchmark_files.client_folders import htfllib, leaf

__all__ = ["htfllib", "leaf"]
