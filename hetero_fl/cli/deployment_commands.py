"""The commands `federate`, `server`, `node`, `flower-app`, `certificates` and `status`."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.exceptions import Exit

from hetero_fl.cli.run_options import (
    PATH,
    allow_code_option,
    code_permission,
    command,
    config_option,
    overrides_argument,
    quiet_option,
    training_command,
)
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.processes import CompanionProcess

if TYPE_CHECKING:
    from rich.console import Console

    from hetero_fl.reporting.run import Run

LAUNCHER = "hetero_fl.deployment.local.fork_server"
CERTIFICATES_HINT = "`hetero-fl certificates` makes one"
ADDRESS = re.compile(r"(https?://.+)|([^/\s]+:\d+)")


@training_command
def federate(source: Path, **options: Any) -> Run:
    """Train as a real federation on this machine, a process for each client."""
    # before torch is loaded here: the nodes load it in the same time
    launcher = CompanionProcess(LAUNCHER)
    with launcher:
        from hetero_fl.deployment.local.launcher import run_local_federation

        return run_local_federation(source, launcher=launcher, **options)


@training_command
@click.option(
    "--server",
    "server_file",
    type=PATH,
    metavar="FILE",
    help=f"address of the server and the nodes that may connect; {CERTIFICATES_HINT}",
)
def server(source: Path, server_file: Path | None, **options: Any) -> Run:
    """Train with nodes on other machines."""
    if server_file is None:
        raise UserError(f"--server is missing: name a file ({CERTIFICATES_HINT})")
    from hetero_fl.deployment.server import run_server

    return run_server(source, server_file, **options)


@command()
@click.option(
    "--site", type=PATH, metavar="FILE", help=f"this site's own file; {CERTIFICATES_HINT}"
)
@click.option(
    "--once", is_flag=True, help="end when a run is over (default: wait for the next one)"
)
@click.option(
    "--audit",
    type=PATH,
    metavar="FILE",
    help="print a node's log, audit.jsonl in its folder, and check it",
)
@click.option(
    "--key",
    type=PATH,
    metavar="FILE",
    help="with --audit: the node's public key (….pub), which shows who wrote the log",
)
@click.option(
    "--head",
    metavar="N:HASH",
    help="with --audit: what was noted of the log earlier, which must still be in it",
)
@allow_code_option
@quiet_option
def node(
    site: Path | None,
    once: bool,
    audit: Path | None,
    key: Path | None,
    head: str | None,
    allow_code: bool,
    quiet: bool,
) -> None:
    """Run one site of such a federation, on a machine of its own."""
    if audit is not None:
        _verify_audit_log(audit, key, head)
        return
    if site is None:
        raise UserError(f"--site is missing: name a file ({CERTIFICATES_HINT}); or --audit")
    from hetero_fl.deployment.flower.worker import run_node

    if run_node(site, once, code_permission(allow_code), quiet):
        raise Exit(130)


def _verify_audit_log(path: Path, key: Path | None, head: str | None) -> None:
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


@command("flower-app")
@click.argument("folder", type=PATH, metavar="DIR")
@overrides_argument
@config_option
@allow_code_option
def flower_app(
    folder: Path, overrides: tuple[str, ...], config: Path | None, allow_code: bool
) -> None:
    """Write a configuration as a Flower app: `flwr run DIR` trains on an existing federation."""
    if config is None:
        raise UserError("--config is missing: name a YAML or JSON file")
    from hetero_fl.deployment.flower.commands import check_installed

    check_installed()
    from hetero_fl.deployment.flower.app import write_app

    for path in write_app(folder, config, overrides, code_permission(allow_code)):
        print(path)
    print(f"to train: flwr run {folder}", file=sys.stderr)


@command()
@click.argument(
    "folder",
    type=PATH,
    metavar="DIR",
    help="a new folder: one for the server in it, one for each site",
)
@click.option(
    "--host",
    "hosts",
    multiple=True,
    required=True,
    metavar="NAME",
    help="name or address of the server (several: again)",
)
@click.option("--clients", required=True, metavar="A,B,…", help="the clients of the configuration")
def certificates(folder: Path, hosts: tuple[str, ...], clients: str) -> None:
    """Make the keys and certificates of a federation's machines."""
    from hetero_fl.deployment.certificates import provision

    for path in provision(folder, hosts, [name.strip() for name in clients.split(",")]):
        print(path)


@command()
@click.argument(
    "run", metavar="OUT|ADDRESS", help="run directory, or host:port of a server's metrics"
)
@click.option("--json", "as_json", is_flag=True, help="as JSON")
def status(run: str, as_json: bool) -> None:
    """Show the state of a run across machines: nodes, round, figures."""
    from hetero_fl.deployment.monitoring import fetch_status, read_status

    is_address = not Path(run).exists() and ADDRESS.fullmatch(run)
    tree = fetch_status(run) if is_address else read_status(Path(run))
    if as_json:
        print(json.dumps(tree, indent=1))
        return
    from jinja2 import UndefinedError
    from rich.console import Console

    try:
        print_status(tree, Console(highlight=False, soft_wrap=True))
    except (KeyError, TypeError, AttributeError, UndefinedError):
        raise UserError(
            f"{run}: what is shown there is no status that this release knows"
        ) from None


def print_status(tree: Mapping[str, Any], console: Console) -> None:
    """Print a few lines: the run, its figures, a row for each node, what happened last."""
    from rich.text import Text

    from hetero_fl.reporting.formatting import format_evaluation
    from hetero_fl.reporting.rendering import render

    text = render(
        "status.txt",
        status=tree,
        scores=format_evaluation(tree),
        width=max(map(len, tree["nodes"]), default=0),
        now=time.time(),
    )
    console.print(Text(text), end="")
