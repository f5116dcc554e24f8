"""Aggregation on the server: uploads, means over owners, and consensus teachers."""

from hetero_fl.aggregation.uploads import Upload, Uploads

__all__ = ["Upload", "Uploads"]
