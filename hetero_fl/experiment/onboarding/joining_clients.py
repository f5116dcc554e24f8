"""Clients that join a finished run, in comparison with training from scratch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetero_fl.algorithms.distillation import TEACHER
from hetero_fl.algorithms.hybrid import BACKBONE, BOTH, SCRATCH, JoiningClient
from hetero_fl.config import Config, expand_population
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.load import Overrides, override_list
from hetero_fl.core.images import check_pixels
from hetero_fl.core.metrics import Scores, score
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset, FederatedData, Preprocess, row_strata, with_test
from hetero_fl.data.client_rows import ClientRows
from hetero_fl.data.dataset import ColumnLayout, Examples, Vocabulary
from hetero_fl.data.partition.units import most_common_stratum
from hetero_fl.data.preprocessing import NOTHING, check_missing_values, usable_rows
from hetero_fl.data.splits import RowSelection
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.evaluation import from_objects, load_as, targets_of_models
from hetero_fl.experiment.onboarding.transfer import TransferSource
from hetero_fl.experiment.preparation import PreparedRun
from hetero_fl.experiment.starting_models import StartingTensors
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import check_vacant
from hetero_fl.utils.code_permission import CodePermission, find_references
from hetero_fl.utils.errors import ArgumentError
from hetero_fl.utils.seeding import keyed_generator
from hetero_fl.utils.serialization import make_folder, write_atomically

# Minimum number of training steps, which applies to small numbers of examples.
MIN_STEPS = 60
# Factor by which training from scratch increases the number of steps.
SCRATCH_STEP_FACTOR = 4
# Client settings of the run that do not apply to the joining client.
NOT_ADOPTED_SETTINGS = {
    "scanner",
    "data",
    "size",
    "shares",
    "share_every",
    "epochs",
    "steps",
    "machine",
}
PATIENTS = (10, 30, 100, 300)
SEEDS = (0, 1, 2, 3, 4)
EPOCHS = 10

TransferredParts = dict[str, Tensors | Tensor]
"""Backbone tensors, teacher predictions, or both, that a joining client receives."""


@dataclass(frozen=True)
class JoiningSite:
    """The data of a joining client.

    Args:
        train: Training rows.
        test: Test rows.
        counts: Numbers of labeled patients or examples to compare, in increasing order.
        unit: Unit of `counts`, "patients" or "examples".
        task: The task of the run.
        layout: Columns of the data.
        vocabulary: Vocabulary of texts, or None for other data.
    """

    train: Examples
    test: Examples
    counts: tuple[int, ...]
    unit: str
    task: Task
    layout: ColumnLayout = NOTHING
    vocabulary: Vocabulary | None = None

    def rows(self, count: int, seed: int) -> Tensor:
        """Return the indices of the training rows of `count` randomly sampled patients.

        Sampling is stratified by label, so that the label distribution is similar for all counts.
        For a given seed, a larger sample includes all patients of a smaller sample.

        Args:
            count: Number of patients, or number of examples if the data has no patients.
            seed: Seed of the sample.

        Returns:
            Indices of training rows, int64 `[N]`.
        """
        unit = torch.arange(len(self.train)) if self.train.patient is None else self.train.patient
        unit = unit.unique(return_inverse=True)[1]
        label = most_common_stratum(row_strata(self.train.labels, self.task), unit)
        draws = torch.rand(
            len(label), generator=keyed_generator("join", seed, "labelled"), dtype=torch.float64
        )
        place = torch.empty_like(draws)
        for value in label.unique():
            members = torch.nonzero(label == value).squeeze(1)
            place[members[draws[members].argsort()]] = (
                torch.arange(len(members), dtype=torch.float64) + 0.5
            ) / len(members)
        # Random draws break ties between labels.
        chosen = (place + 1e-4 * draws / len(label)).argsort()[:count]
        return torch.nonzero(torch.isin(unit, chosen)).squeeze(1)


class JoiningClients:
    """Variants of a joining client with different numbers of labels, which train independently.

    The starting point of a client is "scratch", "backbone", "teacher" or "both" (see `join`).

    Args:
        source_run: The finished run.
        site: The data of the joining client.
        name: Name of the data set.
        model: Name of the model.
        epochs: Number of epochs of fine-tuning.
        overrides: Client settings, or settings of the section `runtime`, as `key=value`.

    Attributes:
        transfer: Raw rows for which the teacher computes predictions, or None without a teacher.
        teacher_on: Description of the rows in `transfer`. Empty without a teacher.
    """

    def __init__(
        self,
        source_run: TransferSource,
        site: JoiningSite,
        *,
        name: str,
        model: str,
        epochs: int,
        overrides: Sequence[str],
    ) -> None:
        self.source_run = source_run
        self.site = site
        self.name = name
        self.model = model
        self.epochs = epochs
        settings, fits = source_run.settings_for(model)
        adopted = settings.model_dump(mode="json", exclude_unset=True)
        self.defaults = {
            key: value for key, value in adopted.items() if key not in NOT_ADOPTED_SETTINGS
        }
        if not fits:
            self.defaults["model"] = model
        self.overrides = [
            o if o.startswith("runtime.") else f"clients.defaults.{o}" for o in overrides
        ]
        self.transfer: Tensor | None = None
        self.teacher_on = ""

    def config(self, seed: int, times: int = 1) -> Config:
        """Return the configuration of a run with one client for each number of labels.

        Args:
            seed: Seed of the run.
            times: Factor by which the number of training steps is multiplied.
        """
        batch = int(self.defaults.get("batch_size", ClientSettings().batch_size))
        groups = [
            {"name": f"with_{n}", "steps": times * max(MIN_STEPS, self.epochs * -(-n // batch))}
            for n in self.site.counts
        ]
        source = {
            "name": "join",
            "seed": seed,
            "rounds": 1,
            "clients": {"defaults": self.defaults, "groups": groups},
            "runtime": {"executor": "serial", "device": self.source_run.config.runtime.device},
        }
        return load_config(source, self.overrides)

    def federation(self, config: Config) -> tuple[FederatedData, FederationSpec]:
        """Create the data and the federation for a configuration from `config`."""
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
        # Only local test rows are evaluated.
        public = {
            name: RowSelection(site.test, none) for name in ("common_test", "common_validation")
        }
        if self.transfer is not None:
            public["proxy"] = RowSelection(
                Examples(self.transfer), torch.arange(len(self.transfer))
            )
        client_rows = ClientRows(private)
        data = FederatedData(
            self.source_run.task,
            self.name,
            clients,
            client_rows,
            public,
            seed=config.seed,
            layout=site.layout,
            vocabulary=site.vocabulary,
        )
        check_missing_values(clients.profiles, clients, client_rows, public, layout=site.layout)
        return data, FederationSpec.from_config(
            config.model_copy(update={"privacy": None}), data, clients, student=False
        )

    def transfer_options(self, requested: str | None) -> dict[str, TransferredParts]:
        """Return the tensors that the joining clients receive for each starting point.

        With a teacher, the attributes `transfer` and `teacher_on` are set.

        Args:
            requested: "backbone", "teacher" or "both". If None, all starting points that the run
                provides are included.

        Returns:
            The tensors, keyed by starting point. The starting point "scratch" has no tensors and is
            always included.

        Raises:
            UserError: If the run does not provide the requested starting point.
        """
        _, federation = self.federation(self.config(0))
        client_info = next(iter(federation.client_infos.values()))
        options: dict[str, TransferredParts] = {SCRATCH: {}}
        if requested not in (None, BACKBONE, TEACHER, BOTH):
            raise ArgumentError(
                f"transfer: unknown choice '{requested}'; choose from {BACKBONE}, {TEACHER}, {BOTH}"
            )
        if requested != TEACHER:
            backbone = self.source_run.backbone(client_info.arch)
            if backbone is not None:
                options[BACKBONE] = {BACKBONE: backbone}
            else:
                problem = (
                    f"no client in {self.source_run.run.path} shared the backbone of a "
                    f"{client_info.arch.spec_id}"
                )
                advice = f"choose teacher, or the model {self.source_run.most_common_model}"
                self._report_missing(problem, advice, requested)
        if requested != BACKBONE:
            self._add_teacher(options, client_info.preprocess, requested)
        if BACKBONE in options and TEACHER in options:
            options[BOTH] = {**options[BACKBONE], **options[TEACHER]}
        if requested is None:
            return options
        return {name: options[name] for name in (SCRATCH, requested)}

    def _add_teacher(
        self, options: dict[str, TransferredParts], preprocess: Preprocess, requested: str | None
    ) -> None:
        """Add the teacher's predictions to the starting points, if there are usable rows."""
        rows, self.teacher_on = self._transfer_rows(preprocess)
        teacher = self.source_run.consensus(rows)
        usable = usable_rows(rows, preprocess) & ~teacher.isnan().any(1)
        if bool(usable.any()):
            self.transfer = rows[usable]
            options[TEACHER] = {TEACHER: teacher[usable]}
            return
        problem = (
            f"{self.teacher_on}: no row is usable for both the joining client and a model of the "
            "run"
        )
        self._report_missing(problem, "choose backbone", requested)
        self.teacher_on = ""

    def _report_missing(self, problem: str, advice: str, requested: str | None) -> None:
        """Raise ArgumentError if the missing starting point is requested, else add a note."""
        if requested is not None:
            raise ArgumentError(f"transfer: {problem}; {advice}")
        self.source_run.notes.append(problem)

    def _transfer_rows(self, preprocess: Preprocess) -> tuple[Tensor, str]:
        """Choose the raw rows for which the teacher computes predictions, and describe the rows."""
        public = self.source_run.public
        private = self.site.train.x
        if public is not None:
            has_shape = preprocess.shape(tuple(public.shape[1:])) == preprocess.shape(
                tuple(private.shape[1:])
            )
            if has_shape and bool(usable_rows(public, preprocess).any()):
                return public, f"the run's {len(public):,} public rows"
            self.source_run.notes.append(
                "the run's public rows have no values that the joining client uses"
                if has_shape
                else "the run's public rows have another shape than the joining client's rows"
            )
        return private, f"the joining client's {len(private):,} training rows, without labels"

    def consensus_scores(self) -> Scores:
        """Score the consensus of the run's models on all test rows that a model can use."""
        test = self.site.test
        logits = self.source_run.consensus(test.x)
        usable = ~logits.isnan().any(1)
        test = test.select_rows(usable.nonzero().squeeze(1))
        return score(
            self.source_run.task,
            logits[usable],
            test.labels,
            test.unit,
            excluded=test.excluded,
        )

    def run_transfer(
        self, seed: int, option: str, parts: TransferredParts, save_path: Path | None
    ) -> list[dict[str, Any]]:
        """Train the joining clients from one starting point.

        Args:
            seed: Seed of the run.
            option: Name of the starting point.
            parts: Tensors that the clients receive.
            save_path: File in which the model trained with the most labels is saved. If None, no
                model is saved.

        Returns:
            One dictionary for each number of labels, with the local test scores, the number of
            labels under `patients`, and the number of training rows under `rows`.
        """
        config = self.config(seed, SCRATCH_STEP_FACTOR if option == SCRATCH else 1)
        data, federation = self.federation(config)
        trainer = PreparedRun(
            config, JoiningClient(), federation, data, [], StartingTensors()
        ).make_trainer()
        last = f"with_{self.site.counts[-1]}"

        def save(client_id: str, encoded: bytes) -> None:
            if save_path is not None and client_id == last:
                save_path.parent.mkdir(exist_ok=True)
                write_atomically(save_path, encoded)

        try:
            trainer.server.state.update(parts)
            trainer.run_round()
            result = trainer.evaluate(
                details=save_path is not None, save=save if save_path is not None else None
            )
        finally:
            trainer.executor.close()
        return [
            {
                "patients": n,
                "rows": data.n_rows(f"with_{n}", "train"),
                **result.clients[f"with_{n}"].scores["personal"],
            }
            for n in self.site.counts
        ]


def join(
    run: Run | str | Path,
    data: Any,
    model: str | None = None,
    *,
    out: str | Path,
    label: str | None = None,
    transfer: str | None = None,
    patients: Sequence[int] = PATIENTS,
    seeds: Iterable[int] = SEEDS,
    epochs: int = EPOCHS,
    overrides: Overrides = (),
    log: Callable[[str], None] = lambda _line: None,
    allow_code: bool | CodePermission = False,
) -> dict[str, Any]:
    """Train a client that joins a finished run, and compare it with training from scratch.

    With a backbone, the client starts from the mean of the backbones that clients with the same
    architecture shared. With a teacher, the client is first distilled from the consensus of all
    models, computed on the public rows of the run or, without public rows, on the client's own
    training rows. The client then trains on its labeled examples.

    The function writes `join.json`, `join.md` and `join.png`. For the first seed, the models that
    were trained with the most labels are saved in the folder `models`.

    Args:
        run: A finished run or its directory.
        data: Data of the client: a local file, the name of a data source, or examples of any type
            that `Client.data` accepts, such as a pair (x, y) of arrays. Without a test set, a fifth
            of the rows is used for testing.
        model: Name of a model in `model_zoo`. If None, the most frequent model of the run is used.
            The settings are those of the first client in the run with this model.
        out: The folder to write to.
        label: Label column of a table. If None, the label column of the run is used.
        transfer: "backbone", "teacher" or "both". If None, all that the run provides are compared.
        patients: Numbers of labeled patients to compare, or of labeled examples if the data has no
            patients. Numbers above the available number are skipped.
        seeds: Seeds. Training is repeated with each seed.
        epochs: Number of epochs of fine-tuning. Training takes at least 60 steps, and training from
            scratch takes four times as many steps as fine-tuning.
        overrides: Client settings, such as `optimizer.lr=0.0005`, or settings of the section
            `runtime`.
        log: Function that is called with each line of progress.
        allow_code: Whether code that the files of the run refer to may be executed.

    Returns:
        The content of `join.json`.

    Raises:
        UserError: If the data, the model or the settings do not fit the run, if the run does not
            provide the requested transfer, or if `out` already contains files.

    Example:
        >>> from tempfile import mkdtemp
        >>> import hetero_fl
        >>> config = {"data": {"name": "digits"}, "algorithm": {"name": "fedavg"}, "rounds": 1}
        >>> overrides = ["clients.count=2", "output.plots=false", "output.report=false"]
        >>> run = hetero_fl.run(config, out=mkdtemp(), overrides=overrides)
        >>> found = hetero_fl.join(
        ...     run, "digits", out=mkdtemp(), transfer="backbone", patients=[10], seeds=[0]
        ... )
        >>> [row["begins"] for row in found["rows"]]
        ['scratch', 'backbone']
    """
    source_run = TransferSource(Run.open(run, allow_code))
    out = Path(out)
    overrides = override_list(overrides)
    seeds = list(dict.fromkeys(seeds))
    if not seeds:
        raise ArgumentError("seeds: expected one or more integers, got none")
    is_named = isinstance(data, str | Path)
    CodePermission.from_argument(allow_code).check_caller_references(
        find_references(
            {"--data": str(data) if is_named else None, "--model": model, "overrides": overrides}
        )
    )
    # A folder with results is rejected, because joining cannot be resumed.
    check_vacant(out, alternatives="")
    models = source_run.run.load_models()
    for model_of_client in models.values():
        # The tensors of a file may not fit the model.
        model_of_client.module()
    dataset = (
        load_as(source_run.run, str(data), label, models)
        if is_named
        else from_objects(source_run.run, data, label, models)
    )
    site = _joining_site(dataset, source_run, patients)
    model_name = model or source_run.most_common_model
    joining = JoiningClients(
        source_run,
        site,
        name=dataset.name,
        model=model_name,
        epochs=epochs,
        overrides=overrides,
    )
    options = joining.transfer_options(transfer)
    for split, examples in (("training", site.train), ("test", site.test)):
        if note := source_run.overlap(examples.x, f"the joining client's {split} rows", "it"):
            source_run.notes.append(note)
    make_folder(out)
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for option, parts in options.items():
            save_path = None if seed != seeds[0] else out / "models" / f"{option}.safetensors"
            rows += [
                {"begins": option, "seed": seed, **scores}
                for scores in joining.run_transfer(seed, option, parts, save_path)
            ]
            log(f"seed {seed}, {option}: done")
    content = {
        "run": source_run.run.summary["name"],
        "algorithm": source_run.run.summary["algorithm"],
        "data": dataset.name,
        "model": model_name,
        "unit": site.unit,
        "patients": list(site.counts),
        "seeds": seeds,
        "epochs": epochs,
        "n_test": len(site.test),
        "teacher_on": joining.teacher_on or None,
        "consensus": joining.consensus_scores(),
        "notes": source_run.notes,
        "rows": rows,
    }
    # Imported here because loading matplotlib is slow.
    from hetero_fl.experiment.onboarding.report import write_join

    write_join(out, content, source_run.task)
    return content


def _joining_site(
    dataset: Dataset, source_run: TransferSource, patients: Sequence[int]
) -> JoiningSite:
    task = source_run.task
    dataset = with_test(dataset)
    assert dataset.test is not None
    parts = []
    for examples in (dataset.train, dataset.test):
        y = targets_of_models(source_run.run, examples.labels, dataset, task, dataset.name)
        parts.append(replace(examples, y=y, group=None, group_names=()))
    train, test = parts
    available = len(train) if train.patient is None else len(train.patient.unique())
    unit = "examples" if train.patient is None else "patients"
    requested = sorted(set(patients))
    if not requested or requested[0] < 2:
        raise ArgumentError(
            "patients: expected integers >= 2, such as 10,30,100, "
            f"got {', '.join(map(str, requested)) or 'none'}"
        )
    counts = tuple(n for n in requested if n <= available)
    if not counts:
        raise ArgumentError(
            f"patients: must be <= {available}, the number of labeled training {unit} in "
            f"{dataset.name}, got {requested[0]}"
        )
    if len(counts) < len(requested):
        source_run.notes.append(
            f"{dataset.name} has {available} labeled training {unit}; larger numbers are skipped"
        )
    model = next(iter(source_run.models.values()))
    layout = replace(dataset.layout, pixel_range=model.preprocess.get("pixel_range"))
    for part in parts:
        check_pixels(part.x, layout.pixel_range, f"data: {dataset.name}", complete=True)
    return JoiningSite(train, test, counts, unit, task, layout, dataset.vocabulary)
