"""Kinds of workers: processes on this machine, a cluster's actors, ranks of a launched job."""
