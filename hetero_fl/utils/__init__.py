"""General utilities: errors, seeding, ordering, serialization, registries and processes."""
