"""Secure aggregation: the server learns the sum of a round's uploads, but no single upload."""
