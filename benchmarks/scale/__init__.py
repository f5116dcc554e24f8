"""Memory of large cohorts, and of federations that run for a long time."""
