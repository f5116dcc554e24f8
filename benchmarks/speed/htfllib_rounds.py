"""Run the training script of HtFLlib one round at a time, for the case `htfllib`.

    python htfllib_rounds.py SYSTEM DEVICE THREADS ROUNDS [option of its main.py …]

`SYSTEM` is the folder `system` of a checkout of HtFLlib. The folder `../dataset`, relative to the
working directory, must contain the files of the clients. Before each round, the script waits for a
line on standard input. After each round, it prints one line of JSON with the `seconds` of the
round. Methods that require additional packages (generative models, `higher`) are replaced with
empty modules.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
import types
from typing import Any, TextIO

import torch

LEFT_OUT = {
    "serverktl_stylegan_xl": "FedKTL",
    "serverktl_stylegan_3": "FedKTL",
    "serverktl_stable_diffusion": "FedKTL",
    "serverl2g_feat": "FedL2G",
    "serverl2g_logit": "FedL2G",
}


class TurnTimer:
    """Replacement of `Server.select_clients`, which HtFLlib calls at the start of each round.

    Args:
        select: The original function.
        replies: Stream to which the seconds are written.
    """

    def __init__(self, select: Any, replies: TextIO) -> None:
        self.select = select
        self.replies = replies
        self.started: float | None = None

    def __call__(self, server: Any) -> Any:
        """Report the previous round, wait for the next request, and start a round."""
        if self.started is not None:
            seconds = time.perf_counter() - self.started
            print(json.dumps({"seconds": seconds}), file=self.replies, flush=True)
        sys.stdin.readline()
        self.started = time.perf_counter()
        return self.select(server)


def prepare_imports(system: str) -> None:
    """Make the modules of HtFLlib importable, without those that need generative models.

    Args:
        system: The folder `system` of a checkout of HtFLlib.
    """
    # HtFLlib saves and loads whole modules, which torch refuses by default since version 2.6.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    sys.path.insert(0, system)
    for name, method in LEFT_OUT.items():
        module = types.ModuleType(f"flcore.servers.{name}")
        setattr(module, method, None)
        sys.modules[module.__name__] = module


def serve(system: str, device: str, threads: str, rounds: str, options: list[str]) -> None:
    """Run the training script of HtFLlib.

    Args:
        system: The folder `system` of a checkout of HtFLlib.
        device: Device of the training.
        threads: Number of threads of torch.
        rounds: Number of rounds.
        options: Additional options of the training script.
    """
    # Replies use the original stdout, and other output is redirected to stderr.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    prepare_imports(system)
    torch.set_num_threads(int(threads))
    from flcore.servers.serverbase import Server

    timer = TurnTimer(Server.select_clients, replies)

    # Unlike `TurnTimer` objects, a function is bound to the server like a method.
    def select_clients(server: Any) -> Any:
        return timer(server)

    Server.select_clients = select_clients
    sys.argv = ["main.py", "-dev", device, "-gr", rounds, *options]
    runpy.run_path(f"{system}/main.py", run_name="__main__")


if __name__ == "__main__":
    serve(*sys.argv[1:5], sys.argv[5:])
