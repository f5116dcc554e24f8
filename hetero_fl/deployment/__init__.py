"""Federated runs across machines: the server, the nodes of the sites, and the messages.

A site is an organization with private rows. The node of a site is the process of one client.
"""
