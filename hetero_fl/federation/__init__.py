"""How plans are carried out: executors, rounds, checkpoints."""
