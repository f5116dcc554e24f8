"""Clients that join a finished run, in comparison with training from scratch.

A finished run provides a backbone, which is the mean of the uploaded backbones; the consensus,
which is the mean prediction of all models; and its public rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.distillation import TEACHER
from hetero_fl.algorithms.hybrid import BACKBONE, BOTH, SCRATCH, JoiningClient
from hetero_fl.algorithms.round_parts import (
    common_part,
    shareable_tensors,
    shared_part,
    shared_parts,
)
from hetero_fl.config import Config, expand_population
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.load import Overrides, override_list, override_values
from hetero_fl.config.population import Population
from hetero_fl.core.images import check_pixels
from hetero_fl.core.metrics import score
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset, FederatedData, Preprocess, row_strata, with_test
from hetero_fl.data.client_rows import ClientRows
from hetero_fl.data.dataset import Examples
from hetero_fl.data.inference import logits_of_rows
from hetero_fl.data.partition.units import most_common_stratum
from hetero_fl.data.preprocessing import check_missing_values, usable_rows
from hetero_fl.data.splits import RowSelection
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.evaluation import check_fits, load_for_models, targets_of_models
from hetero_fl.experiment.preparation import (
    PreparedRun,
    StartingTensors,
    make_algorithm,
    note_on_training_rows,
    prepare_again,
)
from hetero_fl.federation.federation import FederationSpec, protect
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import check_vacant
from hetero_fl.utils.code_permission import AllowCode, check_code, code_of_caller, find_references
from hetero_fl.utils.errors import ArgumentError, UserError
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
BODY = ("backbone.",)
PATIENTS = (10, 30, 100, 300)
SEEDS = (0, 1, 2, 3, 4)
EPOCHS = 10

TransferredParts = dict[str, Tensors | Tensor]
"""Backbone tensors, teacher predictions, or both, that a joining client receives."""


@dataclass
class TransferSource:
    """A finished run that provides initial tensors and predictions to a joining client.

    Only information that clients shared is used, which is the uploaded parts of models and the
    predictions of models.

    Args:
        run: The finished run.
        notes: Notes for the report of the results. Methods append notes to this list.
    """

    run: Run
    notes: list[str] = field(default_factory=list)

    @cached_property
    def config(self) -> Config:
        """Resolved configuration of the run."""
        return load_config(self.run.config(), allow_code=self.run.permission)

    @cached_property
    def clients(self) -> Population:
        """Clients of the run."""
        return expand_population(self.config.clients)

    @cached_property
    def method(self) -> Algorithm:
        """The algorithm of the run, with its settings."""
        return make_algorithm(self.config)

    @cached_property
    def models(self) -> dict[str, SavedModel]:
        """Final models of the clients, keyed by client id."""
        return {
            client_id: model
            for client_id, model in self.run.models.items()
            if client_id in self.clients
        }

    @property
    def task(self) -> Task:
        """Task of the run."""
        return next(iter(self.models.values())).task

    @property
    def most_common_model(self) -> str:
        """Name of the most frequent model, or of the first such model in a tie."""
        names = Counter(self.clients[client_id].model[0].name for client_id in self.models)
        return names.most_common(1)[0][0]

    def settings_for(self, name: str) -> tuple[ClientSettings, bool]:
        """Return client settings for a model, and whether a client of the run has this model.

        The settings are those of the first client with the model. If there is no such client, the
        default settings of the run are returned.
        """
        for client_id in self.models:
            if self.clients[client_id].model[0].name == name:
                return self.clients[client_id], True
        return self.config.clients.defaults, False

    def backbone(self, arch: ModelSpec) -> Tensors | None:
        """Return the mean of the backbone tensors that clients with an architecture shared.

        All clients have the same weight. Tensors that no client shared are omitted.

        Args:
            arch: The architecture.

        Returns:
            The mean tensors, keyed by name, or None if no backbone tensor was shared.
        """
        if "model" not in shared_parts(self.method):
            return None
        # Saved models do not contain the privacy settings of the run.
        protected = protect(arch, self.config.privacy)
        sent = []
        for client_id, model in self.models.items():
            part = common_part(shared_part(self.method, self.clients[client_id]), BODY)
            if model.arch == arch and part != ():
                sent.append(shareable_tensors(self.method, protected, model.tensors, part))
        names = dict.fromkeys(n for tensors in sent for n in tensors)
        means = {n: torch.stack([t[n] for t in sent if n in t]).mean(0) for n in names}
        return means or None

    def consensus(self, x: Tensor) -> Tensor:
        """Combine the predictions of all clients' models on raw rows.

        Each model uses the preprocessing of its client. If a row lacks values that a model needs,
        the model is skipped for this row.

        Args:
            x: Raw rows, `[N, ...]`.

        Returns:
            Logits of the mean probabilities, or the mean predictions for regression,
            `[N, outputs]`. Rows that no model can use contain NaN.
        """
        models = self.models.values()
        usable = torch.stack([usable_rows(x, Preprocess.of_model(model)) for model in models])
        usable = usable[..., None]
        logits = torch.stack([logits_of_rows(model, x) for model in models])
        count = usable.sum(0)
        if self.task.kind == "regression":
            return logits.masked_fill(~usable, 0.0).sum(0) / count
        if self.task.kind == "multilabel":
            return (logits.sigmoid().masked_fill(~usable, 0.0).sum(0) / count).logit(eps=1e-7)
        return logits.log_softmax(-1).masked_fill(~usable, -torch.inf).logsumexp(0) - count.log()

    @cached_property
    def prepared(self) -> PreparedRun | None:
        """The run, prepared again with its data.

        If the data is not available or has changed, the value is None and a note is added to
        `notes`.
        """
        try:
            return prepare_again(self.run)
        except UserError as error:
            self.notes.append(f"the run's public and training rows are not available ({error})")
            return None

    def public_rows(self, preprocess: Preprocess, shape: tuple[int, ...]) -> Tensor | None:
        """Return the raw public rows of the run that a joining client can use.

        If there are public rows but none is usable, a note is added to `notes`.

        Args:
            preprocess: Preprocessing of the joining client.
            shape: Shape of a raw example of the joining client.

        Returns:
            The rows, or None if no row is usable or the data of the run is not available.
        """
        if self.prepared is None or not self.prepared.data.n_proxy:
            return None
        public = self.prepared.data.raw_examples("proxy")
        if preprocess.shape(tuple(public.shape[1:])) != preprocess.shape(shape):
            problem = "have another shape than the joining client's rows"
        elif not bool(usable_rows(public, preprocess).any()):
            problem = "have no values that the joining client uses"
        else:
            return public
        self.notes.append(f"the run's public rows {problem}")
        return None


def labeled_rows(train: Examples, task: Task, count: int, seed: int) -> Tensor:
    """Return the indices of the training rows of `count` randomly sampled patients.

    Sampling is stratified by label, so that the label distribution is similar for all counts. For a
    given seed, a larger sample includes all patients of a smaller sample.

    Args:
        train: Training rows.
        task: Task of the labels.
        count: Number of patients, or number of examples if the data has no patients.
        seed: Seed of the sample.

    Returns:
        Indices of training rows, int64 `[N]`.
    """
    unit = torch.arange(len(train)) if train.patient is None else train.patient
    unit = unit.unique(return_inverse=True)[1]
    label = most_common_stratum(row_strata(train.labels, task), unit)
    generator = keyed_generator("join", seed, "labelled")
    draws = torch.rand(len(label), generator=generator, dtype=torch.float64)
    place = torch.empty_like(draws)
    for value in label.unique():
        members = torch.nonzero(label == value).squeeze(1)
        ranks = torch.arange(len(members), dtype=torch.float64)
        place[members[draws[members].argsort()]] = (ranks + 0.5) / len(members)
    # Random draws break ties between labels.
    chosen = (place + 1e-4 * draws / len(label)).argsort()[:count]
    return torch.nonzero(torch.isin(unit, chosen)).squeeze(1)


@dataclass
class JoiningClients:
    """Variants of a joining client with different numbers of labels, which train independently.

    Args:
        source_run: The finished run.
        dataset: Training and test rows of the joining client, with the targets of the run.
        counts: Numbers of labeled patients or examples to compare, in increasing order.
        model: Name of the model.
        epochs: Number of epochs of fine-tuning.
        overrides: Client settings, or settings of the section `runtime`, as `key=value`.
        public: Raw rows for which the teacher computes predictions, or None without a teacher.
    """

    source_run: TransferSource
    dataset: Dataset
    counts: tuple[int, ...]
    model: str
    epochs: int
    overrides: Sequence[str] = ()
    public: Tensor | None = None

    def config(self, seed: int, times: int = 1) -> Config:
        """Return the configuration of a run with one client for each number of labels.

        Args:
            seed: Seed of the run.
            times: Factor by which the number of training steps is multiplied.
        """
        settings, fits = self.source_run.settings_for(self.model)
        adopted = settings.model_dump(mode="json", exclude_unset=True)
        defaults = {key: value for key, value in adopted.items() if key not in NOT_ADOPTED_SETTINGS}
        if not fits:
            defaults["model"] = self.model
        batch = int(defaults.get("batch_size", ClientSettings().batch_size))
        groups = [
            {"name": f"with_{n}", "steps": times * max(MIN_STEPS, self.epochs * -(-n // batch))}
            for n in self.counts
        ]
        source = {
            "name": "join",
            "seed": seed,
            "rounds": 1,
            "clients": {"defaults": defaults, "groups": groups},
            "runtime": {"executor": "serial", "device": self.source_run.config.runtime.device},
        }
        overrides = [
            o if o.startswith("runtime.") else f"clients.defaults.{o}" for o in self.overrides
        ]
        return load_config(source, overrides)

    def federation(self, config: Config) -> tuple[FederatedData, FederationSpec]:
        """Create the data and the federation for a configuration from `config`."""
        clients = expand_population(config.clients)
        train = self.dataset.train
        test = self.dataset.splits()["test"]
        none = torch.zeros(0, dtype=torch.int64)
        private = {
            f"with_{n}": {
                "train": RowSelection(
                    train, labeled_rows(train, self.source_run.task, n, config.seed)
                ),
                "validation": RowSelection(train, none),
                "test": RowSelection.all_rows(test),
            }
            for n in self.counts
        }
        # Only local test rows are evaluated.
        public = {name: RowSelection(test, none) for name in ("common_test", "common_validation")}
        if self.public is not None:
            public["proxy"] = RowSelection.all_rows(Examples(self.public))
        model = next(iter(self.source_run.models.values()))
        layout = replace(self.dataset.layout, pixel_range=model.preprocess.get("pixel_range"))
        data = FederatedData(
            self.source_run.task,
            self.dataset.name,
            clients,
            ClientRows(private),
            public,
            seed=config.seed,
            layout=layout,
            vocabulary=self.dataset.vocabulary,
        )
        check_missing_values(clients.profiles, clients, data.client_rows, public, layout=layout)
        return data, FederationSpec.from_config(
            config.model_copy(update={"privacy": None}), data, clients, student=False
        )

    def transfer_options(self, requested: str | None) -> tuple[dict[str, TransferredParts], str]:
        """Return the tensors that the joining clients receive for each starting point.

        With a teacher, `public` is set.

        Args:
            requested: "backbone", "teacher" or "both". If None, all starting points that the run
                provides are included.

        Returns:
            The tensors, keyed by starting point, and a description of the rows in `public`. The
            starting point "scratch" has no tensors and is always included.

        Raises:
            UserError: If the run does not provide the requested starting point.
        """
        if requested not in (None, BACKBONE, TEACHER, BOTH):
            raise ArgumentError(
                f"transfer: unknown choice '{requested}'; choose from {BACKBONE}, {TEACHER}, {BOTH}"
            )
        source_run = self.source_run
        _, federation = self.federation(self.config(0))
        client_info = next(iter(federation.client_infos.values()))
        parts: TransferredParts = {}
        problems = {}
        teacher_on = ""
        if requested != TEACHER:
            backbone = source_run.backbone(client_info.arch)
            if backbone is not None:
                parts[BACKBONE] = backbone
            else:
                problems[BACKBONE] = (
                    f"no client in {source_run.run.path} shared the backbone of a "
                    f"{client_info.arch.spec_id}; choose teacher, or the model "
                    f"{source_run.most_common_model}"
                )
        if requested != BACKBONE:
            x = self.dataset.train.x
            rows = source_run.public_rows(client_info.preprocess, tuple(x.shape[1:]))
            teacher_on = f"the joining client's {len(x):,} training rows, without labels"
            if rows is not None:
                teacher_on = f"the run's {len(rows):,} public rows"
            rows = x if rows is None else rows
            teacher = source_run.consensus(rows)
            usable = usable_rows(rows, client_info.preprocess) & ~teacher.isnan().any(1)
            if bool(usable.any()):
                self.public = rows[usable]
                parts[TEACHER] = teacher[usable]
            else:
                problems[TEACHER] = (
                    f"{teacher_on}: no row is usable for both the joining client and a model of "
                    "the run; choose backbone"
                )
                teacher_on = ""
        if requested is not None and problems:
            raise ArgumentError(f"transfer: {next(iter(problems.values()))}")
        source_run.notes.extend(problems.values())
        options: dict[str, TransferredParts] = {SCRATCH: {}}
        if requested != BOTH:
            options |= {name: {name: part} for name, part in parts.items()}
        if len(parts) == 2:
            options[BOTH] = parts
        return options, teacher_on

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

        def save(client_id: str, encoded: bytes) -> None:
            if save_path is not None and client_id == f"with_{self.counts[-1]}":
                write_atomically(save_path, encoded)

        try:
            trainer.server.state.update(parts)
            trainer.run_round()
            result = trainer.evaluate(details=True, save=save)
        finally:
            trainer.executor.close()
        return [
            {
                "begins": option,
                "seed": seed,
                "patients": n,
                "rows": data.n_rows(f"with_{n}", "train"),
                **result.clients[f"with_{n}"].scores["personal"],
            }
            for n in self.counts
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
    allow_code: AllowCode = False,
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
    if epochs < 1:
        raise ArgumentError(f"epochs: must be >= 1, got {epochs}")
    names = {"--model": model, "overrides": [override_values(each) for each in overrides]}
    check_code(find_references(names), "", code_of_caller(allow_code))
    # A folder with results is rejected, because joining cannot be resumed.
    check_vacant(out, alternatives="")
    models = source_run.run.load_models()
    for model_of_client in models.values():
        # The tensors of a file may not fit the model.
        model_of_client.module()
    dataset = load_for_models(source_run.run, data, label, models, allow_code)
    dataset = _labeled_as_in_run(dataset, source_run)
    test = dataset.splits()["test"]
    joining = JoiningClients(
        source_run,
        dataset,
        _counts(dataset, patients, source_run.notes),
        model or source_run.most_common_model,
        epochs,
        overrides,
    )
    options, teacher_on = joining.transfer_options(transfer)
    for split, examples in (("training", dataset.train), ("test", test)):
        if source_run.prepared is not None:
            rows_of_split = f"the joining client's {split} rows"
            source_run.notes += note_on_training_rows(
                source_run.prepared, examples.x, rows_of_split, "it"
            )
    make_folder(out)
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for option, parts in options.items():
            save_path = None if seed != seeds[0] else out / "models" / f"{option}.safetensors"
            rows += joining.run_transfer(seed, option, parts, save_path)
            log(f"seed {seed}, {option}: done")
    # Rows that no model can use are not scored.
    consensus = source_run.consensus(test.x)
    usable = ~consensus.isnan().any(1)
    known = test.select_rows(usable.nonzero().squeeze(1))
    content = {
        "run": source_run.run.summary["name"],
        "algorithm": source_run.run.summary["algorithm"],
        "data": dataset.name,
        "model": joining.model,
        "unit": _unit(dataset),
        "patients": list(joining.counts),
        "seeds": seeds,
        "epochs": epochs,
        "n_test": len(test),
        "teacher_on": teacher_on or None,
        "consensus": score(
            source_run.task, consensus[usable], known.labels, known.unit, excluded=known.excluded
        ),
        "notes": source_run.notes,
        "rows": rows,
    }
    # Imported here because loading matplotlib is slow.
    from hetero_fl.experiment.joining.report import write_join

    write_join(out, content, source_run.task)
    return content


def _labeled_as_in_run(dataset: Dataset, source_run: TransferSource) -> Dataset:
    """Return a data set with a test set, the targets of the run and no groups."""
    dataset = with_test(dataset)
    pixel_range = next(iter(source_run.models.values())).preprocess.get("pixel_range")
    parts: dict[str, Any] = {}
    for split, examples in dataset.splits().items():
        y = targets_of_models(
            source_run.run, examples.labels, dataset, source_run.task, dataset.name
        )
        parts[split] = replace(examples, y=y, group=None, group_names=())
        check_pixels(examples.x, pixel_range, f"data: {dataset.name}", complete=True)
    for name, model in source_run.models.items():
        check_fits(name, model, dataset, dataset.name)
    return replace(dataset, **parts)


def _unit(dataset: Dataset) -> str:
    return "examples" if dataset.train.patient is None else "patients"


def _counts(dataset: Dataset, patients: Sequence[int], notes: list[str]) -> tuple[int, ...]:
    """Return the numbers of labels to compare, and note those that are not available."""
    patient = dataset.train.patient
    available = len(dataset.train) if patient is None else len(patient.unique())
    rows = f"labeled training {_unit(dataset)}"
    requested = sorted(set(patients))
    if not requested or requested[0] < 2:
        raise ArgumentError(
            "patients: expected integers >= 2, such as 10,30,100, "
            f"got {', '.join(map(str, requested)) or 'none'}"
        )
    if requested[0] > available:
        raise ArgumentError(
            f"patients: must be <= {available}, the number of {rows} in {dataset.name}, "
            f"got {requested[0]}"
        )
    if requested[-1] > available:
        notes.append(f"{dataset.name} has {available} {rows}; larger numbers are skipped")
    return tuple(n for n in requested if n <= available)
