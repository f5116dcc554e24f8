"""Run HtFLlib's own training script a round at a time, whenever `htfllib` asks for one.

    python htfllib_rounds.py SYSTEM DEVICE ROUNDS [option of its main.py …]

`SYSTEM` is the folder `system` of a checkout of HtFLlib. The working folder must have `../dataset`
with the files of the clients. The script runs unchanged, but waits before each round for a line on
standard input, and prints one line of JSON with the `seconds` of the round before. Methods that
need packages of their own (generative models, `higher`) are replaced by empty modules.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
import types
from typing import Any, TextIO

LEFT_OUT = {
    "serverktl_stylegan_xl": "FedKTL",
    "serverktl_stylegan_3": "FedKTL",
    "serverktl_stable_diffusion": "FedKTL",
    "serverl2g_feat": "FedL2G",
    "serverl2g_logit": "FedL2G",
}


class TurnTimer:
    """Stand in for `Server.select_clients`, with which each of its rounds begins."""

    def __init__(self, select: Any, replies: TextIO) -> None:
        self.select = select
        self.replies = replies
        self.started: float | None = None

    def __call__(self, server: Any) -> Any:
        """Report the round that has ended, wait for the next request, and begin."""
        if self.started is not None:
            seconds = time.perf_counter() - self.started
            print(json.dumps({"seconds": seconds}), file=self.replies, flush=True)
        sys.stdin.readline()
        self.started = time.perf_counter()
        return self.select(server)


def serve(system: str, device: str, rounds: str, options: list[str]) -> None:
    """Run the training script."""
    # Output of the script must not be mixed with replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # It saves whole modules and loads them, which torch refuses by default since 2.6.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    sys.path.insert(0, system)
    for name, method in LEFT_OUT.items():
        module = types.ModuleType(f"flcore.servers.{name}")
        setattr(module, method, None)
        sys.modules[module.__name__] = module
    from flcore.servers.serverbase import Server

    timer = TurnTimer(Server.select_clients, replies)

    # A function, so that it is bound to its object like a method.
    def select_clients(server: Any) -> Any:
        return timer(server)

    Server.select_clients = select_clients
    sys.argv = ["main.py", "-dev", device, "-gr", rounds, *options]
    runpy.run_path(f"{system}/main.py", run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
