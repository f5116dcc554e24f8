"""Training of a run round by round, and the files that are written to the run directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from hetero_fl.config import Config
from hetero_fl.experiment.preparation import ExecutorFactory, PreparedRun
from hetero_fl.federation.executors.choose import ExecutorChoice
from hetero_fl.federation.round import Record
from hetero_fl.federation.store import Checkpoints, StateStore
from hetero_fl.federation.trainer import EvaluationResult, FederatedTrainer, add_evaluation
from hetero_fl.reporting.integrity import check_resumable, identity
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.run_directory import BEST_MODELS, RunDirectory
from hetero_fl.reporting.run_loggers import RunLoggers, make_loggers
from hetero_fl.reporting.summary import BestRounds, Patience, collect_details, summarize
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import CodecError, refuse_malformed, write_atomically
from hetero_fl.utils.text import pluralize


class RunSession:
    """Iterable that trains a run, one round per iteration.

    Each iteration yields the record of a round after the round has been committed to disk. The
    models, the summary and the report are written after the last round. The caller must call
    `close` at the end.

    Args:
        prepared: The run.
        directory: The run directory.
        choice: Executor, device and threads to use.
        progress: Progress display, which also writes the log.
        executor_factory: Function that creates the executor for clients on other machines. If None,
            the clients train on this machine.

    Attributes:
        trainer: The trainer.
    """

    def __init__(
        self,
        prepared: PreparedRun,
        directory: RunDirectory,
        choice: ExecutorChoice,
        progress: Progress,
        executor_factory: ExecutorFactory | None = None,
    ) -> None:
        self._prepared = prepared
        self._directory = directory
        self._choice = choice
        self._progress = progress
        self._started = time.perf_counter()
        memory = prepared.config.runtime.store_memory << 20
        store = StateStore(directory.path / "checkpoint", memory)
        self.trainer = prepared.make_trainer(choice, store, progress.log, executor_factory)
        self._checkpoints = Checkpoints(store, progress.log)
        self._saves_best = prepared.config.output.best_models
        # Nodes keep the private states of their clients, which cannot be reset to an earlier round.
        self._can_go_back = executor_factory is None
        # Metadata to save in checkpoints, which is empty until the run is started.
        self._metadata: dict[str, Any] = {}
        config = prepared.config
        self._loggers = RunLoggers(make_loggers(config), directory, config.name, progress.log)
        if progress.is_terminal:
            self.trainer.executor.set_listener(progress.show_task)

    def close(self) -> None:
        """Close the loggers and the executor. An unfinished run can be resumed later."""
        self._loggers.close()
        self.trainer.executor.close()

    def start(self) -> None:
        """Restore the newest checkpoint, or save the starting weights if there is none.

        Raises:
            UserError: If the run directory does not match the run.
        """
        prepared = self._prepared
        directory = self._directory
        inputs = prepared.inputs()
        self._metadata = {"data": inputs["data"], "choice": self._choice.record()}
        saved = self._checkpoints.load_newest()
        extended: list[str] = []
        try:
            with refuse_malformed():
                check_resumable(directory, saved, inputs)
                if saved is not None:
                    saved = self._restore(saved)
                    extended = self._extend(saved)
        except CodecError as error:
            raise UserError(f"{directory.path / 'checkpoint'}: damaged ({error})") from error
        if saved is not None:
            threads = pluralize(self._choice.threads, "thread")
            workers = pluralize(self._choice.workers, "worker")
            self._progress.log(
                f"resumed after round {self.trainer.completed}; "
                f"{self._choice.executor} executor, {threads}, {workers}"
            )
        directory.rewind_metrics(self.trainer.completed)
        _record_changes(directory, prepared.config)
        prepared.notes += extended
        self._metadata["directory"] = {
            **identity(directory),
            "rounds": prepared.config.rounds,
            "extended": extended,
        }
        if saved is None:
            prepared.start.load_into(self.trainer)
            self._save_checkpoint()
            for message in prepared.deprecations:
                # The warning itself has been printed.
                self._progress.write(f"warning: {message}")
            for note in [prepared.headline, *prepared.notes, *self._choice.reasons]:
                self._progress.log(note)

    def _save_checkpoint(self, kept_rounds: Collection[int] = ()) -> None:
        self._metadata["directory"]["metrics"] = self._directory.metrics_checksum()
        state = {"run": self.trainer.state_dict(), **self._metadata}
        self._checkpoints.save(self.trainer.completed, state, kept_rounds)
        self.trainer.executor.on_checkpoint()

    def _num_planned(self) -> int:
        """Return the number of rounds to train, which a privacy budget may limit."""
        budget = self._prepared.budget
        return self._prepared.config.rounds if budget is None else budget.affordable_rounds()

    def _restore(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Restore the trainer's state and return the checkpoint that was used.

        Args:
            saved: The newest checkpoint.
        """
        if saved["run"]["completed"] < self._num_planned():
            saved = self._reopen_directory(saved)
        self.trainer.load_state_dict(saved["run"])
        self.trainer.executor.on_checkpoint()
        return saved

    def _reopen_directory(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Prepare the directory for additional rounds and return the checkpoint to continue from.

        The last round of the shorter run was evaluated regardless of `evaluation.every`. If the
        schedule of the longer run does not evaluate this round, the round is repeated from the
        previous checkpoint.
        """
        self._directory.reopen()
        completed = saved["run"]["completed"]
        is_scheduled = completed % self._prepared.config.evaluation.every == 0
        if is_scheduled or "validation" not in self._directory.metrics()[completed - 1]:
            return saved
        earlier = self._checkpoints.load_before(completed)
        return earlier or self._checkpoints.load_newest() or saved

    def _extend(self, saved: Mapping[str, Any]) -> list[str]:
        """Log if the run is extended, and return notes on all extensions of the run so far."""
        rounds = self._prepared.config.rounds
        extended = list(saved["directory"]["extended"])
        planned = saved["directory"]["rounds"]
        if planned < rounds:
            line = (
                f"extended from {planned} to {pluralize(rounds, 'round')} after round "
                f"{saved['run']['completed']}; schedules use the new total"
            )
            self._progress.log(line)
            extended.append(line)
        return extended

    def __iter__(self) -> Iterator[Record]:
        """Train the remaining rounds and yield the record of each round.

        Raises:
            UserError: If the run directory does not match the run.
        """
        if not self._metadata:
            self.start()
        prepared = self._prepared
        directory = self._directory
        trainer = self.trainer
        progress = self._progress
        config = prepared.config
        budget = prepared.budget
        planned = self._num_planned()
        history = directory.metrics()
        best = BestRounds(prepared.federation.task, history)
        patience = Patience(prepared.federation.task, config.evaluation.patience, history)
        setup_seconds = time.perf_counter() - self._started
        self._loggers.start(history)
        progress.unit = prepared.federation.task.unit
        progress.start(config.rounds, len(prepared.federation.client_infos), trainer.completed)
        evaluation: EvaluationResult | None = None
        stops_early = patience.exhausted
        while trainer.completed < planned and not stops_early:
            record = trainer.run_round()
            # An extended run may repeat a round, or a resumed one fall back to the previous round.
            kept_rounds = {*best.rounds.values()}
            is_last = trainer.completed == planned
            if budget is not None:
                record["privacy"] = budget.spent(trainer.completed)
            if trainer.completed % config.evaluation.every == 0 or is_last:
                result = _evaluate(trainer, record, directory if is_last else None)
                patience.update(record)
                stops_early = patience.exhausted
                best.update(record)
                evaluation = result if is_last else None
                if self._saves_best and not self._can_go_back:
                    self._save_best(best.rounds, is_last)
            directory.append_metrics(record)
            kept_rounds |= {*best.rounds.values()}
            goes_back = self._saves_best and self._can_go_back
            self._save_checkpoint(kept_rounds if goes_back else ())
            if config.output.loggers:
                self._loggers.log(record)
            yield record
            progress.finish_round(record)
        if stops_early:
            progress.log(
                f"stopped after round {trainer.completed}: validation has not improved for "
                f"{config.evaluation.patience} evaluations (evaluation.patience)"
            )
        if budget is not None and trainer.completed == planned < config.rounds:
            next_epsilon = budget.epsilon(planned + 1)
            progress.log(
                f"stopped after round {planned}: another round would raise ε to {next_epsilon:.3g},"
                f" above privacy.target_epsilon={budget.privacy.target_epsilon:g}"
            )
        self._finish(evaluation, setup_seconds, best.rounds)

    def _finish(
        self,
        evaluation: EvaluationResult | None,
        setup_seconds: float,
        best_rounds: Mapping[str, int],
    ) -> None:
        """Write the models, summary, plots and report of the run.

        Args:
            evaluation: The evaluation of the last round. If None, the models are evaluated again.
            setup_seconds: Seconds before the first round.
            best_rounds: Rounds with the best validation scores, see `BestRounds`.
        """
        prepared = self._prepared
        directory = self._directory
        trainer = self.trainer
        if evaluation is None:
            # The run stopped early, or the process was killed after the last round. The traffic of
            # the evaluation has already been counted.
            evaluation = _evaluate_fully(trainer, directory, counts_traffic=False)
        directory.write_json(
            "details.json",
            collect_details(prepared.federation, evaluation, prepared.notes, prepared.method),
        )
        summary = summarize(
            prepared.config,
            prepared.federation,
            history=directory.metrics(),
            traffic=trainer.traffic,
            setup_seconds=setup_seconds,
            evaluation=evaluation,
        )
        if self._saves_best and self._can_go_back:
            self._save_best(best_rounds, True)
        directory.finish(summary)
        write_presentation(prepared.config, directory, self._progress.log)
        self._progress.finish(summary)
        self._loggers.finish(summary)

    def _save_best(self, best_rounds: Mapping[str, int], is_last: bool) -> None:
        """Save the models of the best rounds, as in the evaluations of these rounds.

        Args:
            best_rounds: Rounds with the best validation scores, see `BestRounds`.
            is_last: Whether the current models were saved as the last ones.
        """
        directory = self._directory
        trainer = self.trainer
        last = trainer.completed
        for round_idx in sorted(set(best_rounds.values())):
            if round_idx != last and not self._can_go_back:
                # The models were saved after that round.
                continue
            save = _BestModels(directory, best_rounds, round_idx)
            if round_idx == last and is_last:
                for path in directory.model_files():
                    save(path.stem, path.read_bytes())
            elif round_idx == last:
                trainer.evaluate(details=True, save=save, counts_traffic=False)
            elif (saved := self._checkpoints.load(round_idx)) is None:
                self._progress.log(
                    f"the best models of round {round_idx} are not saved, because its checkpoint "
                    "is missing or damaged"
                )
            else:
                trainer.load_state_dict(saved["run"])
                trainer.evaluate(details=True, save=save, counts_traffic=False)
        if trainer.completed != last and (newest := self._checkpoints.load(last)) is not None:
            trainer.load_state_dict(newest["run"])


class _BestModels:
    """Function that writes models of a round to the folders for which the round is the best.

    The server's model is selected by its own global validation score.

    Args:
        directory: The run directory.
        best_rounds: Rounds with the best validation scores, see `BestRounds`.
        round_idx: The round of the models.
    """

    def __init__(
        self, directory: RunDirectory, best_rounds: Mapping[str, int], round_idx: int
    ) -> None:
        self._directory = directory
        server = {**best_rounds, "global": best_rounds.get("server")}
        self._folders = {
            is_server: [which for which in BEST_MODELS if rounds.get(which) == round_idx]
            for is_server, rounds in ((False, best_rounds), (True, server))
        }
        # A client may be absent from this round, whose models are complete without it.
        for is_server, folders in self._folders.items():
            for path in (path for which in folders for path in directory.model_files(which)):
                if (path.stem == "server") == is_server:
                    path.unlink()

    def __call__(self, name: str, model: bytes) -> None:
        for which in self._folders[name == "server"]:
            folder = self._directory.models_folder(which)
            write_atomically(folder / f"{name}.safetensors", model)


def _record_changes(directory: RunDirectory, config: Config) -> None:
    """Record in `config.yaml` what may change in a resumed run: the rounds and the output."""
    recorded = directory.config()
    current = {"rounds": config.rounds, "output": config.output.model_dump(mode="json")}
    if recorded != {**recorded, **current}:
        directory.write_config({**recorded, **current})


def _evaluate(
    trainer: FederatedTrainer, record: Record, directory: RunDirectory | None
) -> EvaluationResult:
    """Evaluate the current models and add the result to the record of the round.

    Args:
        trainer: The trainer.
        record: Record of the round, which is modified in place.
        directory: Directory where the models are saved. If None, the models are not saved.
    """
    started = time.perf_counter()
    down_bytes = trainer.traffic.down
    result = trainer.evaluate() if directory is None else _evaluate_fully(trainer, directory)
    add_evaluation(record, result)
    record["down_bytes"] += trainer.traffic.down - down_bytes
    record["seconds"]["evaluation"] = time.perf_counter() - started
    return result


def write_presentation(config: Config, directory: RunDirectory, log: Callable[[str], None]) -> None:
    """Write the plots and the report that are enabled, unless `report.html` exists.

    Drawing errors are logged and do not stop the run.

    Args:
        config: The configuration of the run.
        directory: The run directory.
        log: Function that is called with each log line.
    """
    if (directory.path / "report.html").exists():
        return
    # Imported here because loading matplotlib is slow.
    from hetero_fl.reporting.plots import write_plots
    from hetero_fl.reporting.report import write_report

    if config.output.plots:
        write_plots(directory.path, log)
    if config.output.report:
        write_report(directory.path, log)


def _evaluate_fully(
    trainer: FederatedTrainer, directory: RunDirectory, counts_traffic: bool = True
) -> EvaluationResult:
    """Evaluate the models with all details for the report, and write each evaluated model."""

    def save(name: str, model: bytes) -> None:
        # The model is empty if a remote client does not upload it.
        if model:
            write_atomically(directory.path / "models" / f"{name}.safetensors", model)

    return trainer.evaluate(details=True, save=save, counts_traffic=counts_traffic)
