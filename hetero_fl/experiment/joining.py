"""A newcomer: what a finished run is worth to somebody who was not in it, against the number of labelled examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetero_fl.algorithms.distillation import TEACHER
from hetero_fl.algorithms.newcomer import BACKBONE, SCRATCH, Newcomer
from hetero_fl.architecture import Tensors
from hetero_fl.config import Config, expand, load_config
from hetero_fl.config.clients import ClientSettings
from hetero_fl.data import Dataset, FederatedData, Preprocess, with_test
from hetero_fl.data.base import Examples
from hetero_fl.data.private import Private, Share
from hetero_fl.errors import UserError
from hetero_fl.experiment.legacy import Legacy
from hetero_fl.experiment.prepared import Prepared
from hetero_fl.experiment.scoring import load_as, renumbered
from hetero_fl.files import write_atomically
from hetero_fl.metrics import score
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.rundir import check_vacant
from hetero_fl.runtime.federation import Federation
from hetero_fl.seeding import generator

PATIENTS, SEEDS, EPOCHS = (10, 30, 100, 300), (0, 1, 2, 3, 4), 10
FEWEST_STEPS = 60  # of a training, however few examples there are
LONGER = 4  # times the steps that a training from scratch gets: it has further to go
OF_OTHERS = {
    "scanner",
    "data",
    "size",
    "shares",
    "share_every",
    "epochs",
    "steps",
}  # not taken over from a client of the run


@dataclass(frozen=True)
class Site:
    """The newcomer: its examples, the numbers of labelled patients to try, what those are called."""

    train: Examples
    test: Examples
    counts: tuple[int, ...]
    unit: str

    def rows(self, count: int, seed: int) -> Tensor:
        """Rows of the first so many patients in an order drawn by the seed: a larger number has those of a smaller."""
        draws = generator("join", seed, "labelled")
        if self.train.patient is None:
            return torch.randperm(len(self.train), generator=draws)[:count].sort().values
        patients = self.train.patient.unique()
        chosen = patients[torch.randperm(len(patients), generator=draws)[:count]]
        return torch.nonzero(torch.isin(self.train.patient, chosen)).squeeze(1)


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
    overrides: Iterable[str] = (),
    say: Callable[[str], None] = lambda line: None,
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
        take: backbone or teacher; none: each that there is.
        patients: numbers of labelled patients (of examples, where the data does not say whose they are).
        epochs: of fine-tuning, though at least 60 steps; from scratch four times as many.
        overrides: settings of the newcomer as of a client, `optimizer.lr=0.0005`, or of `runtime`.

    Raises:
        UserError: data, model or settings that do not fit the run; a backbone that nobody shared.
    """
    legacy, out = Legacy(run if isinstance(run, Run) else Run(run)), Path(out)
    check_vacant(out)
    dataset = data if isinstance(data, Dataset) else load_as(legacy.run, data, label)
    site = _site(dataset, legacy, patients)
    name = model or legacy.usual
    plan = _Plan(legacy, site, dataset.name, name, epochs, list(overrides))
    begins = plan.beginnings(take)
    seen = {split: legacy.seen(examples.x) for split, examples in (("training", site.train), ("test", site.test))}
    for split, count in seen.items():
        if count:
            legacy.notes.append(
                f"{count} of the newcomer's {split} rows are training rows of the run: figures flatter it"
            )
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
        "teacher_on": plan.teacher_on if TEACHER in begins else None,
        "consensus": score(legacy.task, legacy.consensus(site.test.x), _y(site.test)),
        "notes": legacy.notes,
        "rows": rows,
    }
    from hetero_fl.reporting.joining import write_join  # loads what draws

    write_join(out, content, legacy.task)
    return content


def _site(dataset: Dataset, legacy: Legacy, patients: Sequence[int]) -> Site:
    task = legacy.task
    if (dataset.task.kind, dataset.task.outputs) != (task.kind, task.outputs):
        raise UserError(
            f"--data: {dataset.name} is {dataset.task.kind} with {dataset.task.outputs} outputs, the run's models are "
            f"{task.kind} with {task.outputs}"
        )
    dataset = with_test(dataset)
    assert dataset.test is not None
    parts = []
    for examples in (dataset.train, dataset.test):
        y = renumbered(_y(examples), dataset.task, task, f"--data: {dataset.name}")
        parts.append(Examples(examples.x, y, patient=examples.patient, patient_names=examples.patient_names))
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
    return Site(train, test, counts, unit)


def _y(examples: Examples) -> Tensor:
    assert examples.y is not None  # whoever loaded them has checked it
    return examples.y


class _Plan:
    """One newcomer of each number of labels in a federation of its own, in which each trains alone."""

    def __init__(
        self, legacy: Legacy, site: Site, name: str, model: str, epochs: int, overrides: Sequence[str]
    ) -> None:
        self.legacy, self.site, self.name, self.model, self.epochs = legacy, site, name, model, epochs
        settings, fits = legacy.settings(model)
        taken = settings.model_dump(mode="json", exclude_unset=True)
        self.defaults = {k: v for k, v in taken.items() if k not in OF_OTHERS} | ({} if fits else {"model": model})
        self.overrides = [o if o.startswith("runtime.") else f"clients.defaults.{o}" for o in overrides]
        self.transfer: Tensor | None = None
        self.teacher_on = ""

    def config(self, seed: int, times: int = 1) -> Config:
        """The newcomers' configuration: as the run's client trains, for longer if `times` is above one."""
        batch = int(self.defaults.get("batch_size", ClientSettings().batch_size))
        groups = [
            {"name": f"with_{n}", "steps": times * max(FEWEST_STEPS, self.epochs * -(-n // batch))}
            for n in self.site.counts
        ]
        source = {
            "name": "join",
            "seed": seed,
            "rounds": 1,
            "clients": {"defaults": self.defaults, "groups": groups},
            "runtime": {"executor": "serial", "device": self.legacy.config.runtime.device},
        }
        return load_config(source, self.overrides)

    def federation(self, config: Config) -> tuple[FederatedData, Federation]:
        """The newcomers and their rows; public rows if a teacher speaks of them."""
        clients, site = expand(config.clients), self.site
        none = torch.zeros(0, dtype=torch.int64)
        private = {
            f"with_{n}": {
                "train": Share(site.train, site.rows(n, config.seed)),
                "validation": Share(site.train, none),
                "test": Share(site.test, none),
            }
            for n in site.counts
        }
        public = {
            "common_test": Share(site.test, torch.arange(len(site.test))),
            "common_validation": Share(site.test, none),
        }
        if self.transfer is not None:
            public["proxy"] = Share(Examples(self.transfer), torch.arange(len(self.transfer)))
        data = FederatedData(self.legacy.task, self.name, clients, Private(private), public, config.seed)
        return data, Federation.of(config, data, clients, student=False)

    def beginnings(self, take: str | None) -> dict[str, Tensors | Tensor | None]:
        """What a newcomer may begin with: nothing, and of the run what is asked for or can be had."""
        _, federation = self.federation(self.config(0))
        card = next(iter(federation.cards.values()))
        begins: dict[str, Tensors | Tensor | None] = {SCRATCH: None}
        if take not in (None, BACKBONE, TEACHER):
            raise UserError(f"--take: found '{take}'; choose from {BACKBONE}, {TEACHER}")
        if take != TEACHER:
            backbone = self.legacy.backbone(card.arch)
            if backbone is None:
                why = f"nobody in {self.legacy.run.path} shared the backbone of a {card.arch.id}"
                if take == BACKBONE:
                    raise UserError(f"--take: {why}; take teacher, or --model {self.legacy.usual}")
                self.legacy.notes.append(why)
            else:
                begins[BACKBONE] = backbone
        if take != BACKBONE:
            self.transfer, self.teacher_on = self._transfer(card.preprocess)
            begins[TEACHER] = self.legacy.consensus(self.transfer)
        return begins

    def _transfer(self, view: Preprocess) -> tuple[Tensor, str]:
        """The raw rows on which the teacher is heard, in words, too."""
        public, own = self.legacy.public, self.site.train.x
        if public is not None and view.shape(tuple(public.shape[1:])) == view.shape(tuple(own.shape[1:])):
            return public, f"the run's {len(public):,} public rows"
        if public is not None:
            self.legacy.notes.append("the run's public rows have another shape than the newcomer's")
        return own, f"the newcomer's own {len(own):,} training rows, without their labels"

    def carry_out(self, seed: int, way: str, given: Tensors | Tensor | None, keep: Path | None) -> list[dict[str, Any]]:
        """Figures on the test rows for each number of labels; `keep`: where the model with the most goes."""
        config = self.config(seed, LONGER if way == SCRATCH else 1)
        data, federation = self.federation(config)
        rounds = Prepared(config, Newcomer(), federation, data, [], {}).rounds()
        last = f"with_{self.site.counts[-1]}"

        def save(id: str, encoded: bytes) -> None:
            if keep is not None and id == last:
                keep.parent.mkdir(exist_ok=True)
                write_atomically(keep, encoded)

        try:
            if given is not None:
                rounds.server.state[way] = given
            rounds.round()
            readings = rounds.evaluate(details=keep is not None, save=save if keep is not None else None)
        finally:
            rounds.executor.close()
        found = {id: reading.scores["global"] for id, reading in readings.clients.items()}
        return [
            {"patients": n, "rows": data.n_rows(f"with_{n}", "train"), **found[f"with_{n}"]} for n in self.site.counts
        ]
