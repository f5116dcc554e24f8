"""What a server does with many items: means over owners, teachers."""

from hetero_fl.aggregation.uploads import Upload, Uploads

__all__ = ["Upload", "Uploads"]
