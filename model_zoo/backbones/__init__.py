"""Network architectures; each function builds a backbone for an input shape."""
