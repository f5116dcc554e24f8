"""Time and memory for many clients and large cohorts."""
