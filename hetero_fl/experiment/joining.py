"""A newcomer: what a finished run is worth to somebody who was not in it, against the number of labelled examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hetero_fl.config.load import Overrides, override_list
from hetero_fl.data import Dataset, with_test
from hetero_fl.errors import UserError
from hetero_fl.experiment.legacy import Legacy
from hetero_fl.experiment.newcomers import Newcomers, Site, labels
from hetero_fl.experiment.scoring import comparable, in_run_order, load_as, renumbered
from hetero_fl.own_code import CodePermission, references
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.rundir import check_vacant

PATIENTS, SEEDS, EPOCHS = (10, 30, 100, 300), (0, 1, 2, 3, 4), 10


def join(
    run: Run | str | Path,
    data: str | Dataset,
    model: str | None = None,
    *,
    out: str | Path,
    label: str | None = None,
    take: str | None = None,
    patients: Sequence[int] = PATIENTS,
    seeds: Iterable[int] = SEEDS,
    epochs: int = EPOCHS,
    overrides: Overrides = (),
    say: Callable[[str], None] = lambda line: None,
    allow_code: bool | CodePermission = False,
) -> dict[str, Any]:
    """Let a newcomer begin with what a finished run leaves, and compare that with training from scratch.

    It takes the shared backbone (if clients with its architecture shared theirs), or the consensus of all models as a
    teacher on the run's public rows, or on its own unlabelled ones where there are none, and trains on with its own labelled
    examples. Writes `join.json`, `join.md`, `join.png` and the models of the first seed with the most labels into `out`;
    returns the content of `join.json`.

    Args:
        data: a local file, a source's name, or a data set in hand: training rows, and a test set (else a fifth of them).
        model: of `model_zoo`; none: the run's most frequent. It trains as the run's clients with that model do.
        label: a table's column of labels; none: the run's own.
        take: backbone, teacher or both; none: each that there is.
        patients: numbers of labelled patients (of examples, where the data does not say whose they are).
        epochs: of fine-tuning, though at least 60 steps; from scratch four times as many.
        overrides: settings of the newcomer as of a client, `optimizer.lr=0.0005`, or of `runtime`.
        allow_code: Whether code that the run's files name may run.

    Raises:
        UserError: data, model or settings that do not fit the run; a backbone that nobody shared.
    """
    legacy, out = Legacy(Run.of(run, allow_code)), Path(out)
    overrides = override_list(overrides)
    CodePermission.of(allow_code).check_written(references({"--data": data, "--model": model, "overrides": overrides}))
    check_vacant(out, besides="")  # nothing of it is gone on with
    dataset = in_run_order(data, legacy.run) if isinstance(data, Dataset) else load_as(legacy.run, data, label)
    site = _site(dataset, legacy, patients)
    name = model or legacy.usual
    plan = Newcomers(legacy, site, dataset.name, name, epochs, overrides)
    begins = plan.beginnings(take)
    for split, examples in (("training", site.train), ("test", site.test)):
        if note := legacy.overlap(examples.x, f"the newcomer's {split} rows", "it"):
            legacy.notes.append(note)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    seeds = list(dict.fromkeys(seeds))
    for seed in seeds:
        for way, given in begins.items():
            keep = None if seed != seeds[0] else out / "models" / f"{way}.safetensors"
            rows += [{"begins": way, "seed": seed, **found} for found in plan.carry_out(seed, way, given, keep)]
            say(f"seed {seed}, {way}: done")
    content = {
        "run": legacy.run.summary["name"],
        "algorithm": legacy.run.summary["algorithm"],
        "data": dataset.name,
        "model": name,
        "unit": site.unit,
        "patients": list(site.counts),
        "seeds": seeds,
        "epochs": epochs,
        "n_test": len(site.test),
        "teacher_on": plan.teacher_on or None,
        "consensus": plan.consensus(),
        "notes": legacy.notes,
        "rows": rows,
    }
    from hetero_fl.reporting.joining import write_join  # loads what draws

    write_join(out, content, legacy.task)
    return content


def _site(dataset: Dataset, legacy: Legacy, patients: Sequence[int]) -> Site:
    task = legacy.task
    if not comparable(dataset.task, task):
        raise UserError(
            f"--data: {dataset.name} is {dataset.task.kind} with {dataset.task.outputs} outputs, the run's models are "
            f"{task.kind} with {task.outputs}"
        )
    dataset = with_test(dataset)
    assert dataset.test is not None
    parts = []
    for examples in (dataset.train, dataset.test):
        y = renumbered(labels(examples), dataset.task, task, f"--data: {dataset.name}")
        parts.append(replace(examples, y=y, group=None, group_names=()))
    train, test = parts
    whole = len(train) if train.patient is None else len(train.patient.unique())
    unit = "examples" if train.patient is None else "patients"
    asked = sorted(set(patients))
    if not asked or asked[0] < 2:
        raise UserError(
            f"--patients: found {', '.join(map(str, asked)) or 'none'}; write numbers from 2 on, such as 10,30,100"
        )
    counts = tuple(n for n in asked if n <= whole)
    if not counts:
        raise UserError(
            f"--patients: found {asked[0]} and more, but {dataset.name} has {whole} labelled {unit} to train on"
        )
    if len(counts) < len(asked):
        legacy.notes.append(f"{dataset.name} has {whole} labelled {unit} to train on; larger numbers are left out")
    return Site(train, test, counts, unit, task, dataset.layout, dataset.vocabulary)
