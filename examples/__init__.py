"""Callbacks for loggers, to copy from (a package in name, since an installed one may be called `examples` too)."""
