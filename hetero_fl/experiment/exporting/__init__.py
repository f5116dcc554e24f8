"""Models of a finished run as files that run without this package, with a card that says what they are."""
