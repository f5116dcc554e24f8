"""Run the command line with `python -m hetero_fl`, for example under torchrun."""

import sys

from hetero_fl.cli import main

if __name__ == "__main__":
    sys.exit(main())
