"""Tables and plots of a benchmark's archive."""
