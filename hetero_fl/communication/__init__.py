"""What happens to payloads between client and server."""
