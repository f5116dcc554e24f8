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
    add_code_option,
    add_run_options,
    code_permission_from,
    load_checked_run,
    make_printer,
    print_results_location,
)
from hetero_fl.utils.errors import UserError, printable
from hetero_fl.utils.processes import CompanionProcess

if TYPE_CHECKING:
    from rich.console import Console


# `hetero-fl federate`: what `train` does, by a real federation on this machine.

LAUNCHER = "hetero_fl.deployment.local.fork_server"


def setup_federate(parser: argparse.ArgumentParser) -> None:
    """The command's options: those of `train`."""
    add_run_options(parser)
    parser.set_defaults(run_command=run_federate)


def run_federate(options: argparse.Namespace) -> int:
    """Parse, call, print."""
    permission = code_permission_from(options)
    if (source := load_checked_run(options, permission)) is None:
        return 0
    # before torch is loaded here: the nodes load it in the same time
    launcher = CompanionProcess(LAUNCHER)
    with launcher:
        from hetero_fl.deployment.local.launcher import run_local_federation

        finished = run_local_federation(
            source,
            out=options.out,
            resume=options.resume,
            overrides=options.overrides,
            quiet=options.quiet,
            launcher=launcher,
            allow_code=permission,
        )
    print_results_location(finished, make_printer(options))
    return 0


# `hetero-fl server` and `hetero-fl node`: the two sides of a federation, for machines of their own.

CERTIFICATES_HINT = "`hetero-fl certificates` makes one"


def setup_server(parser: argparse.ArgumentParser) -> None:
    """The command's options: those of `train`, and the server's own file."""
    add_run_options(parser)
    parser.add_argument(
        "--server",
        type=Path,
        metavar="FILE",
        help=f"where it listens, who may come; {CERTIFICATES_HINT}",
    )
    parser.set_defaults(run_command=_run_server)


def _run_server(options: argparse.Namespace) -> int:
    permission = code_permission_from(options)
    if (source := load_checked_run(options, permission)) is None:
        return 0
    if options.server is None:
        raise UserError(f"--server is missing: name a file ({CERTIFICATES_HINT})")
    from hetero_fl.deployment.server import run_server

    finished = run_server(
        source,
        options.server,
        out=options.out,
        resume=options.resume,
        overrides=options.overrides,
        allow_code=permission,
        quiet=options.quiet,
    )
    print_results_location(finished, make_printer(options))
    return 0


def setup_node(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--site", type=Path, metavar="FILE", help=f"this site's own file; {CERTIFICATES_HINT}"
    )
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
    add_code_option(parser)
    parser.set_defaults(run_command=_run_node)


def _run_node(options: argparse.Namespace) -> int:
    if options.audit is not None:
        return _verify_audit_log(options.audit, options.key, options.head)
    if options.site is None:
        raise UserError(f"--site is missing: name a file ({CERTIFICATES_HINT}); or --audit")
    from hetero_fl.deployment.node import run_node

    return (
        130
        if run_node(options.site, options.once, code_permission_from(options), options.quiet)
        else 0
    )


def _verify_audit_log(path: Path, key: Path | None, head: str | None) -> int:
    from hetero_fl.deployment.audit_log import format_entries, traffic_totals, verified_head, verify
    from hetero_fl.deployment.certificates import load_public_key

    entries = verify(path, None if key is None else load_public_key(key), head)
    print(*format_entries(entries), sep="\n")
    sums = traffic_totals(entries)
    print(f"whole: {len(entries):,} messages; of tasks {sums.down:,} bytes came, {sums.up:,} went")
    print(f"head: {verified_head(path)}")
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
    parser.set_defaults(run_command=_run_certificates)


def _run_certificates(options: argparse.Namespace) -> int:
    from hetero_fl.deployment.certificates import provision

    for path in provision(
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
    parser.set_defaults(run_command=run_status)


def run_status(options: argparse.Namespace) -> int:
    """Parse, look, print."""
    if Path(options.run).exists() or not ADDRESS.fullmatch(options.run):
        from hetero_fl.deployment.monitoring import read_status

        tree = read_status(Path(options.run))
    else:
        from hetero_fl.deployment.monitoring import fetch_status

        tree = fetch_status(options.run)
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

    from hetero_fl.reporting.formatting import format_bytes, format_duration, format_evaluation
    from hetero_fl.utils.text import pluralize

    def show(line: str, indent: str = "") -> None:
        console.print(Text(indent + printable(line)))

    now = time.time()
    versions = tree["versions"]
    told = "waiting for the nodes" if tree["phase"] == "waiting" else tree["phase"]
    if tree["phase"] == "gone":
        told = "its process has gone; --resume goes on"
    show(f"{tree['name']}, {tree['algorithm']}: {told}, round {tree['round']} of {tree['rounds']}")
    if figures := format_evaluation(tree):
        show(figures)
    line = f"{format_bytes(tree['up_bytes'])} up, {format_bytes(tree['down_bytes'])} down"
    line += (
        f"; {pluralize(tree['failures'], 'upload')} asked for and not used"
        if tree["failures"]
        else ""
    )
    line += (
        f"; the last round took {format_duration(tree['seconds'])}"
        if tree["seconds"] is not None
        else ""
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
            else f" for {format_duration(max(0.0, tree['updated'] - node['since']))}"
        )
        word = "here" if node["here"] else "gone" if node["since"] is not None else "has not come"
        show(f"{client:{width}}  {word}{since}", "  ")
    for event in tree["events"][-5:]:
        show(f"{format_duration(max(0.0, now - event['time']))} ago: {event['message']}", "  ")
