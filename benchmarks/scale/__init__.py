"""Time and memory with many clients, large cohorts or much private state."""
