"""Evaluate what a finished run is worth to a client that joins later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetero_fl.algorithms.distillation import TEACHER
from hetero_fl.algorithms.onboarding import BACKBONE, BOTH, SCRATCH, JoiningClient
from hetero_fl.config import Config, expand_population
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.load import Overrides, override_list
from hetero_fl.core.metrics import Scores, score
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset, FederatedData, Preprocess, row_strata, with_test
from hetero_fl.data.client_rows import ClientRows
from hetero_fl.data.dataset import ColumnLayout, Examples, RowSelection, Vocabulary
from hetero_fl.data.partition import most_common_stratum
from hetero_fl.data.preprocessing import NOTHING, check_missing_values, usable_rows
from hetero_fl.experiment.evaluation import are_comparable, load_as, order_columns, renumber_targets
from hetero_fl.experiment.onboarding.transfer import TransferSource
from hetero_fl.experiment.preparation import PreparedRun, load_config
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import check_vacant
from hetero_fl.utils.code_permission import CodePermission, find_references
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.seeding import keyed_generator
from hetero_fl.utils.serialization import write_atomically

# Newcomers with different numbers of labels, in a federation of their own in which each trains
# alone.

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
    "machine",
}  # not taken over from a client of the run

TransferredParts = dict[str, Tensors | Tensor]  # what is received, by name


@dataclass(frozen=True)
class JoiningSite:
    """The newcomer: its examples, the numbers of labelled patients to try, what those are called, and how often each label
    occurs (see `hetero_fl.data.row_strata`; of a patient with several the commonest)."""

    train: Examples
    test: Examples
    counts: tuple[int, ...]
    unit: str
    task: Task
    layout: ColumnLayout = NOTHING
    vocabulary: Vocabulary | None = None

    def rows(self, count: int, seed: int) -> Tensor:
        """Rows of the first so many patients in an order drawn by the seed in which labels come evenly: any number has the
        mix of all, and a larger one has the patients of a smaller."""
        unit = torch.arange(len(self.train)) if self.train.patient is None else self.train.patient
        unit = unit.unique(return_inverse=True)[1]
        label = most_common_stratum(row_strata(self.train.labels, self.task), unit)
        draws = torch.rand(
            len(label), generator=keyed_generator("join", seed, "labelled"), dtype=torch.float64
        )
        place = torch.empty_like(draws)
        for kind in label.unique():
            mine = torch.nonzero(label == kind).squeeze(1)
            place[mine[draws[mine].argsort()]] = (
                torch.arange(len(mine), dtype=torch.float64) + 0.5
            ) / len(mine)
        # the draws decide between labels that are level
        chosen = (place + 1e-4 * draws / len(label)).argsort()[:count]
        return torch.nonzero(torch.isin(unit, chosen)).squeeze(1)


class JoiningClients:
    """One newcomer of each number of labels in a federation of its own, in which each trains alone."""

    def __init__(
        self,
        source_run: TransferSource,
        site: JoiningSite,
        name: str,
        model: str,
        epochs: int,
        overrides: Sequence[str],
    ) -> None:
        self.legacy = source_run
        self.site = site
        self.name = name
        self.model = model
        self.epochs = epochs
        settings, fits = source_run.settings_for(model)
        taken = settings.model_dump(mode="json", exclude_unset=True)
        self.defaults = {k: v for k, v in taken.items() if k not in OF_OTHERS} | (
            {} if fits else {"model": model}
        )
        self.overrides = [
            o if o.startswith("runtime.") else f"clients.defaults.{o}" for o in overrides
        ]
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

    def federation(self, config: Config) -> tuple[FederatedData, FederationSpec]:
        """The newcomers and their rows; public rows if a teacher speaks of them."""
        clients = expand_population(config.clients)
        site = self.site
        none = torch.zeros(0, dtype=torch.int64)
        private = {
            f"with_{n}": {
                "train": RowSelection(site.train, site.rows(n, config.seed)),
                "validation": RowSelection(site.train, none),
                "test": RowSelection(site.test, torch.arange(len(site.test))),
            }
            for n in site.counts
        }
        # all is at home
        public = {
            name: RowSelection(site.test, none) for name in ("common_test", "common_validation")
        }
        if self.transfer is not None:
            public["proxy"] = RowSelection(
                Examples(self.transfer), torch.arange(len(self.transfer))
            )
        own = ClientRows(private)
        data = FederatedData(
            self.legacy.task, self.name, clients, own, public, config.seed,
            layout=site.layout, vocabulary=site.vocabulary,
        )  # fmt: skip
        check_missing_values(clients.profiles, clients, own, public, site.layout)
        return data, FederationSpec.from_config(
            config.model_copy(update={"privacy": None}), data, clients, student=False
        )

    def transfer_options(self, requested: str | None) -> dict[str, TransferredParts]:
        """What a newcomer may begin with: nothing, and of the run what is asked for or can be had."""
        _, federation = self.federation(self.config(0))
        client_info = next(iter(federation.client_infos.values()))
        begins: dict[str, TransferredParts] = {SCRATCH: {}}
        if requested not in (None, BACKBONE, TEACHER, BOTH):
            raise UserError(
                f"--take: found '{requested}'; choose from {BACKBONE}, {TEACHER}, {BOTH}"
            )
        if requested != TEACHER:
            backbone = self.legacy.backbone(client_info.arch)
            if backbone is None:
                why = f"nobody in {self.legacy.run.path} shared the backbone of a {client_info.arch.spec_id}"
                if requested is not None:
                    raise UserError(
                        f"--take: {why}; take teacher, or --model {self.legacy.most_common_model}"
                    )
                self.legacy.notes.append(why)
            else:
                begins[BACKBONE] = {BACKBONE: backbone}
        if requested != BACKBONE:
            transfer, self.teacher_on = self._transfer_rows(client_info.preprocess)
            teacher = self.legacy.consensus(transfer)
            heard = usable_rows(transfer, client_info.preprocess) & ~teacher.isnan().any(1)
            if bool(heard.any()):
                self.transfer = transfer[heard]
                begins[TEACHER] = {TEACHER: teacher[heard]}
            else:
                why = f"of {self.teacher_on} there is none that both the newcomer and a model of the run see"
                if requested is not None:
                    raise UserError(f"--take: {why}; take backbone")
                self.legacy.notes.append(why)
                self.teacher_on = ""
        if BACKBONE in begins and TEACHER in begins:
            begins[BOTH] = {**begins[BACKBONE], **begins[TEACHER]}
        return begins if requested is None else {way: begins[way] for way in (SCRATCH, requested)}

    def _transfer_rows(self, view: Preprocess) -> tuple[Tensor, str]:
        """The raw rows on which the teacher is heard, in words, too."""
        public = self.legacy.public
        own = self.site.train.x
        fits = public is not None and view.shape(tuple(public.shape[1:])) == view.shape(
            tuple(own.shape[1:])
        )
        if public is not None and fits and bool(usable_rows(public, view).any()):
            return public, f"the run's {len(public):,} public rows"
        if public is not None:
            why = "the newcomer sees nothing of the run's public rows"
            self.legacy.notes.append(
                why if fits else "the run's public rows have another shape than the newcomer's"
            )
        return own, f"the newcomer's own {len(own):,} training rows, without their labels"

    def consensus_scores(self) -> Scores:
        """What all models of the run together reach on the test rows, those of which one of them sees anything."""
        test = self.site.test
        said = self.legacy.consensus(test.x)
        heard = ~said.isnan().any(1)
        unit = None if test.unit is None else test.unit[heard]
        return score(self.legacy.task, said[heard], test.labels[heard], unit)

    def run_transfer(
        self, seed: int, option: str, parts: TransferredParts, save_path: Path | None
    ) -> list[dict[str, Any]]:
        """Figures on the test rows for each number of labels; `save_path`: where the model with the most goes."""
        config = self.config(seed, LONGER if option == SCRATCH else 1)
        data, federation = self.federation(config)
        trainer = PreparedRun(config, JoiningClient(), federation, data, [], {}).make_trainer()
        last = f"with_{self.site.counts[-1]}"

        def save(client_id: str, encoded: bytes) -> None:
            if save_path is not None and client_id == last:
                save_path.parent.mkdir(exist_ok=True)
                write_atomically(save_path, encoded)

        try:
            trainer.server.state.update(parts)
            trainer.run_round()
            readings = trainer.evaluate(
                details=save_path is not None, save=save if save_path is not None else None
            )
        finally:
            trainer.executor.close()
        found = {id: reading.scores["personal"] for id, reading in readings.clients.items()}
        return [
            {"patients": n, "rows": data.n_rows(f"with_{n}", "train"), **found[f"with_{n}"]}
            for n in self.site.counts
        ]


# A newcomer: what a finished run is worth to somebody who was not in it, against the number of
# labelled examples.

PATIENTS = (10, 30, 100, 300)
SEEDS = (0, 1, 2, 3, 4)
EPOCHS = 10


def join(
    run: Run | str | Path,
    data: str | Dataset,
    model: str | None = None,
    *,
    out: str | Path,
    label: str | None = None,
    transfer: str | None = None,
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
        transfer: backbone, teacher or both; none: each that there is.
        patients: numbers of labelled patients (of examples, where the data does not say whose they are).
        epochs: of fine-tuning, though at least 60 steps; from scratch four times as many.
        overrides: settings of the newcomer as of a client, `optimizer.lr=0.0005`, or of `runtime`.
        allow_code: Whether code that the run's files name may run.

    Raises:
        UserError: data, model or settings that do not fit the run; a backbone that nobody shared.
    """
    legacy = TransferSource(Run.open(run, allow_code))
    out = Path(out)
    overrides = override_list(overrides)
    CodePermission.from_argument(allow_code).check_written(
        find_references({"--data": data, "--model": model, "overrides": overrides})
    )
    check_vacant(out, besides="")  # nothing of it is gone on with
    dataset = (
        order_columns(data, legacy.run)
        if isinstance(data, Dataset)
        else load_as(legacy.run, data, label)
    )
    site = _joining_site(dataset, legacy, patients)
    name = model or legacy.most_common_model
    plan = JoiningClients(legacy, site, dataset.name, name, epochs, overrides)
    begins = plan.transfer_options(transfer)
    for split, examples in (("training", site.train), ("test", site.test)):
        if note := legacy.overlap(examples.x, f"the newcomer's {split} rows", "it"):
            legacy.notes.append(note)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    seeds = list(dict.fromkeys(seeds))
    for seed in seeds:
        for way, given in begins.items():
            keep = None if seed != seeds[0] else out / "models" / f"{way}.safetensors"
            rows += [
                {"begins": way, "seed": seed, **found}
                for found in plan.run_transfer(seed, way, given, keep)
            ]
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
        "consensus": plan.consensus_scores(),
        "notes": legacy.notes,
        "rows": rows,
    }
    from hetero_fl.experiment.onboarding.report import write_join  # loads what draws

    write_join(out, content, legacy.task)
    return content


def _joining_site(
    dataset: Dataset, source_run: TransferSource, patients: Sequence[int]
) -> JoiningSite:
    task = source_run.task
    if not are_comparable(dataset.task, task):
        raise UserError(
            f"--data: {dataset.name} is {dataset.task.kind} with {dataset.task.outputs} outputs, the run's models are "
            f"{task.kind} with {task.outputs}"
        )
    dataset = with_test(dataset)
    assert dataset.test is not None
    parts = []
    for examples in (dataset.train, dataset.test):
        y = renumber_targets(examples.labels, dataset.task, task, f"--data: {dataset.name}")
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
        source_run.notes.append(
            f"{dataset.name} has {whole} labelled {unit} to train on; larger numbers are left out"
        )
    return JoiningSite(train, test, counts, unit, task, dataset.layout, dataset.vocabulary)
