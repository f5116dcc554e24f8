"""Training of a federation in a Python loop, one round per iteration."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from typing_extensions import Unpack

from hetero_fl.config.load import Overrides
from hetero_fl.core.participant import Participant
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.experiment.federation import Federation, MethodLike, Sections, run_directory
from hetero_fl.experiment.runner import open_session
from hetero_fl.federation.round import Record
from hetero_fl.federation.trainer import EvaluationResult, add_evaluation
from hetero_fl.reporting.run import Run
from hetero_fl.utils.errors import UserError, suggest_or_list
from model_zoo.generators import own_generators


class Trainer:
    """Iterator that trains a federation round by round.

    Each iteration trains one round and returns the record of the round. Between rounds, the models
    can be evaluated and read. If a loop ends early, `resume=True` continues from the checkpoint in
    the run directory.

    Args:
        federation: The federation.
        method: The method, see `Federation.train`.
        rounds: Number of rounds, see `Federation.train`.
        out: The run directory, see `Federation.train`.
        resume: Whether to continue from the newest checkpoint in `out`.
        quiet: Whether to hide the progress display. If None, progress is shown in notebooks only.
        overrides: Changes to the configuration.
        **sections: Sections of the configuration, see `Federation.train`.

    Attributes:
        path: The run directory.

    Raises:
        UserError: If the federation, the method and the settings do not fit together, or if the
            run to resume has finished.

    Example:
        >>> import hetero_fl as hfl
        >>> federation = hfl.Federation.from_config(
        ...     {"data": {"name": "digits"}, "clients": {"count": 2}}
        ... )
        >>> with hfl.Trainer(federation, hfl.FedAvg(), rounds=5, out="runs/steps") as trainer:
        ...     for record in trainer:
        ...         if record["round"] == 2:
        ...             break
        >>> record["round"], trainer.completed
        (2, 2)
    """

    def __init__(
        self,
        federation: Federation,
        method: MethodLike = None,
        *,
        rounds: int | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        quiet: bool | None = None,
        overrides: Overrides = (),
        **sections: Unpack[Sections],
    ) -> None:
        self._prepared = federation.prepare(method, rounds=rounds, overrides=overrides, **sections)
        temporary, self.path = run_directory(federation, self._prepared, out, resume)
        self._kept = [federation, method, temporary, sections]
        with ExitStack() as stack:
            opened = open_session(self._prepared, self.path, resume=resume, quiet=quiet)
            session = stack.enter_context(opened)
            if session is None:
                raise UserError(f"{self.path}: this run has finished; open it with Run")
            session.start()
            # After an error above, the run directory is unlocked.
            self._stack = stack.pop_all()
        self._records = iter(session)
        self._trainer = session.trainer
        # Models saved by the last evaluation, keyed by client id, and the number of rounds that
        # were completed before that evaluation.
        self._models: dict[str, bytes] = {}
        self._evaluated = -1
        self._is_closed = False

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the training. If rounds remain, the run can be resumed."""
        self._records = iter(())
        self._is_closed = True
        self._stack.close()

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        try:
            with own_generators():
                return next(self._records)
        except StopIteration:
            self.close()
            raise

    @property
    def completed(self) -> int:
        """Number of completed rounds, including those before a resume."""
        return self._trainer.completed

    @property
    def server(self) -> Participant:
        """The server with its current models and state."""
        return self._trainer.server

    def evaluate(self) -> Record:
        """Evaluate the current models.

        Returns:
            A record with the scores, under the same keys as in the record of a round.

        Raises:
            UserError: If the training has ended.
        """
        if self._is_closed:
            raise UserError(f"{self.path}: the training has ended; read the scores from `run`")
        record: Record = {}
        add_evaluation(record, self._evaluate())
        return record

    def model(self, client: str) -> torch.nn.Module:
        """Return the current model of a client, in evaluation mode.

        The first call after a round evaluates all models. After the last round, the model is read
        from the run directory.

        Args:
            client: Client id, or `server`.

        Raises:
            UserError: If there is no such model, or the training was closed before the last round.
        """
        if self._is_closed:
            return self.run.model(client)
        if self._evaluated != self.completed:
            self._evaluate()
        if client not in self._models:
            raise UserError(f"no model of '{client}'{suggest_or_list(client, self._models)}")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{client}.safetensors"
            file.write_bytes(self._models[client])
            return SavedModel.load(file, allow_code=True).source_module()

    @property
    def run(self) -> Run:
        """The run in the run directory. Its summary exists once all rounds are completed."""
        run = Run(self.path, allow_code=True)
        run.keep(*self._kept)
        return run

    def _evaluate(self) -> EvaluationResult:
        # This evaluation is not part of the run.
        with own_generators():
            result = self._trainer.evaluate(
                details=True, save=self._models.__setitem__, counts_traffic=False
            )
        self._evaluated = self.completed
        return result
