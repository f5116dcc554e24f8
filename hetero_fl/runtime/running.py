"""A plan on its way. Whatever executor carries it out advances it through here, where an author's slips are noticed."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType, GeneratorType
from typing import Any, Generic, TypeVar

from hetero_fl.errors import UserError
from hetero_fl.made import NOTING, Made, place
from hetero_fl.plan import ClassSums, Fit, Plan, Predict, Step

T = TypeVar("T")


class Running(Generic[T]):
    """A plan that is advanced from request to request. Raises UserError at once if it is no plan."""

    def __init__(self, plan: Plan[T]) -> None:
        if not isinstance(plan, GeneratorType):
            raise UserError(
                f"expected a plan, got {type(plan).__name__}; a plan is what a function with `yield` returns"
            )
        self.plan, self.made = plan, list[Made]()

    def send(self, answer: Any) -> Step | list[Step]:
        """Hand in the last result (None at first); what the plan asks for next.

        Raises StopIteration with what the plan returned, and UserError if it yielded something that is no step or ended
        with a step or sub-plan that it made and never yielded.
        """
        return self._go_on(self.plan.send, answer)

    def throw(self, error: BaseException) -> Step | list[Step]:
        """The same where the last step failed: the plan sees the exception at its `yield`."""
        return self._go_on(self.plan.throw, error)

    def _go_on(self, resume: Callable[[Any], Any], value: Any) -> Step | list[Step]:
        before = NOTING.set(self.made)
        try:
            asked = resume(value)
        except StopIteration:
            forgotten = next((made for made in self.made if made.forgotten), None)
            if forgotten is not None:
                raise UserError(forgotten) from None
            raise
        finally:
            NOTING.reset(before)
        for step in asked if isinstance(asked, list) else [asked]:
            if not isinstance(step, Fit | Predict | ClassSums):
                raise UserError(f"{place(_suspended(self.plan))}: yields {_what(step)}")
            if step.made is not None:
                step.made.yielded = True
        return asked


def _what(asked: Any) -> str:
    if isinstance(asked, GeneratorType):
        return f"the plan {asked.__name__}(…); write `yield from`"
    return f"{type(asked).__name__}, which is no step; yield a Fit, a Predict, a ClassSums, or a list of them"


def _suspended(plan: Any) -> FrameType | None:
    """Where a plan stands, in the sub-plan that yielded."""
    while isinstance(plan.gi_yieldfrom, GeneratorType):
        plan = plan.gi_yieldfrom
    frame: FrameType | None = plan.gi_frame
    return frame
