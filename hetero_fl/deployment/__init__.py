"""A run across machines: the same rounds, with messages to nodes in place of work in this process."""
