"""The steps that a plan may yield, and the guard against steps that are created and never yielded."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Collection, Generator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import FrameType, FunctionType, GeneratorType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from hetero_fl.config.base import OptimizerConfig
from hetero_fl.config.clients import AugmentConfig
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.objectives import Objective
from hetero_fl.core.participant import Columns, Part, Participant
from hetero_fl.utils.errors import PACKAGE, UserError, is_user_code

# What a plan makes while it runs, steps and sub-plans, so that one that is made and never yielded
# can be told.
#
# Whoever advances a plan sets `NOTING` to a list of that plan's own while it does so, and only
# then: nothing is shared between plans, threads or processes, and a step made elsewhere is not
# noted.

RUNTIME = os.path.join(PACKAGE, "engine", "")


@dataclass(eq=False)
class StepOrigin:
    """A step or a sub-plan, and where it was made. A step changed by `dataclasses.replace` is still the same one."""

    description: str
    where: str
    plan: Generator[Any, Any, Any] | None = None
    yielded: bool = False

    @property
    def was_never_run(self) -> bool:
        """Whether it was never carried out."""
        if self.plan is not None:
            return inspect.getgeneratorstate(self.plan) == inspect.GEN_CREATED
        return not self.yielded

    def __str__(self) -> str:
        keyword = "yield" if self.plan is None else "yield from"
        return f"{self.where}: {self.description} is made but never yielded, so nothing is computed; write `{keyword} …`"


NOTING: ContextVar[list[StepOrigin] | None] = ContextVar("NOTING", default=None)


def record_origin(
    description: str, plan: Generator[Any, Any, Any] | None = None
) -> StepOrigin | None:
    """Note what is being made, if a plan is making it."""
    noting = NOTING.get()
    if noting is None:
        return None
    noting.append(StepOrigin(description, format_frame(_user_frame(sys._getframe(1))), plan))
    return noting[-1]


def track_plans(kind: type, plain_hooks: Collection[str] = ()) -> None:
    """Let the class's plans (generator functions) note when they are called; `plain_hooks`: methods that have to return plans."""
    for name, function in list(vars(kind).items()):
        if inspect.isgeneratorfunction(function):
            setattr(kind, name, _track_plan(function))
        elif name in plain_hooks and inspect.isfunction(function):
            setattr(kind, name, _check_hook(function))


def _track_plan(
    function: Callable[..., Generator[Any, Any, Any]],
) -> Callable[..., Generator[Any, Any, Any]]:
    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        plan = function(*args, **kwargs)
        record_origin(f"the plan {function.__name__}(…)", plan)
        return plan

    return make


def _check_hook(function: FunctionType) -> Callable[..., Generator[Any, Any, Any]]:
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


def _user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame in a user's file, else the innermost plan, below whoever advances it."""
    plan = None
    while frame is not None and not frame.f_code.co_filename.startswith(RUNTIME):
        if is_user_code(frame.f_code.co_filename):
            return frame
        if plan is None and frame.f_code.co_flags & inspect.CO_GENERATOR:
            plan = frame
        frame = frame.f_back
    return plan


def format_frame(frame: FrameType | None) -> str:
    """`Method.function (file, line n)`."""
    if frame is None:
        return "a plan"
    owner = frame.f_locals.get("self")
    kind = "" if owner is None else f"{type(owner).__name__}."
    return f"{kind}{frame.f_code.co_name} ({frame.f_code.co_filename}, line {frame.f_lineno})"


# The steps that a plan may yield. A method says with them what is computed; the runtime decides
# how.
#
# A plan is a generator: it yields a step (or a list of steps that may run in any order, together),
# is sent the result (or results), and returns what its author promised, an upload for instance. It
# holds no training loop. The last field of a step, `made`, is how one that is made and never
# yielded is noticed.


@dataclass(frozen=True)
class Rows:
    """A named data set of the participant, with columns set beside it, aligned to its rows (a teacher's logits)."""

    name: str = "train"
    rows: Tensor | None = None  # int64 [N]: only these
    extra_columns: Mapping[str, Tensor] = field(default_factory=dict)
    preprocess: Any = None  # another preprocessing than the participant's own

    def columns(self, participant: Participant) -> Columns:
        """The tensors, aligned on dimension 0."""
        columns = participant.data(self.name, self.preprocess)
        if self.rows is not None:
            columns = {n: t[self.rows] for n, t in columns.items()}
        return {**columns, **self.extra_columns}


@dataclass(frozen=True)
class TensorRows:
    """Tensors in hand, aligned on dimension 0 (what a server made of its uploads)."""

    tensors: Columns

    def columns(self, participant: Participant) -> Columns:
        """The tensors themselves."""
        return self.tensors


@dataclass(frozen=True)
class SampledBatches:
    """Batches without end, each drawn with a keyed generator: `draw(generator, size)` gives columns."""

    draw: Callable[[torch.Generator, int], Columns]
    size: int


@dataclass(frozen=True)
class Fit:
    """Minimise an objective. `train` maps slots to the part of them that moves (None: all of it)."""

    train: Mapping[str, Part]
    objective: Objective
    data: Rows | TensorRows | SampledBatches = field(default_factory=Rows)
    epochs: int = 1
    steps: int | None = None  # in place of epochs; endless permutations, full batches
    batch_size: int = 32
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    augment: AugmentConfig | None = None  # random changes of the images of each batch
    anneal: bool = False  # cosine from lr to nought within this fit
    frozen: tuple[str, ...] = ()  # slots that the objective may call but not change
    # tensors (or named tensors) an objective reads
    context: Mapping[str, Any] = field(default_factory=dict)
    # one batch of each per step
    extra_batches: Mapping[str, SampledBatches] = field(default_factory=dict)
    # slot -> d: θ −= lr·d after every optimizer step
    drift: Mapping[str, Tensors] = field(default_factory=dict)
    keep: str | None = None  # a name under which the optimizer's state lives on in the participant
    label: str = "train"  # names the random stream
    as_id: str | None = None  # draw as this participant would
    origin: StepOrigin | None = field(
        default_factory=partial(record_origin, "a Fit"), kw_only=True, repr=False, compare=False
    )


@dataclass(frozen=True)
class FitReport:
    """What a fit did: optimizer steps, examples seen, mean loss over the steps."""

    steps: int
    examples: int
    loss: float


@dataclass(frozen=True)
class Predict:
    """Outputs of a model in evaluation mode, `[N, …]` in the order of the rows.

    `tensors` and `arch` in place of a slot: a model that somebody sent.
    """

    slot: str
    data: Rows | TensorRows = field(default_factory=Rows)
    readout: Literal["logits", "features"] = "logits"
    batch_size: int = 500
    tensors: Tensors | None = None
    arch: ModelSpec | None = None
    origin: StepOrigin | None = field(
        default_factory=partial(record_origin, "a Predict"), kw_only=True, repr=False, compare=False
    )


@dataclass(frozen=True)
class ClassSums:
    """Sum and count by class of a model's output on labelled rows: `([C, width], [C])`."""

    slot: str
    data: Rows | TensorRows = field(default_factory=Rows)
    readout: Literal["logits", "features", "log_probabilities"] = "logits"
    at_least: float | None = None  # outputs are clipped from below before they are summed
    batch_size: int = 500
    origin: StepOrigin | None = field(
        default_factory=partial(record_origin, "a ClassSums"),
        kw_only=True,
        repr=False,
        compare=False,
    )


Step = Fit | Predict | ClassSums
T = TypeVar("T")
Plan = Generator[Any, Any, T]
