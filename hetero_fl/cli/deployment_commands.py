"""The commands `flower-app`, `audit-log`, `shared-key` and `status`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_fl.utils.code_permission import AllowCode
from hetero_fl.utils.errors import UserError, echo

if TYPE_CHECKING:
    from rich.console import Console


def audit_log(log: Path, *, key: Path | None = None, head: str | None = None) -> None:
    """Verify and print the audit log of a site.

    Args:
        log: Audit log of a site (audit.jsonl in its state folder).
        key: File with the public key of the site (.pub), to verify the signatures.
        head: Number of entries and hash of the last one, as N:HASH, which an earlier verification
            has printed. The log must contain this entry.

    Example:
        hetero-fl audit-log /srv/fl/north/state/audit.jsonl --key north.pub
    """
    from hetero_fl.deployment.audit_log import format_entries, traffic_totals, verified_head, verify
    from hetero_fl.deployment.node_files import load_public_key

    entries = verify(log, None if key is None else load_public_key(key), head)
    echo("\n".join(format_entries(entries)))
    traffic = traffic_totals(entries)
    echo(
        f"log complete: {len(entries):,} messages; "
        f"tasks: {traffic.down:,} bytes received, {traffic.up:,} bytes sent"
    )
    echo(f"head: {verified_head(log)}")
    if key is None:
        echo(
            "signatures were not checked, so lines may have been appended; "
            "check them with --key and the site's public key"
        )


def flower_app(
    folder: Path,
    overrides: tuple[str, ...],
    *,
    config: Path,
    allow_code: AllowCode = False,
) -> None:
    """Write a Flower app to train with `flwr run`.

    Args:
        folder: Folder to write the app to.

    Example:
        hetero-fl flower-app my-app -c configs/digits_quickstart.yaml
        flwr run my-app
    """
    from hetero_fl.deployment.flower.app import write_app

    for path in write_app(folder, config, overrides, allow_code):
        echo(path)
    echo(f"to train: flwr run {folder}", err=True)


def shared_key(file: Path) -> None:
    """Create the key of homomorphic encryption, which all sites share and the server never gets.

    Args:
        file: New file for the key.

    Example:
        hetero-fl shared-key shared.key
    """
    from hetero_fl.communication.homomorphic import SharedKey

    if file.exists():
        raise UserError(f"{file}: already exists; choose another file or delete it")
    SharedKey.generate().save(file)
    echo(file)


def status(run: Path, *, as_json: bool = False) -> None:
    """Show the nodes, the current round and the metrics of a federation.

    Args:
        run: Run directory of a federation.
        as_json: Print the status as JSON.

    Example:
        hetero-fl status runs/my-run
        hetero-fl status runs/my-run --json
    """
    from hetero_fl.deployment.monitoring import read_status

    content = read_status(run)
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
