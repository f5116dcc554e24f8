"""The card of an exported model: what it is, what it was trained on, how well it did and where it may not be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hetero_fl.algorithms import Algorithm
from hetero_fl.core.task import MANY
from hetero_fl.reporting import summary as protections
from hetero_fl.reporting.formatting import (
    FEW_ROWS,
    METRICS,
    MISSING,
    algorithm_name,
    capitalize_first,
    format_metric,
    metric_name,
)
from hetero_fl.reporting.methods import method_class
from hetero_fl.reporting.run import Run
from hetero_fl.utils.environment import package_version
from hetero_fl.utils.text import pluralize

FORM = "hetero_fl export 1"
SHOWN = {
    "dirichlet": "alpha",
    "quantity": "alpha",
    "drawn": "alpha",
    "classes": "classes",
}  # what says most of a partition
PACKAGES = ("hetero_fl", "torch", "onnx", "onnxscript", "onnxruntime")
PREDICTS = {
    "multiclass": "a probability for each class",
    "multilabel": "a probability for each label",
    "regression": "a value for each target",
}
Json = dict[str, Any]


def card_facts(run: Run, name: str, exported: Mapping[str, Any]) -> Json:
    """The content of `NAME.json`: what the run has recorded, and what is known of the files `exported`."""
    summary = run.summary
    details = run.directory.details()
    config = run.directory.config()
    environment = run.directory.environment()
    model = run.models[name]
    client = next((c for c in summary["clients"] if c["id"] == name), None)
    used = method_class(summary["algorithm"])
    told: Json = {
        "form": FORM,
        **exported,
        "run": {key: summary[key] for key in ("name", "algorithm", "seed", "rounds_completed")},
        "method": {
            "title": algorithm_name(summary["algorithm"]),
            "settings": config.get("algorithm", {}),
        },
        "model": {
            "id": name,
            "architecture": model.arch.spec_id,
            "parameters": sum(model.tensors[n].numel() for n in model.arch.parameter_names),
            "preprocess": {k: v for k, v in model.preprocess.items() if v not in (None, ())},
            "label_frequencies": "none"
            if model.log_prior is None
            else "added"
            if exported["home"]
            else "left out",
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
        "protections": protections.describe_protections(summary, details),
        "figures": _figures(summary, details, name, client),
        "read": details.get("read", ""),
        "own_readout": used is None or used.predict is not Algorithm.predict,
        "unit": model.task.unit,
        "relative": model.task.kind == "regression" and details.get("relative", False),
        "versions": {
            "run": {"hetero_fl": environment.get("hetero_fl"), "python": environment.get("python")}
            | {package: environment["packages"].get(package) for package in ("torch", "numpy")},
            "export": {
                package: found for package in PACKAGES if (found := package_version(package))
            },
        },
    }
    return told | {"limits": _limits(told, protections.describe_attack(summary.get("attacks")))}


def card_markdown(content: Mapping[str, Any]) -> str:
    """The same as a page."""
    run = content["run"]
    model = content["model"]
    data = content["data"]
    graph = any(file["checked"] for file in content["files"])
    parts = [
        f"# {model['id']}, of the run {run['name']}",
        f"{model['architecture']}, {model['parameters']:,} parameters, trained by {content['method']['title']} "
        f"over {pluralize(run['rounds_completed'], 'round')} (seed {run['seed']}). It gives {PREDICTS[content['task']]}.",
        "## Use",
        *(_use(file, content) for file in content["files"]),
        *([_inputs(content), _output(content)] if graph else []),
        "## Data and method",
        _data(data, model),
        f"The method is {content['method']['title']}; its settings are in the `.json` beside this page.",
        "## Privacy and protections",
        " ".join(content["protections"]),
        "## Figures",
        _table(content),
        "## Limits",
        "\n".join(f"- {line}" for line in content["limits"]),
        "## Licence",
        f"Data: {data['about'] or data['name']}. The run's configuration states no licence of the model: settle it before you "
        "pass the file on.",
        "## Versions",
        f"Trained with {_format_versions(content['versions']['run'])}; written with {_format_versions(content['versions']['export'])}.",
        f"SHA-256:\n\n{_digests(content)}",
    ]
    return "\n\n".join(parts) + "\n"


def _figures(summary: Json, details: Json, name: str, client: Json | None) -> Json:
    """The last round's, of the model that was saved; each with the rows that they are from."""
    found: Json = {}
    if client is not None and client["personal"]:
        found["at home"] = {"n": details["rows"][name]["test"], **_known_scores(client["personal"])}
    common = client["global"] if client is not None else (summary["server"] or {}).get("last")
    if common:
        found["in common"] = {"n": summary["data"]["n_test"], **_known_scores(common)}
    return found


def _known_scores(scores: Mapping[str, Any]) -> Json:
    return {name: scores[name] for name in METRICS if name in scores}


def _limits(content: Json, had_attack: str) -> list[str]:
    data = content["data"]
    home = content["figures"].get("at home")
    lines = []
    if data["simulated"]:
        lines.append(
            "Generated data stood in for the real set. The figures say nothing about real data."
        )
    if had_attack:
        lines.append(had_attack)
    lines.append(
        "The figures are of the test rows named above. How the model does on other machines and other people is not known: "
        "score it on their rows before it is used (`hetero-fl evaluate`)."
    )
    if home and home["n"] < FEW_ROWS:
        lines.append(f"Those at home are uncertain: they are from {pluralize(home['n'], 'row')}.")
    if content["own_readout"]:
        lines.append(
            f"The method reads its models in a way of its own ({content['read']}): where that is another model or readout than this "
            "file's, the figures are not the file's. `hetero-fl evaluate` scores the saved model itself."
        )
    if content["model"]["label_frequencies"] == "added":
        lines.append(
            "The client's own label frequencies are in the file: it is for that client's people. Figures in common are without "
            "them."
        )
    if content["model"]["label_frequencies"] == "left out":
        lines.append(
            "The client's own label frequencies are left out; figures at home are with them (`--home` writes that file)."
        )
    if content["inputs"][0]["kind"] == "tokens":
        lines.append(
            "The vocabulary is no part of the file: words are numbered before they are given to it."
        )
    return lines


def _use(file: Json, content: Mapping[str, Any]) -> str:
    if not file["checked"]:
        return (
            f"`{file['name']}` is tensors alone, the run's own file: the architecture is built by `model_zoo`, and hetero_fl "
            "reads it (`SavedModel.load(FILE).module()` in `hetero_fl.core.saved_model`; for raw examples `hetero_fl.Run(RUN).predict`). "
            "Nothing here scores it without the two; an ONNX file needs neither."
        )
    data = (
        "FILE.csv"
        if content["inputs"][0]["kind"] in ("row", "tokens") and not content["inputs"][1:]
        else "FILE.npz"
    )
    sizes = ", ".join(map(str, file["checked"]["batches"]))
    apart = file["checked"]["largest_difference"]
    return (
        f"`{file['name']}` needs numpy and onnxruntime, and nothing of hetero_fl. Run again after it was written, on drawn examples in "
        f"batches of {sizes}, it was at most {apart:.1e} from the run's own predictions.\n\n"
        f"```console\npython score.py --model {file['name']} --data {data}\n```"
    )


def _digests(content: Mapping[str, Any]) -> str:
    lines = [f"- `{file['name']}`: `{file['sha256']}`" for file in content["files"]]
    lines.append(
        f"- the run's `models/{content['model']['id']}.safetensors`: `{content['source_sha256']}`"
    )
    return "\n".join(lines)


def _inputs(content: Mapping[str, Any]) -> str:
    lines = ["| input | shape | type | what it is |", "| --- | --- | --- | --- |"]
    for one in content["inputs"]:
        columns = f" ({', '.join(one['columns'])})" if "columns" in one else ""
        shape = " × ".join(map(str, one["shape"]))
        lines.append(f"| `{one['name']}` | {shape} | {one['dtype']} | {one['meaning']}{columns} |")
    seen = ", ".join(
        k for k in content["model"]["preprocess"] if k in ("resize", "channels", "mean", "missing")
    )
    inside = (
        f" Preprocessing is in the file ({seen.replace('mean', 'normalisation')})." if seen else ""
    )
    return "\n".join(lines) + (
        f"\n\nExamples are raw, as the data set has them.{inside} What is no example (infinity, pixels or tokens out of range, a "
        "value missing that the model has to see) gives NaN."
    )


def _output(content: Mapping[str, Any]) -> str:
    output = content["output"]
    names = ", ".join(content["names"][:MANY])
    names += f" … (all {len(content['names']):,} in the `.json`)" if content["names"][MANY:] else ""
    text = f"Output `{output['name']}`, batch × {output['shape'][1]}, {output['dtype']}: {names}."
    if content["relative"]:
        times = f", which gives {content['unit']}" if content["unit"] else ""
        return f"{text} Values are relative: multiply each by what its row's targets were relative to{times} (`--unit`)."
    return (
        f"{text} In {content['unit']}."
        if content["task"] == "regression" and content["unit"]
        else text
    )


def _data(data: Json, model: Json) -> str:
    partition = data["partition"]
    extra = SHOWN.get(partition.get("kind", ""))
    how = f"partition {partition.get('kind')}" + (f", {extra} {partition[extra]}" if extra else "")
    how += "; some brought data of their own" if data["own_source"] else ""
    lines = [
        f"{capitalize_first(data['name'])}{': ' + data['about'] if data['about'] else ''}. {pluralize(data['n_train'], 'training row')} of "
        f"{pluralize(data['clients'], 'client')} ({how}), {pluralize(data['n_proxy'], 'proxy row')}, "
        f"{pluralize(data['n_test'], 'common test row')}."
    ]
    if data["rows"]:
        listed = ", ".join(f"{count:,} {split}" for split, count in data["rows"].items())
        lines.append(f"{model['id']} has {listed} rows.")
    return " ".join(lines)


def _table(content: Mapping[str, Any]) -> str:
    found = content["figures"]
    if not found:
        return "None were taken."
    lines = [
        "| | "
        + " | ".join(f"{where} (n = {scores['n']:,})" for where, scores in found.items())
        + " |",
        "| --- |" + " ---: |" * len(found),
    ]
    for name in (m for m in METRICS if any(m in scores for scores in found.values())):
        values = " | ".join(
            format_metric(s[name], name) if name in s else MISSING for s in found.values()
        )
        lines.append(f"| {metric_name(name, content['unit'])} | {values} |")
    return "\n".join(
        [
            *lines,
            "",
            f"After round {content['run']['rounds_completed']}, the last; read {content['read']}.",
        ]
    )


def _format_versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {found}" for name, found in versions.items() if found)
