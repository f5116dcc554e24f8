"""Model cards, which describe the training data, scores and limitations of exported models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hetero_fl.algorithms import Algorithm
from hetero_fl.core.task import MANY_CLASSES
from hetero_fl.reporting.formatting import (
    FEW_ROWS,
    TEST_NAMES,
    algorithm_name,
)
from hetero_fl.reporting.methods import method_class
from hetero_fl.reporting.rendering import render
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.shown_metrics import is_metric
from hetero_fl.reporting.summary import describe_attack, describe_protections
from hetero_fl.utils.environment import package_version

FORM = "hetero_fl export 2"
PACKAGES = ("hetero_fl", "torch", "onnx", "onnxscript", "onnxruntime")
PARTITION_SETTINGS = {
    "dirichlet": "alpha",
    "quantity": "alpha",
    "drawn": "alpha",
    "classes": "classes",
}
"""Name of the main setting, keyed by kind of partition."""
PREDICTS = {
    "multiclass": "a probability for each class",
    "multilabel": "a probability for each label",
    "regression": "a value for each target",
}
PREPROCESSING = {
    "resize": "resize",
    "channels": "channels",
    "mean": "normalization",
    "missing": "missing",
}
"""Preprocessing steps that a model card lists, keyed by the field that enables the step."""
Json = dict[str, Any]


def card_facts(run: Run, name: str, exported: Mapping[str, Any]) -> Json:
    """Collect the content of a model card.

    Args:
        run: The finished run.
        name: Client id or "server".
        exported: Entries that describe the exported files and their inputs and outputs.

    Returns:
        The content of `NAME.json`.
    """
    summary = run.summary
    details = run.directory.details()
    config = run.directory.config()
    environment = run.directory.environment()
    model = run.load_models(name)[name]
    method = method_class(summary["algorithm"])
    label_frequencies = "none"
    if model.log_prior is not None:
        label_frequencies = "added" if exported["home"] else "left out"
    facts: Json = {
        "form": FORM,
        **exported,
        "run": {
            **{key: summary[key] for key in ("name", "algorithm", "seed")},
            "rounds_completed": run.record_of(name)["round"],
        },
        "method": {
            "title": algorithm_name(summary["algorithm"]),
            "settings": config.get("algorithm", {}),
        },
        "model": {
            "id": name,
            "file": run.directory.name_of(run.model_file(name)),
            "architecture": model.arch.spec_id,
            "parameters": sum(model.tensors[n].numel() for n in model.arch.parameter_names),
            "preprocess": {k: v for k, v in model.preprocess.items() if v not in (None, ())},
            "label_frequencies": label_frequencies,
        },
        "data": {
            **summary["data"],
            "about": details.get("about", ""),
            "clients": details.get("population", len(summary["clients"])),
            "partition": (config.get("data") or {}).get("partition") or {},
            "own_source": any("data" in c["settings"] for c in details["clients"].values()),
            "rows": details["rows"].get(name),
        },
        "privacy": summary["privacy"],
        "protections": describe_protections(summary, details),
        "figures": _scores(run, name),
        "evaluated_when": details.get("evaluated_when", ""),
        "own_readout": method is None or method.predict is not Algorithm.predict,
        "unit": model.task.unit,
        "relative": model.task.kind == "regression" and details.get("relative", False),
        "versions": {
            "run": {
                "hetero_fl": environment.get("hetero_fl"),
                "python": environment.get("python"),
                "torch": environment["packages"].get("torch"),
                "numpy": environment["packages"].get("numpy"),
            },
            "export": {
                package: found for package in PACKAGES if (found := package_version(package))
            },
        },
    }
    attack = describe_attack(summary.get("attacks"))
    limits = render("card_limits.txt", **facts, attack=attack, few_rows=FEW_ROWS)
    return facts | {"limits": limits.splitlines()}


def _scores(run: Run, name: str) -> Json:
    """Return the scores of a model in its round.

    Returns:
        The scores and the number of test rows, keyed by test set. Test sets without scores are
        omitted.
    """
    record = run.record_of(name)
    client = {"global": record["server"]} if name == "server" else record["clients"].get(name, {})
    rows = run.directory.details()["rows"].get(name, {}).get("test", 0)
    tests = {
        "personal": (client.get("personal"), rows),
        "global": (client.get("global"), run.summary["data"]["n_test"]),
    }
    return {
        test_set: {"n": count, **{m: value for m, value in found.items() if is_metric(m)}}
        for test_set, (found, count) in tests.items()
        if found
    }


def card_markdown(content: Mapping[str, Any]) -> str:
    """Format the content of `NAME.json` as a model card in Markdown."""
    figures = content["figures"].values()
    return render(
        "card.md",
        **content,
        predicts=PREDICTS[content["task"]],
        steps=[PREPROCESSING[k] for k in content["model"]["preprocess"] if k in PREPROCESSING],
        most_names=MANY_CLASSES,
        partition_setting=PARTITION_SETTINGS.get(content["data"]["partition"].get("kind")),
        test_names=TEST_NAMES,
        metrics=list(dict.fromkeys(name for scores in figures for name in scores if name != "n")),
    )
