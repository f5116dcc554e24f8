"""The network families: each builds a backbone from an input shape."""
