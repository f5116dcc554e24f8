"""Independent references for the package: plain loops and formulas."""
