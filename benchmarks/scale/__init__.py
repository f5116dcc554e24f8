"""Time and memory for many clients, large cohorts and large private state."""
