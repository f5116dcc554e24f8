"""Run as a process of its own: the nodes of a federation on one machine, whose imports are done once, before they part.

Reads two lines, the configuration and the sites' files, starts a process for each site, and starts one that was killed again. All
of them end when their parent does, however that ends: its end of the pipe is then closed.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

LOOK = 0.2  # seconds between looks at who has ended
LOG = "log.txt"  # in a site's scratch folder
NODE_FAILED = 3  # exit status of a launcher in which a node ended by itself


def main() -> int:
    """Return 0 when the parent has ended, NODE_FAILED with a line on stdout when a node has."""
    from hetero_fl.deployment.flower.commands import check_installed

    check_installed()
    from hetero_fl.deployment.flower.supernode import start_prefork
    from hetero_fl.deployment.flower.worker import run_node  # noqa: F401

    with os.fdopen(0, "rb", buffering=0, closefd=False) as told:
        if not (config := told.readline()):
            return 0
        _preload(json.loads(config))
        if not (sites := told.readline()):
            return 0
    files = [Path(site) for site in json.loads(sites)]
    launcher = files[0].parent.parent
    prefork = start_prefork(launcher)
    living = {_start_node(site, launcher): site for site in files}
    try:
        while not select.select([0], [], [], LOOK)[0]:  # readable at its end alone
            for pid, site in list(living.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended == 0:
                    continue
                del living[pid]
                if not os.WIFSIGNALED(status):
                    print(_last_words(site), flush=True)
                    return NODE_FAILED
                living[_start_node(site, launcher)] = site
        return 0
    finally:
        for pid in living:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        prefork.kill()
        shutil.rmtree(launcher, ignore_errors=True)


def _preload(config: dict[str, Any]) -> None:
    """Load what all nodes will need: libraries of models and data, files. What is wrong with it is theirs to tell."""
    import torch
    import torch._dynamo  # which optimizers load at their first step

    from hetero_fl.experiment.preparation import prepare

    torch.set_num_threads(1)  # a process that has a pool of threads must not be forked
    with suppress(Exception):
        prepare(config)


def _start_node(site: Path, launcher: Path) -> int:
    """Start a process for a site and return its number."""
    if (pid := os.fork()) != 0:
        return pid
    log = os.open(site.parent / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    status = 1
    try:
        from hetero_fl.deployment.flower.worker import run_node
        from hetero_fl.utils.errors import RunFailedError, UserError

        # The parent has permitted what the site's file lists.
        run_node(site, allow_code=True, launcher=launcher, scratch=site.parent)
        status = 0
    except (RunFailedError, UserError) as error:
        print(error, flush=True)
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def _end_with_parent() -> None:
    os.read(0, 1)  # until the other end is closed
    os._exit(0)


def _last_words(site: Path) -> str:
    with suppress(OSError):
        lines = [
            line.strip()
            for line in (site.parent / LOG).read_text(errors="replace").splitlines()
            if line.strip()
        ]
        if lines:
            return f"{site.parent.name}: its process has ended: {lines[-1][:300]}"
    return f"{site.parent.name}: its process has ended"


if __name__ == "__main__":
    os._exit(main())  # somebody waits, and there is nothing to put in order
