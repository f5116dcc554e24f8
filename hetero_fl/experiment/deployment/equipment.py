"""What the machines of a federation need to know each other: certificates, keys, and files that are ready to be edited."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from hetero_fl.errors import UserError
from hetero_fl.experiment.deployment.certificates import make_node_key, make_server_files

SERVER, AUTHORITY = "server", "authority"  # folders
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
PORT = 9092

SERVER_FILE = """\
# The server of a federation. It listens here, and these nodes may come.
host: 0.0.0.0
port: {port}
certificates: {{authority: authority.pem, certificate: server.pem, key: server.key}}
key: sign        # with which it signs what it says
nodes:
{nodes}
wait: 600        # seconds until all clients of a configuration have to be there
deadline: 3600   # seconds that a node may take for a task
# metrics: {{host: 127.0.0.1, port: 9464}}   # `hetero-fl status 127.0.0.1:9464`, Prometheus, health checks
# logs: json
"""

SITE_FILE = """\
# One site of a federation. What stands here the server cannot override.
client: {client}
server: {{address: "{host}:{port}", authority: authority.pem, key: key, public: server.pub}}
folder: state    # private models and secrets: nobody else's business

# Its own data; without it the site gets the part that the server's configuration deals it, for rehearsals.
# data: {{path: data.npz}}

# What others may know of it, besides what the method sends, the number of its rows and its models' scores.
tells: {{labels: false, details: false, model: false}}
# logs: json
"""


def equip(folder: Path, hosts: Sequence[str], clients: Sequence[str]) -> list[Path]:
    """Make a folder for the server, one for each site, and one for the authority's key. Returns what was written.

    Raises UserError if there is anything in the way, or a name is none of a folder.
    """
    for client in clients:
        if not NAME.fullmatch(client) or client in (SERVER, AUTHORITY):
            raise UserError(f"--clients: found '{client}', which cannot be the name of a folder here")
    if twice := [client for client in clients if list(clients).count(client) > 1]:
        raise UserError(f"--clients: '{twice[0]}' is named twice")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; name a new folder")
    server = folder / SERVER
    made = make_server_files(server, hosts)
    authority = folder / AUTHORITY
    authority.mkdir(mode=0o700)
    os.replace(server / "authority.key", authority / "authority.key")  # the server runs without it
    _write(authority / "authority.pem", made.authority.read_text())
    make_node_key(server / "sign", "server")
    for client in clients:
        site = folder / client
        _write(site / "server.pub", (server / "sign.pub").read_text())
        make_node_key(site / "key", client)
        _write(server / "nodes" / f"{client}.pub", (site / "key.pub").read_text())
        _write(site / "authority.pem", made.authority.read_text())
        _write(site / "site.yaml", SITE_FILE.format(client=client, host=_host(hosts[0]), port=PORT))
    nodes = "\n".join(f"  {client}: nodes/{client}.pub" for client in clients)
    _write(server / "server.yaml", SERVER_FILE.format(port=PORT, nodes=nodes))
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
