"""Which scores methods reach: published tables repeated, and studies of our own."""
