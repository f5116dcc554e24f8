"""Local web page with live curves of several runs."""
