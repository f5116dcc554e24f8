"""`hetero-fl status`: how a run across machines stands."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_fl.errors import UserError, printable

if TYPE_CHECKING:
    from rich.console import Console

ADDRESS = re.compile(r"(https?://.+)|([^/\s]+:\d+)")


def setup(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run", metavar="OUT|ADDRESS", help="run directory, or host:port of a server's metrics")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(carry_out=carry_out)


def carry_out(options: argparse.Namespace) -> int:
    """Parse, look, print."""
    if Path(options.run).exists() or not ADDRESS.fullmatch(options.run):
        from hetero_fl.experiment.deployment.status import read_status

        tree = read_status(Path(options.run))
    else:
        from hetero_fl.experiment.deployment.window import look

        tree = look(options.run)
    if options.json:
        print(json.dumps(tree, indent=1))
        return 0
    from rich.console import Console

    try:
        print_status(tree, Console(highlight=False, soft_wrap=True))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{options.run}: what is shown there is no status that this release knows") from None
    return 0


def print_status(tree: Mapping[str, Any], console: Console) -> None:
    """A few lines: the run, its figures, a row for each node, what happened last."""
    from rich.text import Text

    from hetero_fl.reporting.wording import duration, evaluated, plural, size

    def show(line: str, indent: str = "") -> None:
        console.print(Text(indent + printable(line)))

    now, versions = time.time(), tree["versions"]
    told = "waiting for the nodes" if tree["phase"] == "waiting" else tree["phase"]
    if tree["phase"] == "gone":
        told = "its process has gone; --resume goes on"
    show(f"{tree['name']}, {tree['algorithm']}: {told}, round {tree['round']} of {tree['rounds']}")
    if figures := evaluated(tree):
        show(figures)
    line = f"{size(tree['up_bytes'])} up, {size(tree['down_bytes'])} down"
    line += f"; {plural(tree['failures'], 'upload')} asked for and not used" if tree["failures"] else ""
    line += f"; the last round took {duration(tree['seconds'])}" if tree["seconds"] is not None else ""
    line += f"; ε {tree['epsilon']:.3g}" if tree["epsilon"] is not None else ""
    show(line)
    show(f"versions: hetero_fl {versions['package']}, torch {versions['torch']}, messages {versions['protocol']}")
    width = max(map(len, tree["nodes"]), default=0)
    for client, node in tree["nodes"].items():
        since = "" if node["since"] is None else f" for {duration(max(0.0, tree['updated'] - node['since']))}"
        word = "here" if node["here"] else "gone" if node["since"] is not None else "has not come"
        show(f"{client:{width}}  {word}{since}", "  ")
    for event in tree["events"][-5:]:
        show(f"{duration(max(0.0, now - event['time']))} ago: {event['message']}", "  ")
