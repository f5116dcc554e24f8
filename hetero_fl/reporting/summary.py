"""Build `summary.json` and `details.json` from the records of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hetero_fl.algorithms import Algorithm
from hetero_fl.communication.protocol import Traffic
from hetero_fl.config import Config
from hetero_fl.config.communication import StageConfig
from hetero_fl.core.metrics import selection_metric, summarize_clients
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.task import Task
from hetero_fl.federation.federation import FederationSpec, describe_settings
from hetero_fl.federation.round import Record
from hetero_fl.federation.trainer import EvaluationResult
from hetero_fl.reporting.rendering import render, render_line
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.text import format_list

Json = dict[str, Any]

PRIVACY_UNITS = {
    "record": " of each training row",
    "client": " of each client",
    "local": " of each client, with noise added by the client",
}

MAX_NAMED_ATTACKERS = 6
# Number of constants of a client's preprocessing that are listed.
MAX_CONSTANTS = 8


def collect_protections(federation: FederationSpec) -> dict[str, Any]:
    """Return the protection, compression and robust rules of a run for `details.json`."""
    channel = federation.channel
    aggregation = federation.aggregation
    rules = {
        "parameters": aggregation.rule,
        "predictions": aggregation.predictions,
        "class sums": aggregation.statistics,
    }
    return {
        "compress": [_format_stage(stage) for stage in channel.compress],
        "compress_down": [_format_stage(stage) for stage in channel.compress_down],
        "secure_sum": channel.secure_sum is not None,
        "homomorphic": channel.homomorphic is not None,
        "rules": {name: rule for name, rule in rules.items() if rule != "mean"},
    }


def _format_stage(stage: StageConfig) -> str:
    return stage.kind if stage.half else f"{stage.kind} {getattr(stage, stage.kind):g}"


def describe_protections(summary: Json, details: Json) -> list[str]:
    """Return a sentence about each protection, the first one about differential privacy."""
    privacy = summary["privacy"]
    text = render(
        "protections.txt",
        privacy=privacy,
        privacy_unit=PRIVACY_UNITS.get((privacy or {}).get("unit", ""), ""),
        protections=details.get("protections", {}),
    )
    return text.splitlines()


def describe_attack(attacks: Json | None) -> str:
    """Return a sentence about malicious clients, or an empty string if there were none."""
    return render_line("attack.txt", attacks=attacks, named=MAX_NAMED_ATTACKERS)


def validation_score(task: Task, record: Record, which: str) -> float | None:
    """Return the validation score in a record.

    The sign of metrics for which smaller is better is reversed, so that a larger score is always
    better.

    Args:
        task: The task, which determines the metric.
        record: Record of a round.
        which: `personal`, `global` or `server`.

    Returns:
        The score, or None if the record has no validation score.
    """
    name, sign = selection_metric(task)
    value = ((record.get("validation") or {}).get(which) or {}).get(name)
    return None if value is None else sign * value


def mean_validation_score(task: Task, record: Record) -> float | None:
    """Return the mean of the local and the global validation score in a record.

    If only one of the scores exists, this score is returned. If neither exists, None is returned.
    A larger score is better (see `validation_score`).
    """
    both = [validation_score(task, record, which) for which in ("personal", "global")]
    known = [score for score in both if score is not None]
    return sum(known) / len(known) if known else None


class BestRounds:
    """Rounds with the best validation scores so far, the earlier one in a tie.

    Args:
        task: The task, which determines the metric.
        history: Records of the rounds before the run was resumed.

    Attributes:
        rounds: The best round, keyed by `personal`, `global` and `server`. A key is missing as long
            as there is no score.
    """

    def __init__(self, task: Task, history: Sequence[Record]) -> None:
        self.task = task
        self.rounds: dict[str, int] = {}
        self._scores: dict[str, float] = {}
        for record in history:
            self.update(record)

    def update(self, record: Record) -> None:
        """Update the best rounds with the record of a round, which may have no scores."""
        for which in ("personal", "global", "server"):
            value = validation_score(self.task, record, which)
            if value is not None and value > self._scores.get(which, -math.inf):
                self._scores[which] = value
                self.rounds[which] = record["round"]


class Patience:
    """Early stopping based on the mean of the local and global validation scores.

    Args:
        task: The task, which determines the metric.
        limit: Number of evaluations without improvement after which the run stops. If None, early
            stopping is disabled.
        history: Records of the rounds before the run was resumed.

    Attributes:
        best: The best score so far, or None before the first score.
        without: Number of evaluations without improvement since the best score.
    """

    def __init__(self, task: Task, limit: int | None, history: Sequence[Record]) -> None:
        self.task = task
        self.limit = limit
        self.best: float | None = None
        self.without = 0
        for record in history:
            if record.get("validation"):
                self.update(record)

    def update(self, record: Record) -> None:
        """Update the best score with the record of an evaluated round.

        A record without validation scores is ignored.
        """
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
    """Return the duration of a run and the number of invited clients with each outcome.

    The result has a single key, which is `simulated`, or `wall` for a run on several machines. For
    runs that do not record arrival times, the result is empty.
    """
    timed = [r for r in history if "counts" in r]
    if not timed:
        return {}
    counts = {name: sum(r["counts"][name] for r in timed) for name in timed[0]["counts"]}
    clock = "simulated" if "simulated" in timed[-1] else "wall"
    return {
        clock: {
            "seconds": timed[-1][clock]["end"],
            **counts,
            "skipped": sum(r.get("skipped", False) for r in timed),
        }
    }


def baseline_summary(
    evaluation: EvaluationResult,
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Return the scores of simple baseline rules, summarized over clients.

    The scores are keyed by the name of the rule and by the test.
    """
    clients = evaluation.clients.items()
    names = dict.fromkeys(
        name for _, client in clients for scores in client.baselines.values() for name in scores
    )
    return {
        name: {
            test: summarize_clients(
                {
                    client_id: client.baselines[test][name]
                    for client_id, client in clients
                    if name in client.baselines.get(test, {})
                }
            )
            for test in ("personal", "global")
        }
        for name in names
    }


def summarize(
    config: Config,
    federation: FederationSpec,
    *,
    history: Sequence[Record],
    traffic: Traffic,
    setup_seconds: float,
    evaluation: EvaluationResult,
) -> dict[str, Any]:
    """Return the content of `summary.json`.

    Args:
        config: The resolved configuration.
        federation: Federation of the run.
        history: Records of all rounds.
        traffic: Bytes exchanged in the run.
        setup_seconds: Seconds before the first round.
        evaluation: The last evaluation, which contains the scores of simple baseline rules.

    Raises:
        RunFailedError: If no round was evaluated.
    """
    task = federation.task
    evaluated = [r for r in history if r.get("personal") or r.get("global")]
    if not evaluated:
        raise RunFailedError("no model could be evaluated in any round")
    last = evaluated[-1]

    best_rounds = BestRounds(task, history).rounds
    by_round = {record["round"]: record for record in history}

    def last_and_best(which: str) -> dict[str, Any] | None:
        if not last.get(which):
            return None
        # Without validation scores, the last evaluation counts as the best.
        best = by_round[best_rounds.get(which, last["round"])]
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
        "personal": last_and_best("personal"),
        "global": last_and_best("global"),
        "server": last_and_best("server"),
        "clients": [
            {
                "id": client_id,
                "model": client_info.arch.display_name,
                "parameters": sum(
                    federation.initial_tensors(client_info.arch)[n].numel()
                    for n in client_info.arch.parameter_names
                ),
                "n_train": client_info.num_rows,
                "personal": last["clients"].get(client_id, {}).get("personal"),
                "global": last["clients"].get(client_id, {}).get("global"),
            }
            for client_id, client_info in _evaluated_clients(federation)
        ],
        "communication": {"up_bytes": traffic.up, "down_bytes": traffic.down},
        "seconds": {"total": setup_seconds + sum(seconds.values()), **seconds},
        "privacy": history[-1].get("privacy"),
        **({"attacks": attacked} if (attacked := attack_summary(federation, history)) else {}),
        **timing_summary(history),
        **({"baselines": found} if (found := baseline_summary(evaluation)) else {}),
    }


def attack_summary(federation: FederationSpec, history: Sequence[Record]) -> dict[str, Any]:
    """Return the attack and the malicious clients, or an empty dictionary without attack.

    The entry `success` is the success rate of a backdoor in the last evaluation, or None for other
    attacks. The success rate is the fraction of global test rows of other classes, with the
    trigger, that the models of the honest clients assign to the target class. It is None if there
    are no such rows.
    """
    malicious = federation.malicious
    if malicious is None:
        return {}
    success = [r["attacks"]["success"] for r in history if "success" in r["attacks"]]
    return {
        "name": malicious.config.name,
        "malicious": malicious.sorted_ids,
        "success": success[-1] if success else None,
    }


def collect_details(
    federation: FederationSpec,
    evaluation: EvaluationResult,
    notes: Sequence[str],
    method: Algorithm,
) -> dict[str, Any]:
    """Return the content of `details.json`, which contains data about each client for the report.

    For runs with differential privacy, label counts are omitted, because the privacy budget does
    not include a release of label counts.

    Args:
        federation: Federation of the run.
        evaluation: The last evaluation, with details.
        notes: Notes from the preparation of the run, one line each.
        method: Method of the run.
    """
    data = federation.data
    label_clients = [
        client_id
        for client_id in federation.evaluated_clients
        if federation.privacy is None and data.reveals_labels(client_id)
    ]
    return {
        "kind": federation.task.kind,
        "labels": list(federation.task.output_names),
        "rare": federation.task.rare,
        "ranking": federation.task.is_ranking,
        "population": len(federation.client_infos),
        "label_counts": {
            client_id: data.label_counts(client_id).int().tolist() for client_id in label_clients
        },
        "proxy": data.n_proxy,
        "proxy_labels": method.needs.proxy_set == "labeled",
        "rows": {
            client_id: {
                split: data.n_rows(client_id, split) for split in ("train", "validation", "test")
            }
            for client_id in federation.evaluated_clients
        },
        "clients": {
            client_id: {
                "model": client_info.arch.spec_id,
                "group": client_info.arch.spec_id,
                "shares": list(client_info.settings.shares),
                "preprocess": format_fields(asdict(client_info.preprocess)),
                "scanner": format_fields(
                    describe_settings(client_info.settings).get("scanner", {})
                ),
                "settings": describe_settings(client_info.settings),
            }
            for client_id, client_info in _evaluated_clients(federation)
        },
        "unit": federation.task.unit,
        "relative": data.extra_columns("", "common_test").unit is not None,
        "baselines": {
            client_id: client.baselines
            for client_id, client in evaluation.clients.items()
            if any(client.baselines.values())
        },
        "forecast": {
            client_id: client.forecast
            for client_id, client in evaluation.clients.items()
            if client.forecast
        },
        "confusion": {
            client_id: client.confusion for client_id, client in evaluation.clients.items()
        },
        "calibration": {
            client_id: client.calibration for client_id, client in evaluation.clients.items()
        },
        "evaluated_when": method.evaluated_when,
        "about": data.about,
        "notes": list(notes),
        "protections": collect_protections(federation),
    }


def _evaluated_clients(federation: FederationSpec) -> list[tuple[str, ClientInfo]]:
    """Return the evaluated clients in the order of the configuration."""
    return [
        (client_id, federation.client_infos[client_id])
        for client_id in federation.evaluated_clients
    ]


def format_fields(fields: dict[str, Any]) -> str:
    """Format the settings of a preprocessing or a scanner that are set, as one line."""
    shown = {
        k: v for k, v in fields.items() if v is not None and v != () and k not in ("raw", "spans")
    }
    if "blocks" in shown:
        shown["blocks"] = " and ".join(name for name, _ in shown["blocks"])
    return ", ".join(f"{name} {_format_constant(value)}" for name, value in shown.items())


def _format_constant(value: Any) -> str:
    """Format a setting, with the number and the range of the values of a long tuple."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, tuple) and len(value) > MAX_CONSTANTS:
        if all(isinstance(each, int | float) for each in value):
            return f"{min(value):.3g} to {max(value):.3g} ({len(value):,} values)"
        return f"({format_list(map(str, value), MAX_CONSTANTS)})"
    return str(value)
