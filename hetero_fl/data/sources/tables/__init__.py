"""Tables: CSV, TSV and Parquet files, data frames, and samples and hourly series in tables."""

from hetero_fl.data.sources.tables.source import activity, bank_fraud, table

__all__ = ["activity", "bank_fraud", "table"]
