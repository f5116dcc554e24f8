"""Files in the layouts of published benchmarks: PFLlib and HtFLlib, and LEAF."""

from hetero_fl.data.sources.benchmark_files import htfllib, leaf

__all__ = ["htfllib", "leaf"]
