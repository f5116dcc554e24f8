#!/usr/bin/env python3
"""Run the command `hetero-fl audit` from a checkout of the repository."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hetero_fl.cli import main

if __name__ == "__main__":
    sys.exit(main(command="audit"))
