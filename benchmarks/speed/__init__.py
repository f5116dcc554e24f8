"""Time per round, step or message, in comparison with bare loops, executors and other projects."""
