"""Network architectures as functions, each of which builds a backbone for an input shape."""
