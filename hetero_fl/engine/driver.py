"""Run plans in lockstep: collect the steps that they yield and send back the results."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any, Generic, Protocol, TypeVar

from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import PayloadError
from hetero_fl.core.plan import (
    ClassSums,
    Fit,
    FitReport,
    Plan,
    Predict,
    Step,
)
from hetero_fl.engine.templates import Templates
from hetero_fl.utils.errors import NoUploadError, RunFailedError, UserError, is_user_code
from hetero_fl.utils.version import describe_new_name

T = TypeVar("T")


def advance_plan(participant: Participant, plan: Plan[Any], answer: Any) -> Step | list[Step]:
    """Send a plan the last result (None at first) and return what it asks for next.

    A hook that computes nothing may be an ordinary function: what it returned is then the result.

    Args:
        participant: Whose plan it is.
        plan: What a hook returned.
        answer: The results of the steps that the plan asked for last.

    Raises:
        StopIteration: With what the plan returned.
        UserError: If the plan yielded something that is no step, or a step on a model that the
            participant does not have.
    """
    if not isinstance(plan, GeneratorType):
        raise StopIteration(plan)
    request: Step | list[Step] = plan.send(answer)
    for step in request if isinstance(request, list) else [request]:
        if not isinstance(step, Fit | Predict | ClassSums):
            raise UserError(f"{_describe_place(plan)}: yields {_describe_request(step)}")
        if missing := [slot for slot in model_slots(step) if slot not in participant.arch]:
            known = ", ".join(map(repr, participant.arch))
            raise UserError(
                f"{_describe_place(plan)}: {participant.participant_id} has no model {missing[0]!r}, "
                f"only {known}; return it from `models`"
            )
    return request


def model_slots(step: Step) -> tuple[str, ...]:
    """Return the slots of the participant's models that a step computes with."""
    if isinstance(step, Fit):
        return (*step.train, *step.frozen)
    is_sent = isinstance(step, Predict) and step.arch is not None
    return () if is_sent else (step.slot,)


def _describe_place(plan: Any) -> str:
    """Return where a plan stands, in the sub-plan that yielded: `Method.train (file, line n)`."""
    while isinstance(plan.gi_yieldfrom, GeneratorType):
        plan = plan.gi_yieldfrom
    return f"{plan.__qualname__} ({plan.gi_code.co_filename}, line {plan.gi_frame.f_lineno})"


def _describe_request(request: Any) -> str:
    if isinstance(request, GeneratorType):
        return f"the plan {request.__name__}(…); write `yield from`"
    return f"{type(request).__name__}, which is no step; yield a Fit, a Predict, a ClassSums, or a list of them"


# Plans are carried out here: many advance in lockstep, so that whoever computes may put their equal
# steps together.
Work = Sequence[tuple[Participant, Step]]
Listener = Callable[[str, str], None]  # (participant, label of what it begins)


class DivergedError(NoUploadError):
    """A fit's loss or tensors are no longer finite."""


class Backend(Protocol):
    """Whoever computes steps; it may change the participants' models."""

    @property
    def templates(self) -> Templates:
        """The live modules that it works with, on its device."""

    def run(self, work: Work) -> list[Any]:
        """The results in order; where a fit diverged, the `DivergedError` stands in place of its result."""


@dataclass
class PlanOutcome(Generic[T]):
    """What became of a plan: what it returned, or why it ended early; and the reports of its fits with their labels."""

    value: T | None = None
    failure: DivergedError | None = None
    reports: list[tuple[str, FitReport]] = field(default_factory=list)

    def result(self) -> T:
        """What the plan returned. Raises DivergedError if one of its fits did."""
        if self.failure is not None:
            raise self.failure
        return self.value  # type: ignore[return-value]


def run_plans(
    plans: Sequence[tuple[Participant, Plan[T]]], backend: Backend, watch: Listener | None = None
) -> list[PlanOutcome[T]]:
    """Run plans to their ends, in lockstep: each advances by one step (or list of steps) at a time. Outcomes in order.

    Raises UserError if a plan yields something that is no step.
    """
    outcomes: list[PlanOutcome[T]] = [PlanOutcome() for _ in plans]
    answers: dict[int, Any] = dict.fromkeys(range(len(plans)))
    while answers:
        asked: dict[int, Any] = {}
        for i, answer in answers.items():
            try:
                asked[i] = advance_plan(*plans[i], answer)
            except StopIteration as stop:
                outcomes[i].value = stop.value
        work = [
            (i, step)
            for i, steps in asked.items()
            for step in (steps if isinstance(steps, list) else [steps])
        ]
        if watch is not None:
            for i, step in work:
                if isinstance(step, Fit):
                    watch(plans[i][0].participant_id, step.label)
        results: dict[int, list[Any]] = {i: [] for i in asked}
        try:
            computed = backend.run([(plans[i][0], step) for i, step in work])
        except Exception as error:
            # Raised where the steps were yielded: the traceback shows which they were.
            with suppress(StopIteration):
                plans[work[0][0]][1].throw(error)
            raise
        for (i, step), result in zip(work, computed, strict=True):
            results[i].append(result)
            if isinstance(result, DivergedError):
                outcomes[i].failure = result
            elif isinstance(step, Fit):
                outcomes[i].reports.append((step.label, result))
        answers = {}
        for i, steps in asked.items():
            if outcomes[i].failure is None:
                answers[i] = results[i] if isinstance(steps, list) else results[i][0]
            else:
                plans[i][1].close()
    return outcomes


def run_plan(
    plan: Plan[T], participant: Participant, backend: Backend
) -> tuple[T, list[tuple[str, FitReport]]]:
    """Run one plan to its end. Returns what it returned, and the reports of its fits with their labels.

    Raises DivergedError if a fit does.
    """
    (outcome,) = run_plans([(participant, plan)], backend)
    return outcome.result(), outcome.reports


def reported_loss(reports: list[tuple[str, FitReport]]) -> float | None:
    """The loss that a client reports: of its last fit on its own rows."""
    losses = [report.loss for label, report in reports if label == "train"]
    return losses[-1] if losses else None


MAX_MESSAGE_LENGTH = 300  # characters of another library's message


@contextmanager
def translate_user_errors() -> Iterator[None]:
    """Raise RunFailedError for an exception that a user's method, objective or model raised.

    Its message is one line with the file and line; its cause is the exception. Other exceptions
    pass unchanged.
    """
    try:
        yield
    except (UserError, RunFailedError, DivergedError, PayloadError):
        raise
    except Exception as error:
        places = [f for f in traceback.extract_tb(error.__traceback__) if is_user_code(f.filename)]
        if not places:
            raise
        message = " ".join(str(error).split())[:MAX_MESSAGE_LENGTH] + describe_new_name(error)
        where = f"{places[-1].filename}:{places[-1].lineno}, in {places[-1].name}"
        raise RunFailedError(f"{where}: {type(error).__name__}: {message}") from error
