"""Helpers that know nothing of federated learning: errors, seeding, ordering, serialization."""
