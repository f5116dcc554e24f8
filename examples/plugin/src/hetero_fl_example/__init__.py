"""A method, a data source, a model and a logger for hetero_fl, which pyproject.toml declares."""
