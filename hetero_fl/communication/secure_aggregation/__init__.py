"""Secure aggregation: the server learns the sum of a round's uploads and no single one."""
