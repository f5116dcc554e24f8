"""What a run leaves behind and shows: run directory, progress, pictures, reports, comparisons."""
