"""The commands `federate`, `server`, `node`, `certificates`, `shared-key`, `status` and others."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.exceptions import Exit

from hetero_fl.cli.run_options import (
    METHODS_HINT,
    PATH,
    allow_code_option,
    code_permission,
    command,
    config_option,
    examples,
    overrides_argument,
    quiet_option,
    training_command,
)
from hetero_fl.utils.errors import UserError, echo

if TYPE_CHECKING:
    from rich.console import Console

    from hetero_fl.reporting.run import Run

CERTIFICATES_HINT = "created by `hetero-fl certificates`"
ADDRESS = re.compile(r"(https?://.+)|([^/\s]+:\d+)")


@training_command("hetero-fl federate -c configs/digits_quickstart.yaml rounds=2")
def federate(source: Path, **options: Any) -> Run:
    """Train with a server and one process per client on this machine."""
    from hetero_fl.deployment.local import run_local_federation

    return run_local_federation(source, **options)


@training_command("hetero-fl server -c federation.yaml --server net/server/server.yaml")
@click.option(
    "--server",
    "server_file",
    type=PATH,
    metavar="FILE",
    help=f"Server file with the port and the permitted nodes, {CERTIFICATES_HINT}.",
)
def server(source: Path, server_file: Path | None, **options: Any) -> Run:
    """Run the server of a federation that spans several machines."""
    if server_file is None:
        raise UserError(f"--server: missing; expected a file {CERTIFICATES_HINT}")
    from hetero_fl.deployment.server import run_server

    return run_server(source, server_file, **options)


@command(
    epilog=examples(
        "hetero-fl node --site net/clinic_1/site.yaml",
        "hetero-fl node --audit net/clinic_1/state/audit.jsonl --key net/clinic_1/key.pub",
    )
)
@click.option("--site", type=PATH, metavar="FILE", help=f"Site file, {CERTIFICATES_HINT}.")
@click.option("--once", is_flag=True, help="Exit after one run instead of waiting for the next.")
@click.option(
    "--audit",
    type=PATH,
    metavar="FILE",
    help="Verify and print the audit log of a node (audit.jsonl in its state folder), and exit.",
)
@click.option(
    "--key",
    type=PATH,
    metavar="FILE",
    help="With --audit: file with the public key of the node (.pub), to verify the signatures.",
)
@click.option(
    "--head",
    metavar="N:HASH",
    help="With --audit: number of entries and hash of the last one, as printed by an earlier "
    "verification. The log must contain this entry.",
)
@allow_code_option
@quiet_option
def node(
    *,
    site: Path | None,
    once: bool,
    audit: Path | None,
    key: Path | None,
    head: str | None,
    allow_code: bool,
    quiet: bool,
) -> None:
    """Run the node of one site in a federation that spans several machines."""
    if audit is not None:
        _verify_audit_log(audit, key, head)
        return
    if site is None:
        raise UserError(f"--site: missing; expected a file {CERTIFICATES_HINT}, or use --audit")
    from hetero_fl.deployment.flower.worker import run_node

    if run_node(site, once, code_permission(allow_code), quiet=quiet):
        raise Exit(130)


def _verify_audit_log(path: Path, key: Path | None, head: str | None) -> None:
    from hetero_fl.deployment.audit_log import format_entries, traffic_totals, verified_head, verify
    from hetero_fl.deployment.certificates import load_public_key

    entries = verify(path, None if key is None else load_public_key(key), head)
    echo("\n".join(format_entries(entries)))
    traffic = traffic_totals(entries)
    echo(
        f"log complete: {len(entries):,} messages; "
        f"tasks: {traffic.down:,} bytes received, {traffic.up:,} bytes sent"
    )
    echo(f"head: {verified_head(path)}")
    if key is None:
        echo(
            "signatures were not checked, so lines may have been appended; "
            "check them with --key and the site's public key"
        )


@command(
    "flower-app",
    epilog=examples(
        "hetero-fl flower-app my-app -c configs/digits_quickstart.yaml",
        "flwr run my-app",
        hint=METHODS_HINT,
    ),
)
@click.argument("folder", type=PATH, metavar="DIR", help="Folder to write the app to.")
@overrides_argument
@config_option()
@allow_code_option
def flower_app(
    folder: Path, overrides: tuple[str, ...], config: Path | None, allow_code: bool
) -> None:
    """Write a Flower app to train with `flwr run`."""
    if config is None:
        raise UserError("--config: missing; expected a YAML or JSON file")
    from hetero_fl.deployment.flower.commands import check_flower

    check_flower()
    from hetero_fl.deployment.flower.app import write_app

    for path in write_app(folder, config, overrides, code_permission(allow_code)):
        echo(path)
    echo(f"to train: flwr run {folder}", err=True)


@command(
    epilog=examples("hetero-fl certificates net --host fl.example.org --clients clinic_1,clinic_2")
)
@click.argument(
    "folder",
    type=PATH,
    metavar="DIR",
    help="New folder, in which a subfolder is created for the server and for each site.",
)
@click.option(
    "--host",
    "hosts",
    multiple=True,
    required=True,
    metavar="NAME",
    help="Host name or address of the server; may be repeated.",
)
@click.option(
    "--clients", required=True, metavar="A,B,...", help="Client ids, as in the configuration."
)
def certificates(folder: Path, hosts: tuple[str, ...], clients: str) -> None:
    """Create keys and certificates for a server and its sites."""
    from hetero_fl.deployment.certificates import provision

    for path in provision(folder, hosts, [name.strip() for name in clients.split(",")]):
        echo(path)


@command("shared-key", epilog=examples("hetero-fl shared-key shared.key"))
@click.argument("file", type=PATH, metavar="FILE", help="New file for the key.")
def shared_key(file: Path) -> None:
    """Create the key of homomorphic encryption, which all sites share and the server never gets."""
    from hetero_fl.communication.homomorphic.key import SharedKey

    if file.exists():
        raise UserError(f"{file}: already exists; choose another file or delete it")
    SharedKey.generate().save(file)
    echo(file)


@command(epilog=examples("hetero-fl status runs/my-run", "hetero-fl status 127.0.0.1:9464 --json"))
@click.argument(
    "run",
    metavar="RUN|ADDRESS",
    help="Run directory, or address (host:port or URL) of the server's metrics endpoint.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON.")
def status(run: str, as_json: bool) -> None:
    """Show the nodes, the current round and the metrics of a federation."""
    from hetero_fl.deployment.monitoring import fetch_status, read_status

    is_address = not Path(run).exists() and ADDRESS.fullmatch(run)
    content = fetch_status(run) if is_address else read_status(Path(run))
    if as_json:
        echo(json.dumps(content, indent=1))
        return
    from jinja2 import UndefinedError

    from hetero_fl.reporting.terminal import Terminal

    try:
        print_status(content, Terminal(highlight=False, soft_wrap=True))
    except (KeyError, TypeError, AttributeError, UndefinedError):
        raise UserError(f"{run}: the status has an unknown format; upgrade hetero_fl") from None


def print_status(content: Mapping[str, Any], console: Console) -> None:
    """Print the run, the metrics, one line for each node, and the latest events.

    Args:
        content: Status of the server (see `hetero_fl.deployment.monitoring`).
        console: Console for the output.
    """
    from rich.text import Text

    from hetero_fl.reporting.formatting import format_evaluation
    from hetero_fl.reporting.rendering import render

    text = render(
        "status.txt",
        status=content,
        scores=format_evaluation(content),
        width=max(map(len, content["nodes"]), default=0),
        now=time.time(),
    )
    console.print(Text(text), end="")
