"""A configuration exported as a Flower app and run by Flower's own commands."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

import yaml

import hetero_fl
from hetero_fl.cli import main
from hetero_fl.deployment.audit_log import verify
from hetero_fl.deployment.flower.app import PACKAGE, write_app
from hetero_fl.deployment.node_files import load_public_key
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.federations import config
from tests.support.flower_federation import MAKE_KEYS, FlowerFederation, worker_processes
from tests.support.nodes import models, until

CLIENTS = ("site_1", "site_2", "site_3")
needs_key_tools = pytest.mark.skipif(
    shutil.which("openssl") is None or shutil.which("ssh-keygen") is None,
    reason="openssl or OpenSSH is not installed",
)
TELLS = {"labels": True, "details": True, "model": True}


def test_app_can_be_built_by_flower(tmp_path: Path) -> None:
    source = tmp_path / "config.yaml"
    source.write_text(yaml.safe_dump(config("fedmd")))

    status = main(["flower-app", str(tmp_path / "app"), "--config", str(source), "rounds=7"])

    assert status == 0
    packed = yaml.safe_load((tmp_path / "app" / "hetero_fl_app" / "config.yaml").read_text())
    assert packed["rounds"] == 7
    command = [str(Path(sys.executable).with_name("flwr")), "build", "--app", "app"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr


@each_case(
    ("changes", "names", "message"),
    [
        ({}, ["notes.txt"], "app: already exists; choose a new folder"),
        ({"attacks": {"fraction": 0.34, "kind": "noise"}}, [], "attacks"),
    ],
)
def test_refused_app_writes_nothing(
    changes: dict[str, Any], names: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "app").mkdir()
    for name in names:
        (tmp_path / "app" / name).write_text("mine")

    with pytest.raises(UserError, match=message):
        write_app(tmp_path / "app", config("fedavg", **changes))

    assert [path.name for path in (tmp_path / "app").iterdir()] == names


@pytest.mark.slow
@needs_key_tools
def test_flwr_run_with_tls_and_keys_equals_simulation(tmp_path: Path) -> None:
    source = config(
        "hybrid", "cnn_gn_small", rounds=2, runtime={"executor": "serial", "threads": 1}
    )
    write_app(tmp_path / "app", source)
    keys = tmp_path / "federation" / "net"
    sites = {client: {"tells": TELLS, "key": str(keys / client / "key")} for client in CLIENTS}

    with FlowerFederation(tmp_path / "federation", sites, secure=True) as federation:
        known = {client: f"federation/net/{client}/key.pub" for client in CLIENTS}
        (tmp_path / "nodes.yaml").write_text(yaml.safe_dump(known))
        settings = {"out": str(tmp_path / "run"), "nodes": str(tmp_path / "nodes.yaml")}
        ended = federation.run(tmp_path / "app", **settings)
        assert ended.startswith("finished:completed"), federation.log("superlink")[-3000:]
        files = [federation.site(client) for client in CLIENTS]
        assert len(worker_processes(files)) == len(CLIENTS)

    until(lambda: not worker_processes(files))
    simulated = hetero_fl.run(source, out=tmp_path / "simulated")
    assert models(hetero_fl.Run(tmp_path / "run")) == models(simulated) and models(simulated)
    for client in CLIENTS:
        folder = tmp_path / "federation" / client / "state"
        assert verify(folder / "audit.jsonl", load_public_key(keys / client / "key.pub"))


@pytest.mark.slow
@needs_key_tools
def test_only_registered_keys_and_the_known_server_are_accepted(tmp_path: Path) -> None:
    other = tmp_path / "other"
    command = [MAKE_KEYS, other, "127.0.0.1", "site_1"]
    subprocess.run(command, check=True, capture_output=True)

    with FlowerFederation(tmp_path / "federation", {"site_1": {}}, secure=True) as federation:
        federation.start_node("site_1", "unregistered", key=other / "site_1" / "key")
        federation.start_node("site_1", "misled", authority=other / "authority.pem")

        assert federation.wait_for("unregistered") != 0
        assert federation.wait_for("misled") != 0
        until(lambda: [node["status"] for node in federation.nodes()] == ["online"])
        assert "certificate verify failed" in federation.log("misled")


# The answers of a site to tasks are, in turn, too large, with a head that is too large, an array
# that names one MiB so often that it exceeds the memory of the machine, and correct.
HOSTILE_CLIENT = """
import os
from pathlib import Path

from flwr.app import Message
from hetero_fl.deployment.flower.client_app import BODY, from_message, handle_query, to_content
from hetero_fl.deployment.transport import Envelope
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def answer(message, context):
    site = Path(context.node_config["site"])
    head = from_message(message).head
    if "site_3" not in str(site) or head.get("what") != "train":
        return handle_query(message, context)
    turn = int(head["round"]) % 4
    if turn == 0:
        return Message(to_content(Envelope({"ask": "done"}, bytes(2**23))), reply_to=message)
    if turn == 1:
        return Message(to_content(Envelope({"ask": "x" * 10**6})), reply_to=message)
    if turn == 2:
        content = to_content(Envelope({"ask": "done"}, bytes(2**20)))
        array = content[BODY][BODY]
        chunks = array.slice_array()
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        array.slice_array = lambda: chunks * (2 * memory // 2**20)
        return Message(content, reply_to=message)
    return handle_query(message, context)
"""


@pytest.mark.slow
def test_hostile_site_loses_only_its_own_uploads(tmp_path: Path) -> None:
    source = config("fedavg", "linear", rounds=4, runtime__executor="serial", cohort__least=2)
    write_app(tmp_path / "app", source)
    (tmp_path / "app" / PACKAGE / "client_app.py").write_text(HOSTILE_CLIENT)

    with FlowerFederation(
        tmp_path / "federation", {client: {} for client in CLIENTS}
    ) as federation:
        settings = {"out": str(tmp_path / "run"), "message_bytes": 2**22}
        ended = federation.run(tmp_path / "app", **settings)
        assert ended.startswith("finished:completed"), federation.log("superlink")[-3000:]

    failed = [record["failed"] for record in hetero_fl.Run(tmp_path / "run").metrics]
    assert [set(each) for each in failed] == [{"site_3"}, {"site_3"}, {"site_3"}, set()]
    assert "must have <= 4,194,304 bytes" in failed[0]["site_3"]
    assert "head: must have" in failed[1]["site_3"]
