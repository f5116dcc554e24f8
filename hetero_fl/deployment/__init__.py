"""Federated runs across machines: the server, the nodes of the sites and their messages."""
