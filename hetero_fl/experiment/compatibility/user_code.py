"""Checks of user-defined methods, losses, optimizers, metrics and transforms before a run."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from difflib import get_close_matches
from types import FunctionType, GeneratorType
from typing import Any

import torch
from torch import Tensor, nn

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.round_parts import load_objective
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.config.clients import ClientSettings
from hetero_fl.core.image_transforms import apply_transform
from hetero_fl.core.metrics import apply_metric, metric_names
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import LossFunction, Objective, Supervised
from hetero_fl.core.plan import record_steps
from hetero_fl.core.task import Task
from hetero_fl.engine.driver import translate_user_errors
from hetero_fl.engine.training import make_optimizer, try_optimizer
from hetero_fl.experiment.compatibility.run_facts import RunFacts
from hetero_fl.federation.federation import FederationSpec, load_metric
from hetero_fl.utils.errors import RunFailedError, UserError, one_line
from hetero_fl.utils.text import Caution
from model_zoo.generators import keyed_generators
from model_zoo.module_state import describe_content
from model_zoo.shapes import make_shape

TRIAL_ROWS = 4
"""Number of examples with which user-defined functions are called."""
# Minimum similarity of a name to that of a hook to count as a misspelling: `agregate` does,
# `deployed` does not.
MIN_HOOK_SIMILARITY = 0.88
LOGITS = "logits"
PROBABILITIES = "probabilities"
LOG_PROBABILITIES = "log-probabilities"


def check_user_code(federation: FederationSpec) -> list[str]:
    """Check user-defined functions by calling each function with a few examples.

    Losses, optimizers and transforms are checked for each set of clients with equal settings.

    Args:
        federation: The federation.

    Returns:
        Notes on models whose inputs may be misread, or whose outputs are not logits.

    Raises:
        UserError: If a function does not exist, raises an exception, or returns an invalid value,
            or if a metric has the name of a built-in metric.
    """
    # The first client to which a note applies, keyed by note.
    noted: dict[str, str] = {}
    is_private = federation.privacy is not None and federation.privacy.unit == "record"
    for profile in federation.client_infos.profiles:
        settings = profile.settings
        where = f"clients: '{profile.first}'"
        with _prefixed_errors(where):
            objective = load_objective(settings.objective, federation.task)
            for arch in dict.fromkeys(profile.models.values()):
                kinds = output_kinds(arch)
                if isinstance(objective, Supervised) and objective.function is not None:
                    _check_loss(objective.function, kinds[0], settings, is_private)
                found = [*_input_notes(arch)]
                if federation.task.kind != "regression":
                    found += _output_notes(arch, kinds, objective)
                for note in found:
                    noted.setdefault(f"model {arch.display_name}: {note}", where)
            _check_optimizer(settings.optimizer)
            inputs = torch.zeros(TRIAL_ROWS, *profile.arch.input_shape)
            for key in ("preprocess", "augment"):
                if (transform := getattr(settings, key).transform) is not None:
                    apply_transform(transform, inputs, f"{key}.transform")
    with _prefixed_errors("server"):
        _check_optimizer(federation.server_settings.optimizer)
    _check_metrics(federation.metrics, federation.task)
    return [Caution(f"{where}: {note}") for note, where in noted.items()]


@contextmanager
def _prefixed_errors(where: str) -> Iterator[None]:
    """Prefix the messages of errors with a place."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


@translate_user_errors()
def check_user_method(run: RunFacts) -> None:
    """Check a user-defined method for mistakes by running the hooks without computation.

    Raises:
        UserError: If the name of a hook is misspelled, `deploy` is not a generator, a plan is never
            run, a step is never yielded or an uploaded item is not declared.
        RunFailedError: If a hook raises an exception.
    """
    method = run.algorithm
    for function in _user_functions(type(method)):
        _check_hook_name(function, type(method))
        _check_plans_are_run(function, type(method))
    for client_info, broadcast in run.broadcasts:
        plan = method.deploy(run.expectations.placeholder_client(client_info, 0), broadcast)
        if not isinstance(plan, GeneratorType):
            raise UserError(
                f"{type(method).__name__}.deploy: expected a generator, got "
                f"{type(plan).__name__}; end the function with `yield from ()`"
            )
    _ = run.uploaded
    # The uploads contain zeros, which can cause errors that do not occur in a real round.
    with suppress(RunFailedError), record_steps() as created:
        _ = run.aggregated_items
        run.expectations.check_yields("aggregate", created)


def _user_functions(algorithm_class: type) -> list[FunctionType]:
    """Return the functions of a class and of all base classes outside this package."""
    bases = [b for b in algorithm_class.__mro__ if not b.__module__.startswith("hetero_fl.")]
    return [f for base in bases for f in vars(base).values() if inspect.isfunction(f)]


def _check_hook_name(function: FunctionType, algorithm_class: type) -> None:
    """Raise UserError if the name of a function looks like a misspelled hook."""
    known = [b for b in algorithm_class.__mro__ if b.__module__.startswith("hetero_fl.")]
    names = {name for base in known if issubclass(base, Algorithm) for name in vars(base)}
    hooks = [name for name in names if not name.startswith("_")]
    name = function.__name__
    matches = get_close_matches(name, hooks, 1, cutoff=MIN_HOOK_SIMILARITY)
    if matches and name not in hooks and not name.startswith("_"):
        raise UserError(
            f"{function.__qualname__}: unknown hook {name!r}; did you mean {matches[0]!r}?"
        )


def _check_plans_are_run(function: FunctionType, algorithm_class: type) -> None:
    """Raise UserError if a statement creates a plan without running it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        # A function from an interactive shell, or a lambda.
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and _creates_plan(node.value, algorithm_class, function):
            name = ast.unparse(node.value.func)  # type: ignore[attr-defined]  # it is a call
            line = function.__code__.co_firstlineno + node.lineno - 1
            raise UserError(
                f"{function.__qualname__} ({function.__code__.co_filename}, line {line}): "
                f"the plan {name}(…) is created but never run; write `yield from` before it"
            )


def _creates_plan(node: ast.expr, algorithm_class: type, function: FunctionType) -> bool:
    """Return whether an expression calls a generator function of `self`, `super()` or a class."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    owner = ast.unparse(node.func.value)
    is_own = owner in ("self", "super()")
    target = algorithm_class if is_own else function.__globals__.get(owner)
    return inspect.isgeneratorfunction(getattr(target, node.func.attr, None))


def _check_loss(
    loss: LossFunction, outputs: str, settings: ClientSettings, is_private: bool
) -> None:
    """Check that a loss can be computed from the given kind of outputs and does not change."""
    if isinstance(loss.function, nn.Module):
        for name, parameter in loss.function.named_parameters():
            if parameter.requires_grad:
                raise UserError(
                    f"objective: the parameter '{name}' of the loss would not be trained; add it "
                    "to the model, or set requires_grad=False"
                )
    logits, y = _trial_outputs(loss.task)
    if outputs == LOGITS and loss.task.kind != "regression":
        # Logits are negative and positive.
        logits = logits + torch.arange(loss.task.outputs) - 0.5
    needs_rows = {"privacy.unit=record": is_private, "class_weights": settings.class_weights}
    try:
        _check_state(loss, logits, y)
        if not loss.total(logits.requires_grad_(), y).requires_grad:
            raise ValueError(
                "the loss has no gradient; compute it from the logits with operations of torch, "
                "without detach(), item() or numpy()"
            )
        loss.each(logits, y, separate=settings.class_weights is not None)
        for setting, is_set in needs_rows.items():
            if is_set and not loss.is_mean_of_examples:
                raise ValueError(
                    f"{setting} needs a loss that is the mean of the losses of the rows, which "
                    "class weights, ignore_index and reduction='sum' change; return one loss per "
                    "row (reduction='none')"
                )
    # A user's function may raise any exception.
    except Exception as error:
        raise UserError(f"objective: {one_line(error)}") from error


def _check_state(loss: LossFunction, logits: Tensor, y: Tensor) -> None:
    """Check that a loss of a batch does not depend on earlier calls.

    Attributes and variables that each call overwrites, such as the last value, are allowed.
    """
    states = [_state_of(loss)]
    fresh = loss
    # An object may refuse to be copied, or to be described by its content.
    with suppress(Exception):
        copied = replace(loss, function=copy.deepcopy(loss.function))
        fresh = copied if _state_of(copied) == states[0] else loss
    batch = (logits, y)
    other = (torch.cat([logits, logits[:1]]) / 2 + 0.25, torch.cat([y, y[:1]]))
    values = []
    for own in (batch, other, batch, other):
        with keyed_generators(0):
            values.append(describe_content(loss.total(*own)))
        states.append(_state_of(loss))
    with keyed_generators(0):
        expected = describe_content(fresh.total(*other))
    before, first, second, third, fourth = states
    is_equal = values[:2] == values[2:] and [first, second] == [third, fourth]
    # The state of a copy shows what the first batch has set for all others.
    is_kept = before != first and first == second
    if not is_equal or is_kept or [values[1], second] != [expected, _state_of(fresh)]:
        raise ValueError(
            "the loss of a batch depends on earlier calls, which clients would share; compute the "
            "loss from logits and targets only, and record values with evaluation.metrics or "
            "output.loggers"
        )


def _state_of(loss: LossFunction) -> str:
    """Describe what a loss may keep between two calls."""
    function: Any = loss.function
    call = getattr(function, "forward", type(function).__call__)
    call = function if inspect.isfunction(function) else getattr(call, "__func__", call)
    kept: dict[str, Any] = {"": function}
    if inspect.isfunction(call) and not str(call.__module__).startswith("torch."):
        read = inspect.getclosurevars(call)
        attributes = {name: v for name, v in vars(type(function)).items() if name[:2] != "__"}
        kept |= {**attributes, **read.globals, **read.nonlocals, **vars(call)}
        kept["defaults"] = call.__defaults__
    return describe_content([v for v in kept.values() if not inspect.ismodule(v)])


def _input_notes(arch: ModelSpec) -> Iterator[str]:
    """Yield notes on a user's model that was converted, or may misread the axes of a series."""
    if arch.is_user_defined and arch.converted_type is not None:
        yield (
            f"its tensors are converted from {arch.converted_type} to {torch.get_default_dtype()}, "
            "the type of the inputs; to compute in another type, call torch.set_default_dtype "
            "before"
        )
    is_series = arch.is_user_defined and arch.shape.kind == "series"
    if is_series and arch.input_shape[0] == arch.input_shape[1]:
        yield (
            "the series have as many steps as columns and reach the module as [B, columns, steps], "
            "as in nn.Conv1d; if it expects [B, steps, columns], write x = x.transpose(1, 2) in "
            "forward"
        )


def output_kinds(arch: ModelSpec) -> list[str]:
    """Return what a model returns in training and in evaluation mode, such as `probabilities`.

    Only models of the user are examined. The outputs of a linear head with the opposite weights
    have the opposite sign, unless the model changes them to probabilities.
    """
    _, channels, size, _ = arch.size_arguments
    if not arch.is_user_defined:
        return [LOGITS, LOGITS]
    with keyed_generators(0), torch.no_grad():
        model = arch.build()
        x = make_shape(channels, size, arch.vocabulary).zeros(TRIAL_ROWS)
        x = x.uniform_() if x.is_floating_point() else x.random_(1, arch.vocabulary)
        outputs: list[list[Tensor]] = [[], []]
        try:
            for _ in range(2):
                for parameter in list(model.head.parameters()) or list(model.parameters()):
                    parameter.neg_()
                for found, is_training in zip(outputs, (True, False), strict=True):
                    found.append(model.train(is_training)(x))
        # Errors of models are reported where models are created.
        except Exception:
            return [LOGITS, LOGITS]
    return [_output_kind(torch.cat(found)) for found in outputs]


def _output_kind(outputs: Tensor) -> str:
    if bool(((outputs > 0) & (outputs <= 1)).all()):
        return PROBABILITIES
    sums = outputs.exp().sum(-1)
    return LOG_PROBABILITIES if torch.allclose(sums, torch.ones_like(sums), 1e-3) else LOGITS


def _output_notes(arch: ModelSpec, kinds: Sequence[str], objective: Objective) -> Iterator[str]:
    """Yield a note if a loss and predictions that need logits receive something else.

    Raises:
        UserError: If the loss needs log-probabilities and the model returns logits.
    """
    is_supervised = isinstance(objective, Supervised)
    function = objective.function if isinstance(objective, Supervised) else None
    needs_log = (
        function is not None
        and function.task.kind == "multiclass"
        and function.needs_log_probabilities
    )
    if needs_log and kinds[0] == LOGITS:
        raise UserError(
            "objective: the loss is linear in the outputs, as torch.nn.NLLLoss, and has no minimum "
            f"on the logits of model {arch.display_name}; use torch.nn.CrossEntropyLoss, which "
            "applies log-softmax"
        )
    if PROBABILITIES in kinds:
        yield (
            "the outputs are probabilities, but losses and predictions apply softmax or sigmoid to "
            "outputs; return logits, without softmax or sigmoid"
        )
    elif LOG_PROBABILITIES in kinds and is_supervised and not needs_log:
        yield (
            "the outputs are log-probabilities, to which the loss applies softmax again; return "
            "logits, without log-softmax"
        )


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    if not optimizer.is_custom:
        return
    try:
        try_optimizer(
            lambda parameters: make_optimizer(
                optimizer, dict(zip(("model:weight", "model:head.bias"), parameters, strict=True))
            )
        )
    # A user's optimizer may raise any exception.
    except Exception as error:
        reason = str(error).removeprefix("optimizer.name: ")
        raise UserError(f"optimizer.name: {one_line(reason)}") from error


def _check_metrics(metrics: Mapping[str, str], task: Task) -> None:
    for name, reference in metrics.items():
        where = f"evaluation.metrics.{name}"
        if name in metric_names(task):
            raise UserError(f"{where}: built-in metric; choose another name")
        function = load_metric(name, reference)
        try:
            apply_metric(function, task, *_trial_outputs(task))
        # A user's function may raise any exception.
        except Exception as error:
            raise UserError(f"{where}: {one_line(error)}") from error


def _trial_outputs(task: Task) -> tuple[Tensor, Tensor]:
    """Return model outputs and targets for a few examples, with all classes of the task."""
    rows = max(TRIAL_ROWS, task.outputs) if task.kind == "multiclass" else TRIAL_ROWS
    logits = torch.zeros(rows, task.outputs)
    if task.kind == "multiclass":
        return logits, torch.arange(rows) % task.outputs
    return logits, (torch.arange(rows)[:, None] % 2).expand(rows, task.outputs).float()
