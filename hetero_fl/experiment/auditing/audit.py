"""Privacy audit of a finished run by membership inference and gradient inversion."""

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
from hetero_fl.experiment.auditing.inversion import Log, Protect, invert, reason_not_invertible
from hetero_fl.experiment.auditing.membership import (
    Candidates,
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
from hetero_fl.federation.checkpoint import checkpoint_files, read_checkpoint
from hetero_fl.reporting.run import Run
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.errors import ArgumentError, UserError, suggest_or_list
from hetero_fl.utils.serialization import make_folder
from hetero_fl.utils.text import pluralize

# Defaults: number of attacked clients, of shadow runs, and of inverted training steps.
CLIENTS = 2
SHADOWS = 4
IMAGES = 3
# Configuration sections that change what an upload reveals.
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
    log: Log = lambda _line: None,
    allow_code: bool | CodePermission = False,
) -> Json:
    """Attack a finished run and report what its models and uploads reveal about training rows.

    The results are written to `audit.json`, `audit.png` and `audit.html`.

    Args:
        run: A finished run or its directory.
        clients: Ids of the clients to attack. If None or empty, the first two clients are attacked.
        attack: "membership", "inversion" or "both". With "both", an attack that does not apply is
            skipped with a note.
        shadows: Number of shadow runs, which repeat the run with different training rows. The
            number must be even and >= 4, or 0. If 0, membership is inferred from the loss alone.
        images: Number of training steps to invert for each client.
        batch: Number of images in each training step, from 1 to 4.
        seed: Seed of the audit.
        protect: Function that modifies an update before the attacker observes the update. The
            update contains the sent minus the received tensors, keyed by name. The results are
            reported as an additional variant.
        dataset: The data set in memory that the run was trained on. If None, the configured data
            is loaded.
        out: The folder to write to. Default: `audit` in the run directory.
        log: Function that is called with each line of progress.
        allow_code: Whether code that the files of the run refer to may be executed.

    Returns:
        The content of `audit.json`.

    Raises:
        UserError: If the run is not finished, if the data of the run has changed, if an argument is
            invalid, or if inversion is the only requested attack and does not apply.

    Example:
        >>> from tempfile import mkdtemp
        >>> import hetero_fl
        >>> config = {"data": {"name": "digits"}, "algorithm": {"name": "fedavg"}, "rounds": 1}
        >>> overrides = ["clients.count=2", "output.plots=false", "output.report=false"]
        >>> run = hetero_fl.run(config, out=mkdtemp(), overrides=overrides)
        >>> found = hetero_fl.audit(run, clients=["client_1"], attack="membership", shadows=0)
        >>> [(row["client"], row["attack"]) for row in found["membership"]]
        [('client_1', 'loss')]
    """
    started = time.perf_counter()
    run = Run.open(run, allow_code)
    _check_arguments(attack, shadows, images, batch)
    chosen = _chosen_clients(run, clients)
    run.load_models()
    prepared = prepare(run.config(), dataset=dataset, allow_code=run.permission)
    _check_data(run, prepared)
    folder = Path(out) if out is not None else run.path / "audit"
    make_folder(folder)
    summary = run.summary
    notes: list[str] = []
    content: Json = {
        "run": summary["name"],
        "algorithm": summary["algorithm"],
        "data": summary["data"]["name"],
        "seed": seed,
        "rounds": summary["rounds_completed"],
        "privacy": summary.get("privacy"),
        "clients": chosen,
        "shadows": shadows,
        "membership": [],
        "inversion": [],
        "notes": notes,
    }
    pictures: list[Json] = []
    if attack != "inversion":
        content["membership"] = _membership(
            run, prepared, chosen, shadows=shadows, seed=seed, notes=notes, log=log
        )
    if attack != "membership":
        results, pictures = _inversion(
            prepared,
            chosen,
            images=images,
            batch=batch,
            seed=seed,
            protect=protect,
            dataset=dataset,
            notes=notes,
            log=log,
        )
        content["inversion"] = results
        if not results and attack == "inversion":
            raise ArgumentError(f"attack: inversion does not apply: {notes[0]}")
    content["seconds"] = time.perf_counter() - started
    # Imported here because loading matplotlib is slow.
    from hetero_fl.experiment.auditing.report import write_audit

    write_audit(folder, content, pictures)
    return content


def _check_arguments(attack: str, shadows: int, images: int, batch: int) -> None:
    attacks = ["membership", "inversion", "both"]
    if attack not in attacks:
        raise ArgumentError(f"attack: unknown attack '{attack}'{suggest_or_list(attack, attacks)}")
    if shadows and (shadows < 4 or shadows % 2):
        raise ArgumentError(
            f"shadows: must be an even number >= 4, or 0 for the loss attack only, got {shadows}"
        )
    if not 1 <= batch <= 4:
        raise ArgumentError(f"batch: must be between 1 and 4, got {batch}")
    if images < 1:
        raise ArgumentError(f"images: must be >= 1, got {images}")


def _chosen_clients(run: Run, clients: Sequence[str] | None) -> list[str]:
    ids = [name for name in run.model_names if name != "server"]
    chosen = list(dict.fromkeys(clients)) if clients else ids[:CLIENTS]
    for client_id in chosen:
        if client_id not in ids:
            raise ArgumentError(
                f"clients: {run.path} has no model of '{client_id}'"
                f"{suggest_or_list(client_id, set(ids))}"
            )
    return chosen


def _check_data(run: Run, prepared: PreparedRun) -> None:
    """Raise UserError if the data differs from the data that the run was trained on."""
    checkpoints = checkpoint_files(run.path / "checkpoint")
    if not checkpoints:
        return
    if read_checkpoint(checkpoints[-1]).tree["data"] != prepared.data.content_hash():
        raise UserError(
            f"{run.path}: the data differs from the data that this run was trained on; "
            "restore it, or pass it as dataset="
        )


def _membership(
    run: Run,
    prepared: PreparedRun,
    clients: Sequence[str],
    *,
    shadows: int,
    seed: int,
    notes: list[str],
    log: Log,
) -> list[Json]:
    """Run the membership attacks and return one row for each client and attack."""
    task = prepared.data.task
    candidate_rows = {client: candidates(prepared.data, client, seed) for client in clients}
    if any(c.examples.time is not None for c in candidate_rows.values()):
        notes.append(
            "rows are split by date: non-members are later than members, so the loss attack "
            "may detect dates instead of membership"
        )
    assignments: dict[str, Tensor] = {}
    confidences: dict[str, list[Tensor]] = {client: [] for client in clients}
    if shadows:
        assignments = {
            client: c.shadow_assignments(shadows, seed, client)
            for client, c in candidate_rows.items()
        }
        _train_shadows(run, prepared, candidate_rows, assignments, confidences, seed=seed, log=log)
    rows = []
    for client, c in candidate_rows.items():
        logits = client_logits(run.models[client], c.examples)
        y = targets(c.examples)
        scores = {"loss": loss_score(task, logits, y)}
        if shadows:
            scores["lira"] = likelihood_ratio(
                confidence(task, logits, y), torch.stack(confidences[client]), assignments[client]
            )
        for name, values in scores.items():
            result = score_attack(values, c.member, "audit", seed, client, name)
            rows.append(
                {
                    "client": client,
                    "attack": name,
                    "members": int(c.member.sum()),
                    "others": int((~c.member).sum()),
                    **asdict(result),
                    "at_chance": result.at_chance,
                }
            )
    return rows


def _train_shadows(
    run: Run,
    prepared: PreparedRun,
    candidate_rows: dict[str, Candidates],
    assignments: dict[str, Tensor],
    confidences: dict[str, list[Tensor]],
    *,
    seed: int,
    log: Log,
) -> None:
    """Train the shadow runs and append their confidences on the candidate rows of each client."""
    task = prepared.data.task
    rounds = run.summary["rounds_completed"]
    shadows = len(next(iter(assignments.values())))
    seconds = run.summary["seconds"]["training"]
    log(
        f"{pluralize(shadows, 'shadow run')} of {pluralize(rounds, 'round')}; "
        f"the run itself trained for {seconds:.0f} s"
    )
    for shadow in range(shadows):
        started = time.perf_counter()
        train = {
            client: c.shadow_rows(assignments[client][shadow])
            for client, c in candidate_rows.items()
        }
        models = train_shadow(prepared, train, shadow_seed(seed, shadow), rounds)
        for client, c in candidate_rows.items():
            logits = client_logits(models[client], c.examples)
            confidences[client].append(confidence(task, logits, targets(c.examples)))
        log(f"shadow {shadow + 1} of {shadows}: {time.perf_counter() - started:.0f} s")


def _inversion(
    prepared: PreparedRun,
    clients: Sequence[str],
    *,
    images: int,
    batch: int,
    seed: int,
    protect: Protect | None,
    dataset: Dataset | None,
    notes: list[str],
    log: Log,
) -> tuple[list[Json], list[Json]]:
    """Run gradient inversion and return the scores and images of each inverted training step.

    Clients whose training steps cannot be inverted are skipped. The reasons are appended to
    `notes`. If the server receives only sums, only uploads without protection are inverted, and a
    note says so.
    """
    unprotected = without_protection(prepared.config)
    ways: dict[str, tuple[PreparedRun, Protect | None]] = {"as trained": (prepared, None)}
    if unprotected != prepared.config:
        ways = {"without protection": (prepare(unprotected, dataset=dataset), None), **ways}
    if summed := prepared.config.channel.summed:
        del ways["as trained"]
        notes.append(
            f"channel.{summed}: the server does not see single uploads; the results show what an "
            "upload would reveal without it"
        )
    if protect is not None and "as trained" in ways:
        ways["with protect"] = (prepared, protect)
    rows = []
    pictures = []
    for client in clients:
        if reason := reason_not_invertible(prepared, client):
            notes.append(reason)
            continue
        steps = invert(ways, client, images=images, batch=batch, seed=seed, log=log)
        for number, step in enumerate(steps, 1):
            pictures.append(
                {"client": client, "step": number, "true": step.true, "found": step.found}
            )
            rows += [{"client": client, "step": number, **row} for row in step.rows]
    return rows, pictures


def without_protection(config: Config) -> Config:
    """Return a copy of a configuration with default `channel` and `privacy` sections."""
    fields = Config.model_fields
    defaults = {name: fields[name].get_default(call_default_factory=True) for name in PROTECTIONS}
    return config.model_copy(update=defaults)
