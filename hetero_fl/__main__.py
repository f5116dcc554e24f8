"""Run the command line with `python -m hetero_fl`."""  # style: ok (Python expects it here)

import sys

from hetero_fl.cli import main

if __name__ == "__main__":
    sys.exit(main())
