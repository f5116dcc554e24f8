"""Homomorphic encryption on nodes: the server has no key, and runs resume after crashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tenseal", reason="tenseal is not installed: pip install 'hetero_fl[privacy]'")

from hetero_fl.communication.homomorphic.key import SharedKey
from hetero_fl.communication.homomorphic.messages import REPLIES, REQUESTS
from hetero_fl.communication.named_arrays import decode_arrays
from hetero_fl.deployment.audit_log import verify
from hetero_fl.deployment.config import AllowsConfig, SiteConfig
from hetero_fl.deployment.messages import RequestRefusedError
from hetero_fl.deployment.sites import Sites as ServerSites
from hetero_fl.experiment import run
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.support.cases import each_case
from tests.support.federations import same_bits
from tests.support.homomorphic import encrypted, shared_key
from tests.support.nodes import (
    ALL,
    EventLines,
    LossyTransport,
    RecordingTransport,
    Sites,
    federation,
    records,
)

CLIENTS = ["site_1", "site_2", "site_3"]
CONFIG = encrypted("fedadam", "mlp", 3, rounds=2)


class KeyedSites(Sites):
    """Nodes that share a key, or have the keys of `keys` by client."""

    keys: dict[str, Path | None]
    allows: AllowsConfig

    def site(self, client: str) -> SiteConfig:
        key = self.keys[client]
        return SiteConfig(
            client=client,
            tells=ALL,
            shared_key=None if key is None else str(key),
            allows=self.allows,
        )


def keyed_sites(
    tmp_path: Path,
    *rest: object,
    keys: dict[str, Path | None] | None = None,
    allows: AllowsConfig | None = None,
    **options: object,
) -> KeyedSites:
    file = tmp_path / "shared.key"
    shared_key().save(file)
    KeyedSites.keys = {**dict.fromkeys(CLIENTS, file), **(keys or {})}
    KeyedSites.allows = allows or AllowsConfig()
    return KeyedSites(CLIENTS, tmp_path / "sites", *rest, **options)  # type: ignore[arg-type]


def test_no_byte_at_the_server_reveals_the_key(tmp_path: Path) -> None:
    transport = RecordingTransport()
    sites = keyed_sites(tmp_path, transport=transport)

    deployed = federation(CONFIG, sites, tmp_path / "deployed")

    simulated = run(CONFIG, out=tmp_path / "simulated", quiet=True)
    for name in ("global", "personal", "server", "communication"):
        assert deployed.summary[name] == simulated.summary[name]
    for client in CLIENTS:
        one, two = (r.model(client).state_dict() for r in (deployed, simulated))
        assert same_bits(one, two)
    tasks = [e for e in transport.requests if e.head.get("kind") == "answer"]
    assert [e.head["what"] for e in tasks] == [*["train"] * 3, "aggregate"] * 2
    # The clients take turns to decrypt the sum.
    logs = {c: verify(tmp_path / "sites" / c / "audit.jsonl") for c in CLIENTS}
    turns = {
        c: [e["round"] for e in log if e.get("what") == "aggregate"] for c, log in logs.items()
    }
    assert turns == {"site_1": [0], "site_2": [1], "site_3": []}
    kinds = [e["kinds"] for e in logs["site_3"] if e.get("what") == "train"]
    assert kinds == [["encrypted model: params, training loss"]] * 2
    # No byte at the server is of the key.
    key = shared_key()
    out = tmp_path / "deployed"
    at_server = b"".join(e.body for e in transport.received)
    at_server += b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    for secret in (key.seal, key.secret[:64], key.secret[1000:1064], key.secret[-64:]):
        assert secret not in at_server
    assert not list(out.rglob("*.key"))
    uploads = [e for e in transport.received if e.head.get("what") == "train"]
    names = {decode_arrays(e.body, REPLIES["train"])["key"].tobytes() for e in uploads}
    assert names == {key.name}


@pytest.mark.slow
def test_node_that_dies_while_it_decrypts_is_replaced(tmp_path: Path) -> None:
    """Its upload stays in the sum."""
    sites = keyed_sites(tmp_path, {("site_1", 0, "aggregate"): "before"}, away=None)
    source = {**CONFIG, "rounds": 1}

    deployed = federation(source, sites, tmp_path / "deployed")

    assert records(deployed)[0]["counts"]["arrived"] == 3
    simulated = run(source, out=tmp_path / "simulated", quiet=True)
    for client in ("site_2", "site_3"):
        one, two = (r.model(client).state_dict() for r in (deployed, simulated))
        assert same_bits(one, two)


@pytest.mark.slow
def test_server_killed_in_any_exchange_resumes(tmp_path: Path) -> None:
    expected = run(CONFIG, out=tmp_path / "simulated", quiet=True)
    sites = keyed_sites(tmp_path)

    # 9 messages until all are ready, 4 per round and 3 per evaluation.
    deployed = federation(CONFIG, sites, tmp_path / "deployed", [9 + 2, 9 + 4, 9 + 9, 9 + 4])

    assert deployed.summary["global"] == expected.summary["global"]
    for client in CLIENTS:
        one, two = (r.model(client).state_dict() for r in (deployed, expected))
        assert same_bits(one, two)


@each_case(
    ("changes", "message"),
    [
        ({"keys": {"site_2": None}}, "site_2: .*channel.homomorphic: requires shared_key"),
        ({"allows": AllowsConfig(cohort=2)}, "cannot be combined .*allows.cohort"),
    ],
)
def test_site_refuses_the_run(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    sites = keyed_sites(tmp_path, **changes)

    with pytest.raises(RunFailedError, match=message):
        federation(CONFIG, sites, tmp_path / "deployed")


def test_site_that_permits_sums_only_accepts_encryption(tmp_path: Path) -> None:
    sites = keyed_sites(tmp_path, allows=AllowsConfig(secure_sum_only=True, steps=1000))

    assert len(records(federation({**CONFIG, "rounds": 1}, sites, tmp_path / "deployed"))) == 1


@each_case("wrong", CLIENTS)
def test_run_with_different_keys_is_refused(wrong: str, tmp_path: Path) -> None:
    other = tmp_path / "other.key"
    SharedKey.generate().save(other)
    sites = keyed_sites(tmp_path, keys={wrong: other})

    with pytest.raises(
        RunFailedError,
        match=r"site_\d: .*shared_key: differs from the key at site_\d; use",
    ) as error:
        federation(CONFIG, sites, tmp_path / "deployed")

    assert wrong in str(error.value) and "\n" not in str(error.value)


def test_key_is_compared_with_that_at_the_start_of_the_run() -> None:
    sites = ServerSites(LossyTransport(), CLIENTS, EventLines())
    sites.shared_key = ("site_2", "aa")

    sites._check_shared_key("site_1", "aa")
    for client, reference in (("site_1", "the key at site_2"), ("site_2", "its key at the start")):
        with pytest.raises(RequestRefusedError, match=f"shared_key: differs from {reference}; use"):
            sites._check_shared_key(client, "bb")


def test_invalid_key_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "shared.key"
    with pytest.raises(UserError, match=r"the key cannot be read .*hetero-fl shared-key FILE"):
        SharedKey.load(file)
    file.write_bytes(b"not a key")
    file.chmod(0o600)
    with pytest.raises(UserError, match="not a key of homomorphic encryption"):
        SharedKey.load(file)
    shared_key().save(file)
    assert SharedKey.load(file) == shared_key()
    file.chmod(0o644)
    with pytest.raises(UserError, match="other users can read this key; run chmod 600"):
        SharedKey.load(file)
    assert set(REQUESTS) == set(REPLIES)
