"""`python -m hetero_fl.cli`, for launchers that take a module: `torchrun … -m hetero_fl.cli train …`."""

import sys

from hetero_fl.cli import main

if __name__ == "__main__":
    sys.exit(main())
