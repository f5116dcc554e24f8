"""Execution of plans in lockstep: compute the steps that plans yield and send back the results.

Plans and steps are defined in `hetero_fl.core.plan`. A fit is a step of the type `Fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any, Generic, Protocol, TypeVar

from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import PayloadError
from hetero_fl.core.plan import (
    Fit,
    FitReport,
    Plan,
    Predict,
    Recalibrate,
    Step,
)
from hetero_fl.engine.templates import Templates
from hetero_fl.utils.errors import NoUploadError, RunFailedError, UserError, user_code_place
from model_zoo.module_state import advise_on_error

T = TypeVar("T")


def advance_plan(participant: Participant, plan: Plan[Any], answer: Any) -> Step | list[Step]:
    """Send the result of the last step to a plan and return the next step or list of steps.

    A hook that yields no steps may be an ordinary function. In this case, `plan` is the return
    value of the function.

    Args:
        participant: The participant to which the plan belongs.
        plan: Return value of a hook of the method, usually a generator.
        answer: Result of the last step, or a list of results. Must be None before the first step.

    Raises:
        StopIteration: If the plan is finished. The attribute `value` is the return value of the
            plan.
        UserError: If the plan yields an object that is not a step, or a step on a model that the
            participant does not have.
    """
    if not isinstance(plan, GeneratorType):
        raise StopIteration(plan)
    request: Step | list[Step] = plan.send(answer)
    for step in request if isinstance(request, list) else [request]:
        if not isinstance(step, Step):
            raise UserError(f"{_describe_place(plan)}: {_describe_request(step)}")
        if missing := [slot for slot in model_slots(step) if slot not in participant.arch]:
            known = ", ".join(map(repr, participant.arch))
            raise UserError(
                f"{_describe_place(plan)}: {participant.participant_id} has no model "
                f"{missing[0]!r}; choose from {known}, or return it from `models`"
            )
    return request


def model_slots(step: Step) -> tuple[str, ...]:
    """Return the slots of the participant's models that a step uses.

    The result is empty if the step contains a model that another participant sent.
    """
    if isinstance(step, Fit):
        return (*step.train, *step.frozen)
    is_sent = isinstance(step, Predict | Recalibrate) and step.arch is not None
    return () if is_sent else (step.slot,)


def _describe_place(plan: Any) -> str:
    """Return the place where a plan or its sub-plan yielded: `Method.train (file, line n)`."""
    while isinstance(plan.gi_yieldfrom, GeneratorType):
        plan = plan.gi_yieldfrom
    return f"{plan.__qualname__} ({plan.gi_code.co_filename}, line {plan.gi_frame.f_lineno})"


def _describe_request(request: Any) -> str:
    if isinstance(request, GeneratorType):
        return f"yields the plan {request.__name__}(…); write `yield from`"
    name = type(request).__name__
    return f"expected a step (Fit, Predict, ClassSums, Recalibrate) or a list of steps, got {name}"


Work = Sequence[tuple[Participant, Step]]
# Function that is called with a participant's id and the label of the fit that begins.
Listener = Callable[[str, str], None]


class DivergedError(NoUploadError):
    """Raised when the loss or a trained tensor is no longer finite."""


class Backend(Protocol):
    """Interface of backends, which compute the steps of plans.

    A backend updates the models and the state of a participant in place when it computes a fit.
    """

    @property
    def templates(self) -> Templates:
        """The modules of the backend, keyed by architecture and slot."""

    def run(self, work: Work) -> list[Any]:
        """Compute steps and return their results in order.

        Args:
            work: Pairs of participant and step.

        Returns:
            The result of each step. The result of a fit that diverges is a `DivergedError`.
        """


@dataclass(frozen=True)
class ReviewedBackend:
    """Backend that reviews each step before another backend computes the step.

    Args:
        backend: Backend that computes the steps.
        review: Function of a participant and a step, which may count the step. It raises an
            exception to refuse the step.
    """

    backend: Backend
    review: Callable[[Participant, Step], None]

    @property
    def templates(self) -> Templates:
        """Model templates of the wrapped backend."""
        return self.backend.templates

    def run(self, work: Work) -> list[Any]:
        """Review all steps, and return their results in the order of `work`."""
        for participant, step in work:
            self.review(participant, step)
        return self.backend.run(work)


@dataclass
class PlanOutcome(Generic[T]):
    """The outcome of a plan.

    Attributes:
        value: Return value of the plan, or None if the plan ended early.
        failure: Error of the fit that ended the plan early, or None if the plan returned.
        reports: Label and report of each fit.
    """

    value: T | None = None
    failure: DivergedError | None = None
    reports: list[tuple[str, FitReport]] = field(default_factory=list)

    def result(self) -> T:
        """Return the return value of the plan.

        Raises:
            DivergedError: If one of the plan's fits diverged.
        """
        if self.failure is not None:
            raise self.failure
        return self.value  # type: ignore[return-value]


def run_plans(
    plans: Sequence[tuple[Participant, Plan[T]]], backend: Backend, watch: Listener | None = None
) -> list[PlanOutcome[T]]:
    """Run plans to completion in lockstep.

    Each plan advances by one step or list of steps at a time, so that the backend can compute equal
    steps of several participants together.

    Args:
        plans: The participants and their plans.
        backend: Backend that computes the steps.
        watch: Function that is called when a fit begins, with the participant's id and the label of
            the fit.

    Returns:
        The outcomes in the order of `plans`.

    Raises:
        UserError: If a plan yields an object that is not a step, or a step on a model that the
            participant does not have.
    """
    outcomes: list[PlanOutcome[T]] = [PlanOutcome() for _ in plans]
    answers: dict[int, Any] = dict.fromkeys(range(len(plans)))
    while answers:
        requests = _advance_plans(plans, answers, outcomes)
        work = [
            (i, step)
            for i, steps in requests.items()
            for step in (steps if isinstance(steps, list) else [steps])
        ]
        if watch is not None:
            for i, step in work:
                if isinstance(step, Fit):
                    watch(plans[i][0].participant_id, step.label)
        with _raised_in_plans([plans[i][1] for i in requests]):
            computed = backend.run([(plans[i][0], step) for i, step in work])
        results: dict[int, list[Any]] = {i: [] for i in requests}
        for (i, step), result in zip(work, computed, strict=True):
            results[i].append(result)
            if isinstance(result, DivergedError):
                outcomes[i].failure = result
            elif isinstance(step, Fit):
                outcomes[i].reports.append((step.label, result))
        answers = {}
        for i, steps in requests.items():
            if outcomes[i].failure is None:
                answers[i] = results[i] if isinstance(steps, list) else results[i][0]
            else:
                plans[i][1].close()
    return outcomes


def _advance_plans(
    plans: Sequence[tuple[Participant, Plan[T]]],
    answers: dict[int, Any],
    outcomes: Sequence[PlanOutcome[T]],
) -> dict[int, Any]:
    """Return the next steps, keyed by plan index, and store the values of finished plans."""
    requests: dict[int, Any] = {}
    for i, answer in answers.items():
        try:
            requests[i] = advance_plan(*plans[i], answer)
        except StopIteration as stop:
            outcomes[i].value = stop.value
    return requests


@contextmanager
def _raised_in_plans(plans: Sequence[Plan[Any]]) -> Iterator[None]:
    """Raise errors where the first plan has yielded, so that the traceback shows the plan."""
    try:
        yield
    except Exception as error:
        with suppress(StopIteration):
            plans[0].throw(error)
        raise


def run_plan(
    participant: Participant, plan: Plan[T], backend: Backend
) -> tuple[T, list[tuple[str, FitReport]]]:
    """Run one plan to completion.

    Args:
        participant: The participant to which the plan belongs.
        plan: The plan.
        backend: Backend that computes the steps.

    Returns:
        The return value of the plan, and the label and report of each fit.

    Raises:
        DivergedError: If a fit diverges.
    """
    (outcome,) = run_plans([(participant, plan)], backend)
    return outcome.result(), outcome.reports


def reported_loss(reports: list[tuple[str, FitReport]]) -> float | None:
    """Return the loss of the last fit with the label "train", which a client reports.

    The result is None if there is no such fit.
    """
    losses = [report.loss for label, report in reports if label == "train"]
    return losses[-1] if losses else None


# Maximum length of a quoted error message in characters.
MAX_MESSAGE_LENGTH = 300


@contextmanager
def translate_user_errors() -> Iterator[None]:
    """Convert exceptions of user-defined methods, objectives and models to RunFailedError.

    The message is one line with the file and line number. The original exception is the cause.
    Exceptions that do not pass through user-defined code are raised unchanged.
    """
    try:
        yield
    except (UserError, RunFailedError, DivergedError, PayloadError):
        raise
    # A user's code may raise any exception, or call sys.exit.
    except (Exception, SystemExit) as error:
        place = user_code_place(error)
        if place is None:
            raise
        message = " ".join(str(error).split())[:MAX_MESSAGE_LENGTH]
        message += advise_on_error(error)
        raise RunFailedError(f"{place}: {type(error).__name__}: {message}") from error
