"""Bit-for-bit comparison of the working tree with a given commit on the same machine."""
