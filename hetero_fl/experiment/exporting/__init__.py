"""Export of models from finished runs to files that do not require this package."""
