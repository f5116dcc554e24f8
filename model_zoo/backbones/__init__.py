"""Network architectures as functions, each of which builds a backbone for an input shape.

A function returns the backbone, the width of the features and, optionally, the dropout rate of the
head.
"""
