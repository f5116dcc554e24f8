"""Communication between server and clients: protocol, compression and secure aggregation."""
