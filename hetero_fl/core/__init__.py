"""Core concepts: tasks, models, participants, payloads, plans, objectives and metrics."""
