"""The commands `federate`, `server`, `node` and `status`."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_fl.cli.run_options import (
    check_run,
    option_of_code,
    options_of_run,
    permission_of,
    print_finished,
    say_of,
)
from hetero_fl.utils.errors import UserError, printable
from hetero_fl.utils.processes import Beside

if TYPE_CHECKING:
    from rich.console import Console


# `hetero-fl federate`: what `train` does, by a real federation on this machine.

NURSERY = "hetero_fl.deployment.local.fork_server"


def setup_federate(parser: argparse.ArgumentParser) -> None:
    """The command's options: those of `train`."""
    options_of_run(parser)
    parser.set_defaults(carry_out=run_federate)


def run_federate(options: argparse.Namespace) -> int:
    """Parse, call, print."""
    permission = permission_of(options)
    if (source := check_run(options, permission)) is None:
        return 0
    nursery = Beside(NURSERY)  # before torch is loaded here: the nodes load it in the same time
    with nursery:
        from hetero_fl.deployment.local.launcher import federate

        finished = federate(
            source,
            out=options.out,
            resume=options.resume,
            overrides=options.overrides,
            quiet=options.quiet,
            nursery=nursery,
            allow_code=permission,
        )
    print_finished(finished, say_of(options))
    return 0


# `hetero-fl server` and `hetero-fl node`: the two sides of a federation, for machines of their own.

MAKES = "`hetero-fl certificates` makes one"


def setup_server(parser: argparse.ArgumentParser) -> None:
    """The command's options: those of `train`, and the server's own file."""
    options_of_run(parser)
    parser.add_argument(
        "--server", type=Path, metavar="FILE", help=f"where it listens, who may come; {MAKES}"
    )
    parser.set_defaults(carry_out=_serve)


def _serve(options: argparse.Namespace) -> int:
    permission = permission_of(options)
    if (source := check_run(options, permission)) is None:
        return 0
    if options.server is None:
        raise UserError(f"--server is missing: name a file ({MAKES})")
    from hetero_fl.deployment.server import preside

    finished = preside(
        source,
        options.server,
        out=options.out,
        resume=options.resume,
        overrides=options.overrides,
        allow_code=permission,
        quiet=options.quiet,
    )
    print_finished(finished, say_of(options))
    return 0


def setup_node(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--site", type=Path, metavar="FILE", help=f"this site's own file; {MAKES}")
    parser.add_argument(
        "--once",
        action="store_true",
        help="end when a run is over (default: wait for the next one)",
    )
    parser.add_argument(
        "--audit",
        type=Path,
        metavar="FILE",
        help="print a node's log, audit.jsonl in its folder, and check it",
    )
    parser.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="with --audit: the node's public key (….pub), which shows who wrote the log",
    )
    parser.add_argument(
        "--head",
        metavar="N:HASH",
        help="with --audit: what was noted of the log earlier, which must still be in it",
    )
    option_of_code(parser)
    parser.set_defaults(carry_out=_attend)


def _attend(options: argparse.Namespace) -> int:
    if options.audit is not None:
        return _audit(options.audit, options.key, options.head)
    if options.site is None:
        raise UserError(f"--site is missing: name a file ({MAKES}); or --audit")
    from hetero_fl.deployment.node import attend

    return 130 if attend(options.site, options.once, permission_of(options), options.quiet) else 0


def _audit(path: Path, key: Path | None, head: str | None) -> int:
    from hetero_fl.deployment.audit_log import head_of, shown, totals, verify
    from hetero_fl.deployment.certificates import load_public_key

    entries = verify(path, None if key is None else load_public_key(key), head)
    print(*shown(entries), sep="\n")
    sums = totals(entries)
    print(f"whole: {len(entries):,} messages; of tasks {sums.down:,} bytes came, {sums.up:,} went")
    print(f"head: {head_of(path)}")
    if key is None:
        print(
            "signatures were not checked, so lines may have been appended; --key names the site's public key"
        )
    return 0


def setup_certificates(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="a new folder: one for the server in it, one for each site",
    )
    parser.add_argument(
        "--host",
        action="append",
        required=True,
        metavar="NAME",
        help="name or address of the server (several: again)",
    )
    parser.add_argument(
        "--clients", required=True, metavar="A,B,…", help="the clients of the configuration"
    )
    parser.set_defaults(carry_out=_equip)


def _equip(options: argparse.Namespace) -> int:
    from hetero_fl.deployment.certificates import equip

    for path in equip(
        options.folder, options.host, [name.strip() for name in options.clients.split(",")]
    ):
        print(path)
    return 0


# `hetero-fl status`: how a run across machines stands.

ADDRESS = re.compile(r"(https?://.+)|([^/\s]+:\d+)")


def setup_status(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "run", metavar="OUT|ADDRESS", help="run directory, or host:port of a server's metrics"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(carry_out=run_status)


def run_status(options: argparse.Namespace) -> int:
    """Parse, look, print."""
    if Path(options.run).exists() or not ADDRESS.fullmatch(options.run):
        from hetero_fl.deployment.monitoring import read_status

        tree = read_status(Path(options.run))
    else:
        from hetero_fl.deployment.monitoring import look

        tree = look(options.run)
    if options.json:
        print(json.dumps(tree, indent=1))
        return 0
    from rich.console import Console

    try:
        print_status(tree, Console(highlight=False, soft_wrap=True))
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{options.run}: what is shown there is no status that this release knows"
        ) from None
    return 0


def print_status(tree: Mapping[str, Any], console: Console) -> None:
    """A few lines: the run, its figures, a row for each node, what happened last."""
    from rich.text import Text

    from hetero_fl.reporting.formatting import duration, evaluated, size
    from hetero_fl.utils.text import plural

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
    line += (
        f"; {plural(tree['failures'], 'upload')} asked for and not used" if tree["failures"] else ""
    )
    line += (
        f"; the last round took {duration(tree['seconds'])}" if tree["seconds"] is not None else ""
    )
    line += f"; ε {tree['epsilon']:.3g}" if tree["epsilon"] is not None else ""
    show(line)
    show(
        f"versions: hetero_fl {versions['package']}, torch {versions['torch']}, messages {versions['protocol']}"
    )
    width = max(map(len, tree["nodes"]), default=0)
    for client, node in tree["nodes"].items():
        since = (
            ""
            if node["since"] is None
            else f" for {duration(max(0.0, tree['updated'] - node['since']))}"
        )
        word = "here" if node["here"] else "gone" if node["since"] is not None else "has not come"
        show(f"{client:{width}}  {word}{since}", "  ")
    for event in tree["events"][-5:]:
        show(f"{duration(max(0.0, now - event['time']))} ago: {event['message']}", "  ")
