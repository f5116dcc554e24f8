"""Files in the layouts of published benchmarks: PFLlib and HtFLlib, LEAF, and WILDS."""

from hetero_fl.data.sources.benchmark_files import htfllib, leaf, wilds

__all__ = ["htfllib", "leaf", "wilds"]
