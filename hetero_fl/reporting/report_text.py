"""Sentences and figure captions of a run's report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hetero_fl.algorithms.requirements import needs_of
from hetero_fl.core.metrics import SMALLER_IS_BETTER
from hetero_fl.reporting import summary as protections
from hetero_fl.reporting.formatting import (
    FEW_ROWS,
    READINGS,
    algorithm_name,
    capitalize_first,
    client_score,
    format_bytes,
    format_metric,
    format_range,
    is_better,
    is_regression,
    last_scores,
    local_test_rows,
    metric_name,
    population,
    selection_metric_of,
    small_test_note,
    target_kind,
)
from hetero_fl.reporting.methods import docstring_paragraph, method_class
from hetero_fl.reporting.plots.clients import FEW
from hetero_fl.reporting.plots.rounds import ROUNDS, SHOWN
from hetero_fl.reporting.plots.scores import PANELS
from hetero_fl.utils.text import pluralize

# The sentences of a run's report: what was done, what came out, what each figure and picture means.

Json = dict[str, Any]


def warnings(summary: Json, records: Sequence[Json]) -> list[str]:
    """What a reader must know before the first figure."""
    lines = []
    if summary["data"]["simulated"]:
        lines.append(
            "Generated data stood in for the real set. These figures say nothing about real data."
        )
    failed = [
        (r["round"], c, reason)
        for r in records
        if "counts" not in r
        for c, reason in r["failed"].items()
    ]
    if failed:
        listed = "; ".join(
            f"round {number}: {client} ({reason})" for number, client, reason in failed[:8]
        )
        more = f"; and {len(failed) - 8} more, in log.txt" if len(failed) > 8 else ""
        lines.append(
            f"Left out of {pluralize(len({f[0] for f in failed}), 'round')}: {listed}{more}."
        )
    return lines


def summarize_run(summary: Json, details: Json) -> list[str]:
    """What was done and what came out, in a few sentences."""
    return [_setting(summary, details), _method(summary, details), _outcome(summary, details)]


def _setting(summary: Json, details: Json) -> str:
    kinds = Counter(client["model"] for client in summary["clients"])
    models = ", ".join(f"{count} × {name}" for name, count in kinds.most_common(8)) + (
        " …" if len(kinds) > 8 else ""
    )
    rows = sorted(client["n_train"] for client in summary["clients"])
    about = f": {details['about']}" if details.get("about") else ""
    there = population(summary, details)
    who = f"{pluralize(there, 'client')} ({models}) took part"
    lying = protections.describe_attack(summary.get("attacks"))
    honest = there - len(summary["attacks"]["liars"]) if lying else there
    if there > len(rows):
        drawn = ", drawn once" if honest > len(rows) else ""
        who = f"{pluralize(there, 'client')} could take part; all figures are of {len(rows):,} of them ({models}){drawn}"
    text = f"{who}. {lying and lying + ' '}Data: {summary['data']['name']}{about}; "
    text += f"{pluralize(summary['data']['n_train'], 'training row')} in all" + (
        f", {rows[0]:,} to {rows[-1]:,} a client" if rows[1:] else ""
    )
    public = []
    if summary["global"]:
        public.append(f"the global test set has {pluralize(summary['data']['n_test'], 'row')}")
    if details["proxy"]:
        read = "clients train on once" if details.get("proxy_labels") else "are never read"
        public.append(
            f"the public proxy set has {pluralize(details['proxy'], 'row')}, whose labels {read}"
        )
    return f"{text}. {capitalize_first('; '.join(public))}." if public else f"{text}."


def _method(summary: Json, details: Json) -> str:
    what = docstring_paragraph(summary["algorithm"])
    kind = method_class(summary["algorithm"])
    parts = [f"The method is {algorithm_name(summary['algorithm'])}.", what]
    if (
        kind is not None
        and needs_of(kind).proxy_set != "unused"
        and is_regression(last_scores(summary))
    ):
        parts.append("Numbers are distilled by squared error towards their weighted mean.")
    total = sum(summary["communication"].values())
    if total:
        rounds = pluralize(summary["rounds_completed"], "round")
        parts.append(f"Over {rounds} the encoded messages came to {format_bytes(total)}.")
    parts += protections.describe_protections(summary, details)
    return " ".join(filter(None, parts))


def _outcome(summary: Json, details: Json) -> str:
    name = selection_metric_of(summary, details)
    parts = [
        f"All figures here are {metric_name(name, details.get('unit', ''))}, by which rounds are selected, after the last round."
    ]
    if summary["personal"]:
        value = format_metric(summary["personal"]["last"][name], name)
        rows = f"n = {format_range(local_test_rows(details).values())} rows"
        parts.append(
            f"On its own test split ({rows}) a client's model reaches {value}{_worst_client(summary, 'personal', name)}."
        )
        parts.append(small_test_note(local_test_rows(details)))
    if summary["global"]:
        value = format_metric(summary["global"]["last"][name], name)
        parts.append(
            f"On the global test set (n = {summary['data']['n_test']:,}) it reaches {value}"
            f"{_worst_client(summary, 'global', name)}."
        )
    if summary["server"]:
        parts.append(
            f"There, the server's own model reaches {format_metric(summary['server']['last'][name], name)}."
        )
    parts.append(_compare_with_baselines(summary, details, name))
    if name == "balanced_accuracy":
        classes = len(details["labels"])
        parts.append(f"Guessing among {classes} classes would give {100 / classes:.3g}%.")
    return " ".join(filter(None, parts))


def _compare_with_baselines(summary: Json, details: Json, name: str) -> str:
    """How many clients' models are better on local tests than each simple rule that the data brings."""
    found = []
    for rule, readings in summary.get("baselines", {}).items():
        own = {
            i: r.get("personal", {}).get(rule, {}).get(name)
            for i, r in details["baselines"].items()
        }
        both = [(client_score(c, "personal", name), own.get(c["id"])) for c in summary["clients"]]
        known = [
            (model, simple) for model, simple in both if model is not None and simple is not None
        ]
        if known:
            beaten = sum(is_better(name, model, simple) for model, simple in known)
            found.append(
                f"“{rule}” reaches {format_metric(readings['personal'].get(name), name)}, {beaten} of {len(known)} models are better"
            )
    return f"Simple rules on local tests: {'; '.join(found)}." if found else ""


def _worst_client(summary: Json, reading: str, name: str) -> str:
    scores = {c["id"]: client_score(c, reading, name) for c in summary["clients"]}
    known = {client: score for client, score in scores.items() if score is not None}
    if len(known) < 2:
        return ""
    client = (max if name in SMALLER_IS_BETTER else min)(known, key=lambda i: known[i])
    return f" (mean over clients; worst {client} with {format_metric(known[client], name)})"


def glossary(summary: Json, details: Json) -> list[tuple[str, str]]:
    """The words of the results table."""
    entries = []
    if summary["personal"]:
        own = "Each client's model on the client's own test split, which had no part in training or selection."
        entries.append(("Local test", own))
    if summary["global"]:
        one = "Each client's model on the global test set, which is the same for all, seen through that client's preprocessing."
        entries.append(("Global test", one))
    if summary["server"]:
        entries.append(("Server", "The server's own model on the global test set."))
    if details.get("read"):
        entries.append(("When models are read", capitalize_first(details["read"]) + "."))
    chosen = (
        "The models after the last round, and those of the round that was best on validation rows. Test rows have no "
        "part in the choice, so the selected figures may be lower than the last."
    )
    entries.append(("Last round, selected round", chosen))
    if is_regression(last_scores(summary)):
        return [
            *entries,
            (
                "Mean absolute error, root mean squared error",
                f"In {details.get('unit') or 'the target’s unit'}; the second weighs large errors more.",
            ),
            (
                "R²",
                "The share of the target's variance that is explained: 1 is perfect, 0 is predicting the mean.",
            ),
        ]
    precision = "The area under the precision-recall curve of each class, averaged over classes."
    if (rare := details.get("rare")) is not None:
        rare_one = details["labels"][rare]
        precision = f"The area under the precision-recall curve of the rare class, {rare_one}: chance gives its share."
    if "top3_accuracy" in last_scores(summary):
        entries += [
            ("Top-3 accuracy", "How often the truth is among the three likeliest classes."),
            (
                "Perplexity",
                "The exponential of the cross-entropy: among so many equally likely classes a model that says as much would "
                "have to guess.",
            ),
        ]
    return [
        *entries,
        (
            "Accuracy",
            "The share of predictions that are right. It flatters a model that always names the common class.",
        ),
        (
            "Balanced accuracy",
            "The share recognised of each class, averaged over the classes that occur in the test set: each counts the same. A "
            "client's local test may lack classes; with one class only it is the accuracy on that class.",
        ),
        (
            "Macro F1",
            "The harmonic mean of precision and recall of each class, averaged over classes.",
        ),
        (
            "AUROC",
            "How often a case of a class is ranked above a case of another: 1 is perfect, 0.5 is chance. It judges the "
            "ranking only, not the threshold.",
        ),
        ("Average precision", precision),
        (
            "Cross-entropy",
            "The mean negative log-probability of the truth: smaller is better, and overconfidence costs.",
        ),
    ]


# Titles and captions of the pictures in a run's report.


def captions(summary: Json, details: Json) -> dict[str, tuple[str, str]]:
    """Title and caption of each picture."""
    regression = is_regression(last_scores(summary))
    many = len(summary["clients"])
    where = READINGS["global" if summary["global"] else "personal"]
    chosen = (
        f"All {many} clients together, then the {PANELS - 1} that are weakest on the {where}. "
        if many > PANELS
        else ""
    )
    matrices = (
        "All clients together, label by label. "
        if target_kind(summary, details) == "multilabel"
        else chosen
    )
    empty = ", and is empty where no test row is of that class"
    several = summary["personal"] and many <= 6 and target_kind(summary, details) != "multilabel"
    headed = " n: local test rows of the client." if several else ""
    against = metric_name(selection_metric_of(summary, details))
    hollow = f" n: local test rows; hollow: fewer than {FEW_ROWS}." if summary["personal"] else ""
    if many > FEW:
        points = (
            "A point is a client, coloured by its model; on the dashed line it does equally well on both tests."
            + hollow
        )
    else:
        points = (
            "The two readings of each client's model after the last round. The line between them is the gap."
            + hollow
        )
    held = ("Who holds which labels", "The rows that each client trains on, by label.")
    private = bool(summary.get("privacy"))
    if regression or not details["label_counts"]:
        left_out = " Label counts are left out: this run protects them." if private else ""
        held = ("Who holds how much", f"The rows of each client, by use.{left_out}")
    if private:
        empty += ". Local test splits are left out: their matrices would add up to label counts"
    return {
        "curves": (
            "Learning curves",
            "Mean over clients by round. Left: the metric by which rounds are selected. The band is one standard "
            "deviation over clients, so it shows how far they are apart, not how certain the mean is. A "
            "metric that is undefined for every client has no curve.",
        ),
        "clients": ("Every client, local and global test", points),
        "labels": held,
        "communication": (
            f"Bytes against {against}",
            "Bytes are those of the encoded messages of all clients, summed from the first round.",
        ),
        "time": (
            f"{capitalize_first(against)} against simulated time",
            "Left: by the simulated time at which each round ended. Right: what came of each round's invitations. Late is "
            "who was not there when the round was closed.",
        ),
        "tasks": (
            "Who was at it when",
            f"The tasks of the first {ROUNDS} rounds, from invitation to arrival or failure; of many clients, the {SHOWN} most "
            "often invited.",
        ),
        "staleness": (
            "How stale uploads were",
            "Versions that the server made between giving out a task and taking its upload: the more, the less it counted.",
        ),
        "privacy": (
            "Privacy spent",
            "The largest ε of any client by round: what whoever sees all that left may have learnt of one record or client.",
        ),
        "forecasts": (
            "Truth and forecast",
            "The last rows of each client's own test split in time; the output that is named. The dashed line is the simple rule "
            "that is nearest there.",
        ),
        "confusion": (
            "Which class is taken for which",
            f"{matrices}After the last round. Classes are in the task's order, one colour scale for all; "
            f"a row adds up to 100%{empty}.{headed}",
        ),
        "calibration": (
            "Confidence against accuracy",
            f"{chosen}Below the dashed line a model is surer than it may be, above it less sure. ECE: expected "
            "calibration error, the mean distance to the line. The larger a point, the more predictions it stands for.",
        ),
    }
