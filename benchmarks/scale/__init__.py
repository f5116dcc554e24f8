"""What many clients, a large cohort or much private state cost in time and memory."""
