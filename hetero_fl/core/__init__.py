"""The vocabulary of a federation: tasks, models, participants, payloads, plans, objectives."""
