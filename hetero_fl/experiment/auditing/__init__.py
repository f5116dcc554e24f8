"""Privacy audits of finished runs."""
