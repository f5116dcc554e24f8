"""Effects of crashes, kills, real processes and malicious clients."""
