"""Reports that compare algorithms."""
