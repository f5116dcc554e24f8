"""Run as a process of its own, by its path: Flower's SuperLink, which ends when whoever started it does, however that ends.

The first argument is its scratch folder, the others are the SuperLink's. Imports nothing of hetero_fl.
"""

import os
import shutil
import sys
import threading


def _end_with_parent(scratch: str) -> None:
    sys.stdin.buffer.read()  # until the other end is closed: by the parent, or with it
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, args=(sys.argv.pop(1),), daemon=True).start()
    from flwr.superlink.cli import flower_superlink

    sys.argv[0] = "flower-superlink"
    flower_superlink()
