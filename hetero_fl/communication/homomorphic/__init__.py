"""Homomorphic encryption of uploads: the server adds ciphertexts that it cannot decrypt."""
