"""Export of models from finished runs to files that work without this package."""
