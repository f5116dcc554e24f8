"""What crashes, kills, real processes and malicious clients change."""
