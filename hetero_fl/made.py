"""What a plan makes while it runs, steps and sub-plans, so that one that is made and never yielded can be told.

Whoever advances a plan sets `NOTING` to a list of that plan's own while it does so, and only then: nothing is shared between
plans, threads or processes, and a step made elsewhere is not noted.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Collection, Generator
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType, FunctionType, GeneratorType
from typing import Any

from hetero_fl.errors import PACKAGE, UserError, is_users

RUNTIME = os.path.join(PACKAGE, "runtime", "")


@dataclass(eq=False)
class Made:
    """A step or a sub-plan, and where it was made. A step changed by `dataclasses.replace` is still the same one."""

    what: str
    where: str
    plan: Generator[Any, Any, Any] | None = None
    yielded: bool = False

    @property
    def forgotten(self) -> bool:
        """Whether it was never carried out."""
        if self.plan is not None:
            return inspect.getgeneratorstate(self.plan) == inspect.GEN_CREATED
        return not self.yielded

    def __str__(self) -> str:
        keyword = "yield" if self.plan is None else "yield from"
        return f"{self.where}: {self.what} is made but never yielded, so nothing is computed; write `{keyword} …`"


NOTING: ContextVar[list[Made] | None] = ContextVar("NOTING", default=None)


def note(what: str, plan: Generator[Any, Any, Any] | None = None) -> Made | None:
    """Note what is being made, if a plan is making it."""
    noting = NOTING.get()
    if noting is None:
        return None
    noting.append(Made(what, place(_maker(sys._getframe(1))), plan))
    return noting[-1]


def watched(kind: type, hooks: Collection[str] = ()) -> None:
    """Let the class's plans (generator functions) note when they are called; `hooks`: methods that have to return plans."""
    for name, function in list(vars(kind).items()):
        if inspect.isgeneratorfunction(function):
            setattr(kind, name, _watched(function))
        elif name in hooks and inspect.isfunction(function):
            setattr(kind, name, _checked(function))


def _watched(function: Callable[..., Generator[Any, Any, Any]]) -> Callable[..., Generator[Any, Any, Any]]:
    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        plan = function(*args, **kwargs)
        note(f"the plan {function.__name__}(…)", plan)
        return plan

    return make


def _checked(function: FunctionType) -> Callable[..., Generator[Any, Any, Any]]:
    """A hook without a `yield`: it may hand on another plan. Raises UserError if it returns anything else."""

    @functools.wraps(function)
    def make(self: Any, *args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        plan = function(self, *args, **kwargs)
        if isinstance(plan, GeneratorType):
            return plan
        code = function.__code__
        returned = "nothing" if plan is None else f"a {type(plan).__name__}"
        raise UserError(
            f"{type(self).__name__}.{function.__name__} ({code.co_filename}, line {code.co_firstlineno}): returned {returned}, "
            "expected a plan; write `yield` before each compute step, or `yield from ()` before the return if there is none"
        )

    return make


def _maker(frame: FrameType | None) -> FrameType | None:
    """The innermost frame in a user's file, else the innermost plan, below whoever advances it."""
    plan = None
    while frame is not None and not frame.f_code.co_filename.startswith(RUNTIME):
        if is_users(frame.f_code.co_filename):
            return frame
        if plan is None and frame.f_code.co_flags & inspect.CO_GENERATOR:
            plan = frame
        frame = frame.f_back
    return plan


def place(frame: FrameType | None) -> str:
    """`Method.function (file, line n)`."""
    if frame is None:
        return "a plan"
    owner = frame.f_locals.get("self")
    kind = "" if owner is None else f"{type(owner).__name__}."
    return f"{kind}{frame.f_code.co_name} ({frame.f_code.co_filename}, line {frame.f_lineno})"
