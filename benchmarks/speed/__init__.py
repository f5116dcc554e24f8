"""How long a round, a step or a message takes, against a bare loop or another executor."""
