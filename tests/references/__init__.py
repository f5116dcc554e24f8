"""Independent references that the package is compared with: plain loops and formulas, written by hand."""
