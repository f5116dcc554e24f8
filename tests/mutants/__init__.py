"""Small bugs that the quick tests must find."""
