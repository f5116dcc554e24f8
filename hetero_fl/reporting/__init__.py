"""Run directories, progress, plots, reports and comparisons."""
