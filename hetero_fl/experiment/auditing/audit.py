"""What a finished run gives away: membership of its training rows, and images out of a client's upload."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hetero_fl.config import Config
from hetero_fl.data import Dataset
from hetero_fl.experiment.auditing.inversion import Protect, Say, invert, reason_not_invertible
from hetero_fl.experiment.auditing.membership import (
    candidates,
    client_logits,
    confidence,
    likelihood_ratio,
    loss_score,
    score_attack,
    shadow_seed,
    targets,
    train_shadow,
)
from hetero_fl.experiment.preparation import PreparedRun, prepare
from hetero_fl.federation.checkpoint import read_checkpoint
from hetero_fl.reporting.run import Run
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.text import pluralize

CLIENTS = 2
SHADOWS = 4
IMAGES = 3
# sections of the configuration that change what an upload tells
PROTECTIONS = ("channel", "privacy")
Attack = Literal["membership", "inversion", "both"]
Json = dict[str, Any]


def audit(
    run: Run | str | Path,
    *,
    clients: Sequence[str] | None = None,
    attack: Attack = "both",
    shadows: int = SHADOWS,
    images: int = IMAGES,
    batch: int = 1,
    seed: int = 0,
    protect: Protect | None = None,
    dataset: Dataset | None = None,
    out: str | Path | None = None,
    say: Say = lambda line: None,
    allow_code: bool | CodePermission = False,
) -> Json:
    """Attack a finished run and write `audit.json`, `audit.png`, `images.png` and `audit.html`; returns the content of the first.

    Args:
        clients: whose rows are sought (ids); none: the first two.
        attack: membership inference, gradient inversion, or both; of both, what cannot be tried is left out with a note.
        shadows: how often the run is held again with other rows; even, 4 at least; 0: the attack by the loss alone.
        images: how many steps are inverted, of each client; `batch` images in each.
        seed: of the audit's own draws.
        protect: what becomes of an update (named tensors, sent minus received) on its way, as a trial; shown beside.
        dataset: the run's examples, if it was given them in memory.
        out: the folder; none: `audit` in the run's own.
        allow_code: Whether code that the run's files name may run.

    Raises:
        UserError: no finished run, other data than the run's, an unknown client, a number that makes no sense, or an attack
            that was asked for by name and cannot be tried.
    """
    begun = time.perf_counter()
    run = Run.open(run, allow_code)
    if attack not in ("membership", "inversion", "both"):
        raise UserError(
            f"--attack: found '{attack}'{suggest_or_list(attack, ['membership', 'inversion', 'both'])}"
        )
    if shadows and (shadows < 4 or shadows % 2):
        raise UserError(
            f"--shadows: found {shadows}; take an even number from 4 on, or 0 for the attack by the loss alone"
        )
    if not 1 <= batch <= 4 or images < 1:
        raise UserError(
            f"--batch, --images: found {batch} and {images}; take 1 to 4 images a step, and 1 step or more"
        )
    summary = run.summary
    models = run.models
    chosen = (
        list(dict.fromkeys(clients)) if clients else [c for c in models if c != "server"][:CLIENTS]
    )
    for client in chosen:
        if client not in models or client == "server":
            raise UserError(
                f"--clients: {run.path} has no model of '{client}'{suggest_or_list(client, set(models) - {'server'})}"
            )
    prepared = prepare(run.path / "config.yaml", dataset=dataset, allow_code=run.permission)
    _check_data(run, prepared)
    notes: list[str] = []
    content: Json = {
        "run": summary["name"], "algorithm": summary["algorithm"], "data": summary["data"]["name"], "seed": seed,
        "rounds": summary["rounds_completed"], "privacy": summary.get("privacy"), "clients": chosen, "shadows": shadows,
        "membership": [], "inversion": [], "notes": notes,
    }  # fmt: skip
    pictures: list[Json] = []
    if attack != "inversion":
        content["membership"] = _membership(run, prepared, chosen, shadows, seed, notes, say)
    if attack != "membership":
        found, pictures = _inversion(
            prepared, chosen, images, batch, seed, protect, dataset, notes, say
        )
        content["inversion"] = found
        if not found and attack == "inversion":
            raise UserError(f"--attack: found inversion; {notes[0]}")
    content["seconds"] = time.perf_counter() - begun
    from hetero_fl.experiment.auditing.report import write_audit  # loads what draws

    folder = Path(out) if out is not None else run.path / "audit"
    folder.mkdir(parents=True, exist_ok=True)
    write_audit(folder, content, pictures)
    return content


def _check_data(run: Run, prepared: PreparedRun) -> None:
    """Members are told from others by the data: it has to be what the run was trained on."""
    checkpoints = sorted((run.path / "checkpoint").glob("round-*.ckpt"))
    if (
        checkpoints
        and read_checkpoint(checkpoints[-1]).tree["data"] != prepared.data.content_hash()
    ):
        raise UserError(
            f"{run.path}: the data is not what this run was trained on; restore it, or pass it as dataset="
        )


# Membership ------------------------------------------------------------------------------------------------------------
def _membership(
    run: Run,
    prepared: PreparedRun,
    clients: Sequence[str],
    shadows: int,
    seed: int,
    notes: list[str],
    say: Say,
) -> list[Json]:
    data = prepared.data
    rounds = run.summary["rounds_completed"]
    task = data.task
    asked = {client: candidates(data, client, seed) for client in clients}
    if any(c.examples.time is not None for c in asked.values()):
        notes.append(
            "rows are cut by date: non-members are later than members, so that the attack by the loss may tell dates apart"
        )
    halves = (
        {client: c.shadow_assignments(shadows, seed, client) for client, c in asked.items()}
        if shadows
        else {}
    )
    said: dict[str, list[Tensor]] = {client: [] for client in clients}
    if shadows:
        seconds = run.summary["seconds"]["training"]
        say(
            f"{pluralize(shadows, 'shadow run')} of {pluralize(rounds, 'round')}; the run itself trained for {seconds:.0f} s"
        )
    for s in range(shadows):
        begun = time.perf_counter()
        train = {client: c.shadow_rows(halves[client][s]) for client, c in asked.items()}
        models = train_shadow(prepared, train, shadow_seed(seed, s), rounds, lambda line: None)
        for client, c in asked.items():
            said[client].append(
                confidence(task, client_logits(models[client], c.examples), targets(c.examples))
            )
        say(f"shadow {s + 1} of {shadows}: {time.perf_counter() - begun:.0f} s")
    found = []
    for client, c in asked.items():
        logits = client_logits(run.models[client], c.examples)
        y = targets(c.examples)
        scores = {"loss": loss_score(task, logits, y)}
        if shadows:
            scores["lira"] = likelihood_ratio(
                confidence(task, logits, y), torch.stack(said[client]), halves[client]
            )
        for name, values in scores.items():
            result = score_attack(values, c.member, "audit", seed, client, name)
            rows = {
                "client": client,
                "attack": name,
                "members": int(c.member.sum()),
                "others": int((~c.member).sum()),
            }
            found.append({**rows, **asdict(result), "at_chance": result.at_chance})
    return found


# Inversion -------------------------------------------------------------------------------------------------------------
def _inversion(
    prepared: PreparedRun, clients: Sequence[str], images: int, batch: int, seed: int,
    protect: Protect | None, dataset: Dataset | None, notes: list[str], say: Say,
) -> tuple[list[Json], list[Json]]:  # fmt: skip
    """Figures of each step, and its pictures: originals and reconstructions by way."""
    bare = without_protection(prepared.config)
    ways: dict[str, tuple[PreparedRun, Protect | None]] = {"as trained": (prepared, None)}
    if bare != prepared.config:
        ways = {"without protection": (prepare(bare, dataset=dataset), None), **ways}
    if prepared.config.channel.secure_sum is not None:
        del ways["as trained"]
        notes.append(
            "channel.secure_sum: the server sees no single upload; shown is what one would give away without it"
        )
    if protect is not None and "as trained" in ways:
        ways["with protect"] = (prepared, protect)
    found = []
    pictures = []
    for client in clients:
        if why := reason_not_invertible(prepared, client):
            notes.append(why)
            continue
        for number, step in enumerate(invert(ways, client, images, batch, seed, say), 1):
            pictures.append(
                {
                    "client": client,
                    "step": number,
                    "true": step.true,
                    "found": step.found,
                    "blind": step.blind,
                }
            )
            found += [{"client": client, "step": number, **row} for row in step.rows]
    return found, pictures


def without_protection(config: Config) -> Config:
    """The configuration without what protects an upload."""
    fields = Config.model_fields
    plain = {name: fields[name].get_default(call_default_factory=True) for name in PROTECTIONS}
    return config.model_copy(update=plain)
