"""Fixtures and hostile parties that tests of several packages share."""
