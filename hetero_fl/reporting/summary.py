"""Build `summary.json` and `details.json` from the records of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hetero_fl.algorithms import Algorithm
from hetero_fl.communication.protocol import Traffic
from hetero_fl.config import Config
from hetero_fl.core.metrics import selection_metric, summarize_clients
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.task import Task
from hetero_fl.federation.federation import FederationSpec, describe_settings
from hetero_fl.federation.trainer import EvaluationResult, Record
from hetero_fl.reporting.rendering import render, render_line
from hetero_fl.utils.errors import RunFailedError

Json = dict[str, Any]
PRIVACY_UNITS = {
    "record": " of each training row",
    "client": " of each client",
    "local": " of each client, noised by the client itself",
}
SHOWN = 6  # malicious clients that are named


def collect_protections(federation: FederationSpec) -> dict[str, Any]:
    """What a report tells of the channel and of how uploads were combined; JSON."""
    channel = federation.channel
    terms = federation.aggregation
    rules = {
        "parameters": terms.rule,
        "predictions": terms.predictions,
        "class sums": terms.statistics,
    }
    return {
        "compress": [_format_stage(stage.model_dump()) for stage in channel.compress],
        "compress_down": [_format_stage(stage.model_dump()) for stage in channel.compress_down],
        "secure_sum": channel.secure_sum is not None,
        "rules": {what: rule for what, rule in rules.items() if rule != "mean"},
    }


def _format_stage(written: Json) -> str:
    return " ".join(
        name if value is True else f"{name} {value:g}" for name, value in written.items()
    )


def describe_protections(summary: Json, details: Json) -> list[str]:
    """Return a sentence on each protection; the first on privacy, whether there was any or not."""
    privacy = summary["privacy"]
    text = render(
        "protections.txt",
        privacy=privacy,
        privacy_unit=PRIVACY_UNITS.get((privacy or {}).get("unit", ""), ""),
        protections=details.get("protections", {}),
    )
    return text.splitlines()


def describe_attack(attacks: Json | None) -> str:
    """Return which clients attacked and how; empty if none did."""
    return render_line("attack.txt", attacks=attacks, named=SHOWN)


# From the records of a run to `summary.json` and `details.json`.


def validation_score(task: Task, record: Record, which: str) -> float | None:
    """A record's validation figure for `personal`, `global` or `server`; larger is better."""
    name, sign = selection_metric(task)
    value = ((record.get("validation") or {}).get(which) or {}).get(name)
    return None if value is None else sign * value


def mean_validation_score(task: Task, record: Record) -> float | None:
    """Return the mean of a record's local and global validation score; larger is better."""
    both = [validation_score(task, record, which) for which in ("personal", "global")]
    known = [score for score in both if score is not None]
    return sum(known) / len(known) if known else None


def best_round(task: Task, history: Sequence[Record], which: str) -> Record | None:
    """The record selected by validation, ties to the earlier; the last one where there is nothing to select by."""
    read = [r for r in history if r.get(which)]
    scored = [r for r in read if validation_score(task, r, which) is not None]
    if scored:
        return max(scored, key=lambda r: validation_score(task, r, which) or 0.0)
    return read[-1] if read else None


class Patience:
    """Early stopping: so many evaluations without a better validation (personal and global together)."""

    def __init__(self, task: Task, limit: int | None, history: Sequence[Record]) -> None:
        self.task = task
        self.limit = limit
        self.best: float | None = None
        self.without = 0
        for record in history:
            if record.get("validation"):
                self.look(record)

    def look(self, record: Record) -> None:
        """Take an evaluated round into account."""
        value = mean_validation_score(self.task, record)
        if value is None:
            return
        if self.best is None or value > self.best:
            self.best = value
            self.without = 0
        else:
            self.without += 1

    @property
    def exhausted(self) -> bool:
        """Whether the run should stop."""
        return self.limit is not None and self.without >= self.limit


def timing_summary(history: Sequence[Record]) -> dict[str, Any]:
    """Seconds of a run, under `simulated` or, of a federation of machines, `wall`, and what came of all invitations; empty where
    nobody took any time."""
    told = [r for r in history if "counts" in r]
    if not told:
        return {}
    counts = {what: sum(r["counts"][what] for r in told) for what in told[0]["counts"]}
    time = "simulated" if "simulated" in told[-1] else "wall"
    return {
        time: {
            "seconds": told[-1][time]["end"],
            **counts,
            "skipped": sum(r.get("skipped", False) for r in told),
        }
    }


def baseline_summary(
    readings: EvaluationResult,
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """What simple rules reach on the same rows: by name and reading, spread over the clients as a method's figures are."""
    clients = readings.clients.items()
    names = dict.fromkeys(
        name for _, r in clients for found in r.baselines.values() for name in found
    )
    return {
        name: {
            reading: summarize_clients(
                {
                    id: r.baselines[reading][name]
                    for id, r in clients
                    if name in r.baselines.get(reading, {})
                }
            )
            for reading in ("personal", "global")
        }
        for name in names
    }


def summarize(
    config: Config,
    method: Algorithm,
    federation: FederationSpec,
    history: Sequence[Record],
    traffic: Traffic,
    setup: float,
    readings: EvaluationResult,
) -> dict[str, Any]:
    """The content of `summary.json`; its `clients` are those whose models were read. `setup`: seconds before the first round;
    `readings`: the last ones, of which baselines are taken where the data has any."""
    task = federation.task
    read = [r for r in history if r.get("personal") or r.get("global")]
    if not read:
        raise RunFailedError("nobody's model could be read in any round")
    last = read[-1]

    def both(which: str) -> dict[str, Any] | None:
        if not last.get(which):
            return None
        best = best_round(task, history, which) or last
        return {"last": last[which], "best_by_validation": {"round": best["round"], **best[which]}}

    seconds = {k: sum(r["seconds"][k] for r in history) for k in ("training", "evaluation")}
    data = federation.data
    return {
        "name": config.name,
        "algorithm": config.algorithm["name"],
        "seed": config.seed,
        "rounds_completed": history[-1]["round"],
        "data": {
            "name": data.name,
            "simulated": data.simulated,
            "n_train": data.n_train,
            "n_proxy": data.n_proxy,
            "n_test": data.n_test,
        },
        "personal": both("personal"),
        "global": both("global"),
        "server": both("server"),
        "clients": [
            {
                "id": id,
                "model": client_info.arch.display_name,
                "parameters": sum(
                    federation.initial_tensors(client_info.arch)[n].numel()
                    for n in client_info.arch.parameter_names
                ),
                "n_train": client_info.num_rows,
                "personal": last["clients"].get(id, {}).get("personal"),
                "global": last["clients"].get(id, {}).get("global"),
            }
            for id, client_info in _evaluated_clients(federation)
        ],
        "communication": {"up_bytes": traffic.up, "down_bytes": traffic.down},
        "seconds": {"total": setup + sum(seconds.values()), **seconds},
        "privacy": history[-1].get("privacy"),
        **({"attacks": attacked} if (attacked := attack_summary(federation, history)) else {}),
        **timing_summary(history),
        **({"baselines": found} if (found := baseline_summary(readings)) else {}),
    }


def attack_summary(federation: FederationSpec, history: Sequence[Record]) -> dict[str, Any]:
    """Who lied how, where anybody did; `success`: of a backdoor, the share of the common test rows with its trigger that honest
    clients' models took for the target when they were last read. All other figures are the honest clients'."""
    liars = federation.malicious
    if liars is None:
        return {}
    success = [r["attacks"]["success"] for r in history if "success" in r["attacks"]]
    return {
        "name": liars.config.name,
        "liars": liars.sorted_ids,
        "success": success[-1] if success else None,
    }


def collect_details(
    federation: FederationSpec, readings: EvaluationResult, notes: Sequence[str], method: Algorithm
) -> dict[str, Any]:
    """Return the content of `details.json`: what a report shows of each client.

    Label counts are left out if the run is private: nothing accounts for their release.

    Args:
        federation: The clients, their data and their protections.
        readings: The last evaluation, with details.
        notes: What preparation noted, one line each.
        method: The algorithm; it says when its models are read.
    """
    data = federation.data
    tells_labels = [
        id
        for id in federation.evaluated_clients
        if federation.privacy is None and data.reveals_labels(id)
    ]
    return {
        "kind": federation.task.kind,
        "labels": list(federation.task.output_names),
        "rare": federation.task.rare,
        "population": len(federation.client_infos),
        "label_counts": {id: data.label_counts(id).int().tolist() for id in tells_labels},
        "proxy": data.n_proxy,
        "proxy_labels": method.needs.proxy_set == "labeled",
        "rows": {
            id: {s: data.n_rows(id, s) for s in ("train", "validation", "test")}
            for id in federation.evaluated_clients
        },
        "clients": {
            id: {
                "model": client_info.arch.spec_id,
                "group": client_info.arch.spec_id,
                "shares": list(client_info.settings.shares),
                "preprocess": _without_defaults(asdict(client_info.preprocess)),
                "scanner": _without_defaults(
                    describe_settings(client_info.settings).get("scanner", {})
                ),
                "settings": describe_settings(client_info.settings),
            }
            for id, client_info in _evaluated_clients(federation)
        },
        "unit": federation.task.unit,
        "relative": data.extra_columns("", "common_test").unit is not None,
        "baselines": {
            id: r.baselines for id, r in readings.clients.items() if any(r.baselines.values())
        },
        "forecast": {id: r.forecast for id, r in readings.clients.items() if r.forecast},
        "confusion": {id: r.confusion for id, r in readings.clients.items()},
        "calibration": {id: r.calibration for id, r in readings.clients.items()},
        "read": method.evaluated_when,
        "about": data.about,
        "notes": list(notes),
        "protections": collect_protections(federation),
    }


def _evaluated_clients(federation: FederationSpec) -> list[tuple[str, ClientInfo]]:
    """The clients whose models were read, in the order of the configuration."""
    return [(id, federation.client_infos[id]) for id in federation.evaluated_clients]


def _without_defaults(fields: dict[str, Any]) -> str:
    shown = {
        k: v for k, v in fields.items() if v is not None and v != () and k not in ("raw", "spans")
    }
    shown |= (
        {"blocks": " and ".join(name for name, _ in shown["blocks"])} if "blocks" in shown else {}
    )
    return ", ".join(
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()
    )
