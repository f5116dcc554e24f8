"""A run that a node takes part in: begun when it hears the configuration, prepared when it hears who else is in it."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hetero_fl.channel.privacy.noise import SecretNoise
from hetero_fl.codec import CodecError, as_bytes
from hetero_fl.config import Config, expand, load_config
from hetero_fl.data import FederatedData
from hetero_fl.data.elsewhere import held_at, told_by
from hetero_fl.data.pack import Pack
from hetero_fl.data.private import Told
from hetero_fl.environment import choose_device
from hetero_fl.experiment.deployment.account import Account
from hetero_fl.experiment.deployment.audit_log import Entry
from hetero_fl.experiment.deployment.hearing import hear_told
from hetero_fl.experiment.deployment.messages import Refused
from hetero_fl.experiment.deployment.policy import Policy
from hetero_fl.experiment.deployment.roll import fingerprint_of
from hetero_fl.experiment.deployment.site_file import SiteConfig
from hetero_fl.experiment.deployment.terms import check_config, check_raw, mark_of
from hetero_fl.experiment.deployment.vault import Cipher, Vault
from hetero_fl.experiment.prepared import deal, prepare
from hetero_fl.own_code import CodePermission
from hetero_fl.payload import Payload
from hetero_fl.runtime.jobs import Setup, Worker

MOST_THREADS = 1024
MODEL = "model.safetensors"  # in the folder of a run: what the site uses after the last round


@dataclass
class Joined:
    """The run that a node takes part in."""

    run: str
    config: Config
    data: FederatedData
    vault: Vault
    account: Account
    noise: SecretNoise
    worker: Worker | None = None  # once the roster is known
    policy: Policy | None = None  # likewise

    def prepare(self, site: SiteConfig, tree: Any, leaving: Callable[[str, Payload], None]) -> str:
        """Everything about the run is known now. Returns the fingerprint of the federation.

        `leaving` is told of each upload before it is encoded. Raises Refused if the server means another federation.
        """
        outputs = self.data.task.outputs
        told = {id: hear_told(each, outputs, self.data.own_view(id)) for id, each in tree["told"].items()}
        prepared = prepare(self.config, data=held_at(self.data, site.client, told))
        if (found := fingerprint_of(prepared)) != tree["fingerprint"]:
            raise Refused("this site makes other clients of the configuration than the server does")
        others = hashlib.sha256(repr(sorted(told.items())).encode()).digest()
        if self.vault.read("roster") not in (None, others):
            raise Refused("what is said of the others' rows is not what was said when it began this run")
        self.vault.write("roster", others)
        federation = replace(prepared.federation, noise=self.noise)
        device = choose_device(site.device or self.config.runtime.device)
        if not 1 <= (threads := int(tree["threads"])) <= MOST_THREADS:
            raise Refused(f"threads: found {threads}; expected 1 to {MOST_THREADS}")
        threads = min(threads, site.threads or threads)
        setup = Setup(prepared.method, federation, threads, (str(device),), 1, self.config.runtime.precision)
        self.worker, self.policy = Worker(setup, 0), Policy(site, prepared, self.account)
        self.worker.site.leaving = leaving
        return found


def begin(
    site: SiteConfig, folder: Path, cipher: Cipher | None, entries: Iterable[Entry], run: str, tree: Any
) -> tuple[Joined, Told] | None:
    """A run whose configuration a site has heard, and what it tells of its rows; None if it lacks the public sets.

    Raises Refused for what the site does not grant, and for another configuration than it heard before.
    """
    me, raw = site.client, check_raw(tree["config"], site.allows)
    permission = CodePermission(granted=site.allows.own_code)
    config = load_config(raw, allow_code=permission).model_copy(update={"init_from": None})  # a folder of the server's
    clients = expand(config.clients)
    if me not in clients:
        raise Refused(f"the configuration has no client '{me}'")
    check_config(config, site, clients[me])
    if site.data is None:
        data = deal(config)
        if data.public_hash() != tree["public"]:
            raise Refused("the public sets that its configuration names are not the server's")
    else:
        pack = _pack(Vault(folder / "public", cipher), tree)
        if pack is None:
            return None
        own = clients[me].model_copy(update={"data": site.data})
        data = pack.held_by(me, config.data, {**clients, me: own}, config.seed)
    own_view = clients[me].preprocess.normalize == "own"
    told = told_by(data, me, own_view, site.tells.labels)
    vault = Vault(folder / "runs" / plain(run), cipher)
    mark = mark_of(raw, told.hash, str(tree["public"]))
    if (known := vault.read("terms")) is None:
        vault.write("terms", mark)
    elif known != mark:
        raise Refused(
            "the configuration, the public sets or this site's rows are not those with which it began this run"
        )
    secret = vault.secret("noise")
    if site.allows.privacy is not None:  # who guesses all rows but one could try the last against a plain hash
        told = replace(told, hash=hmac.new(secret, told.hash.encode(), hashlib.sha256).hexdigest())
    return Joined(run, config, data, vault, Account.of(entries, run), SecretNoise(secret)), told


def _pack(kept: Vault, tree: Any) -> Pack | None:
    """The public sets that the server has named by their hash: from this message, or kept from an earlier one."""
    public = str(tree["public"])
    data = as_bytes(tree["pack"]) if tree.get("pack") is not None else kept.read(plain(public))
    if data is None:
        return None
    try:
        pack = Pack.decode(data)
    except (CodecError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"the public sets cannot be read ({error})") from None
    if pack.hash() != public:
        raise Refused("the public sets are not those that were named")
    kept.write(plain(public), data)
    return pack


def plain(name: str) -> str:
    """A name from outside as one of a file. Raises Refused for one that is none."""
    if not (name.isalnum() and len(name) <= 64):
        raise Refused(f"found the name {name[:80]!r}")
    return name
