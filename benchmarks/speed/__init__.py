"""Time of a round, step or message, compared with bare loops or other executors."""
