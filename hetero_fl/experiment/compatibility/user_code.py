"""Checks of user-defined methods, losses, optimizers, metrics and transforms before a run."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from types import FunctionType, GeneratorType
from typing import Any

import torch
from torch import Tensor, nn

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import call_broadcast
from hetero_fl.algorithms.round_parts import load_objective
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.config.clients import ClientSettings
from hetero_fl.core.image_transforms import apply_transform
from hetero_fl.core.metrics import apply_metric, metric_names
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import LossFunction, Objective, Supervised
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import record_steps
from hetero_fl.core.task import Task
from hetero_fl.engine.driver import run_plan, translate_user_errors
from hetero_fl.engine.training import make_optimizer, try_optimizer
from hetero_fl.federation.expected import ExpectedUploads
from hetero_fl.federation.federation import FederationSpec, load_metric
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.ordering import natural_key
from hetero_fl.utils.text import Caution, prefix_note
from model_zoo.generators import keyed_generators
from model_zoo.module_state import MODULE_ATTRIBUTES, describe_content
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
    archs = {arch for p in federation.client_infos.profiles for arch in p.models.values()}
    unusual = {arch: kinds for arch in archs if set(kinds := output_kinds(arch)) != {LOGITS}}
    is_private = federation.privacy is not None and federation.privacy.unit == "record"
    for profile in federation.client_infos.profiles:
        settings = profile.settings
        where = f"clients: '{profile.first}'"
        try:
            objective = load_objective(settings.objective, federation.task)
            for arch in dict.fromkeys(profile.models.values()):
                kinds = unusual.get(arch, [LOGITS, LOGITS])
                if isinstance(objective, Supervised) and objective.function is not None:
                    _check_loss(objective.function, kinds[0], settings, is_private)
                is_regression = federation.task.kind == "regression"
                outputs = [] if is_regression else _output_notes(arch, kinds, objective)
                for note in [*_input_notes(arch), *outputs]:
                    noted.setdefault(note, where)
            _check_optimizer(settings.optimizer)
            inputs = torch.zeros(TRIAL_ROWS, *profile.arch.input_shape)
            if settings.preprocess.transform is not None:
                apply_transform(settings.preprocess.transform, inputs, "preprocess.transform")
            if settings.augment.transform is not None:
                apply_transform(settings.augment.transform, inputs, "augment.transform")
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    try:
        _check_optimizer(federation.server_settings.optimizer)
    except UserError as error:
        raise UserError(f"server: {error}") from error
    _check_metrics(federation.metrics, federation.task)
    return [prefix_note(where, note) for note, where in noted.items()]


@translate_user_errors()
def check_user_method(algorithm: Algorithm, federation: FederationSpec) -> None:
    """Check a user-defined method for mistakes by running the hooks without computation.

    Raises:
        UserError: If the name of a hook is misspelled, `deploy` is not a generator, a plan is never
            run, a step is never yielded or an uploaded item is not declared.
        RunFailedError: If a hook raises an exception.
    """
    _check_hook_names(type(algorithm))
    _check_plans_are_run(type(algorithm))
    expected = ExpectedUploads(algorithm, federation)
    server = federation.server()
    algorithm.setup(server)
    uploads = Uploads(specs=expected.specs, common=server.common)
    profiles = federation.client_infos.profiles
    for client_id in sorted((profile.first for profile in profiles), key=natural_key):
        client_info = federation.client_infos[client_id]
        broadcast = call_broadcast(algorithm, server, client_info)
        client = expected.placeholder_client(client_info, 0)
        plan = algorithm.deploy(client, broadcast)
        if not isinstance(plan, GeneratorType):
            raise UserError(
                f"{type(algorithm).__name__}.deploy: expected a generator, got "
                f"{type(plan).__name__}; end the function with `yield from ()`"
            )
        items = expected.expected_items(client_info, broadcast, 0)
        uploads.add(Upload(client_info, Payload(dict(items))))
    try:
        with record_steps() as created:
            run_plan(server, algorithm.aggregate(server, uploads), expected.backend)
        expected.check_yields("aggregate", created)
    except UserError:
        raise
    except Exception:
        # The uploads contain zeros, which can cause errors that do not occur in a real round.
        return


def _user_functions(algorithm_class: type) -> list[FunctionType]:
    """Return the functions of a class and of all base classes outside this package."""
    bases = [b for b in algorithm_class.__mro__ if not b.__module__.startswith("hetero_fl.")]
    return [f for base in bases for f in vars(base).values() if inspect.isfunction(f)]


def _check_hook_names(algorithm_class: type) -> None:
    """Raise UserError if the name of a function looks like a misspelled hook."""
    methods = [
        base
        for base in algorithm_class.__mro__
        if issubclass(base, Algorithm) and base.__module__.startswith("hetero_fl.")
    ]
    hooks = {name for method in methods for name in vars(method) if not name.startswith("_")}
    for function in _user_functions(algorithm_class):
        name = function.__name__
        matches = get_close_matches(name, hooks, 1, cutoff=MIN_HOOK_SIMILARITY)
        if matches and name not in hooks and not name.startswith("_"):
            raise UserError(
                f"{function.__qualname__}: unknown hook {name!r}; did you mean {matches[0]!r}?"
            )


def _check_plans_are_run(algorithm_class: type) -> None:
    """Check that each statement that creates a plan also runs the plan.

    Raises:
        UserError: If a plan is created but never run.
    """
    for function in _user_functions(algorithm_class):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):
            # A function from an interactive shell, or a lambda.
            continue
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
        trained = [n for n, p in loss.function.named_parameters() if p.requires_grad]
        if trained:
            raise UserError(
                f"objective: the parameter '{trained[0]}' of the loss would not be trained; add it "
                "to the model, or set requires_grad=False"
            )
    needs_rows = {"privacy.unit=record": is_private, "class_weights": settings.class_weights}
    logits, y = _trial_outputs(loss.task)
    if outputs == LOGITS and loss.task.kind != "regression":
        # Logits are negative and positive.
        logits = logits + torch.arange(loss.task.outputs) - 0.5
    try:
        is_module = isinstance(loss.function, nn.Module)
        trial = replace(loss, function=copy.deepcopy(loss.function)) if is_module else loss
        _check_state(
            trial, logits.repeat_interleave(TRIAL_ROWS, 0), y.repeat_interleave(TRIAL_ROWS, 0)
        )
        if not loss.total(logits.requires_grad_(), y).requires_grad:
            raise ValueError(
                "the loss has no gradient; compute it from the logits with operations of torch, "
                "without detach(), item() or numpy()"
            )
        loss.each(logits, y, separate=settings.class_weights is not None)
        for setting in [name for name, value in needs_rows.items() if value]:
            if not loss.is_mean_of_examples:
                raise ValueError(
                    f"{setting} needs a loss that is the mean of the losses of the rows, which "
                    "class weights, ignore_index and reduction='sum' change; return one loss per "
                    "row (reduction='none')"
                )
    # A user's function may raise any exception.
    except Exception as error:
        advice = _advice_on_targets(loss, logits.detach(), y)
        raise UserError(f"objective: {one_line(error)}{advice}") from error


def _advice_on_targets(loss: LossFunction, logits: Tensor, y: Tensor) -> str:
    """Return advice for a loss that needs one number per class instead of class numbers, or ""."""
    if loss.task.kind != "multiclass":
        return ""
    # More examples than classes, so that no shapes are equal by chance.
    logits, y = logits.repeat(2, 1), y.repeat(2)
    with suppress(Exception), keyed_generators(0):
        loss.function(logits, y)
        return ""
    with suppress(Exception), keyed_generators(0):
        loss.function(logits, nn.functional.one_hot(y, loss.task.outputs).to(logits.dtype))
        return (
            "; the targets are class numbers of shape [N]: use torch.nn.CrossEntropyLoss(), or "
            "convert them with torch.nn.functional.one_hot in a function"
        )
    return ""


def _check_state(loss: LossFunction, logits: Tensor, y: Tensor) -> None:
    """Check that no call of a loss depends on earlier calls.

    Attributes and variables that each call overwrites, such as the last value, are allowed.
    """
    half = len(y) // 2
    other = logits[:half] / 2 + 0.25, y[:half]
    states = [_state_of(loss.function)]
    values = []
    for batch in ((logits, y), other, other):
        with keyed_generators(0):
            values.append(loss.total(*batch).detach())
        states.append(_state_of(loss.function))
    before, first, second, third = states
    written = [name for name in first if before.get(name) != first[name]]
    kept = [name for name in written if first[name] == second.get(name)]
    kept += [name for name in third if second.get(name) != third[name]]
    is_repeatable = torch.allclose(values[1], values[2], rtol=0, atol=0, equal_nan=True)
    if not is_repeatable:
        kept += written
    for kind, name in kept:
        raise ValueError(
            f"the loss changes {kind} '{name}', which clients would share; compute the loss from "
            "logits and targets only, and record values with evaluation.metrics or output.loggers"
        )
    if not is_repeatable:
        raise ValueError(
            "the loss has another value when it is called again; compute the loss from logits and "
            "targets only"
        )


def _state_of(function: Any) -> dict[tuple[str, str], str]:
    """Describe what a function may keep between two calls, keyed by kind and name."""
    return {name: describe_content(value) for name, value in _variables_of(function).items()}


def _variables_of(function: Any) -> dict[tuple[str, str], Any]:
    """Return attributes of an object, arguments of a partial, or variables that a function reads.

    Variables that only inner functions read are not found.

    Returns:
        The values, keyed by their kinds, such as "its attribute", and names.
    """
    if isinstance(function, functools.partial):
        given = {f"args[{i}]": value for i, value in enumerate(function.args)}
        return {
            **_variables_of(function.func),
            **_with_kind("its argument", {**given, **function.keywords}),
        }
    if inspect.ismethod(function):
        return {**_variables_of(function.__func__), **_variables_of(function.__self__)}
    if inspect.isfunction(function):
        read = inspect.getclosurevars(function)
        parameters = inspect.signature(function).parameters.values()
        defaults = {parameter.name: parameter.default for parameter in parameters}
        return {
            **_with_kind("the variable", {**read.globals, **read.nonlocals}),
            **_with_kind("its argument", defaults),
            **_with_kind("its attribute", vars(function)),
        }
    parts = function.named_modules() if isinstance(function, nn.Module) else [("", function)]
    found: dict[tuple[str, str], Any] = {}
    for path, part in parts:
        # A scripted module creates this attribute on the first access.
        call = getattr(part, "forward", type(part).__call__)
        call = getattr(call, "__func__", call)
        found |= _variables_of(call) if inspect.isfunction(call) else {}
        values: dict[str, Any] = {}
        for owner in reversed(type(part).__mro__):
            values |= {name: v for name, v in vars(owner).items() if not name.startswith("__")}
        # Objects without `__dict__` have slots.
        values |= getattr(part, "__dict__", {type(part).__name__: part})
        for own in (part._parameters, part._buffers) if isinstance(part, nn.Module) else ():
            values |= own
        own = {
            f"{path}.{name}".removeprefix("."): value
            for name, value in values.items()
            if name not in MODULE_ATTRIBUTES
        }
        found |= _with_kind("its attribute", own)
    return found


def _with_kind(kind: str, values: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    return {(kind, name): value for name, value in values.items()}


def _input_notes(arch: ModelSpec) -> list[str]:
    """Return notes on a user's model that was converted, or may misread the axes of a series."""
    if not arch.is_user_defined:
        return []
    notes = []
    if arch.converted_type is not None:
        default = torch.get_default_dtype()
        notes.append(
            f"its tensors are converted from {arch.converted_type} to {default}, the type of the "
            "inputs; to compute in another type, call torch.set_default_dtype before"
        )
    if arch.shape.kind == "series" and arch.input_shape[0] == arch.input_shape[1]:
        notes.append(
            "the series have as many steps as columns and reach the module as [B, columns, steps], "
            "as in nn.Conv1d; if it expects [B, steps, columns], write x = x.transpose(1, 2) in "
            "forward"
        )
    return [Caution(f"model {arch.display_name}: {note}") for note in notes]


def output_kinds(arch: ModelSpec) -> list[str]:
    """Return what a model returns in training and in evaluation mode, such as `probabilities`.

    Only models of the user are examined. Their heads get random weights that are so large that
    logits are neither between 0 and 1 nor normalized by chance.
    """
    if not arch.is_user_defined:
        return [LOGITS, LOGITS]
    _, channels, size, _ = arch.size_arguments
    with keyed_generators(0), torch.no_grad():
        model = arch.build()
        x = make_shape(channels, size, arch.vocabulary).zeros(2)
        x = x.uniform_() if x.is_floating_point() else x.random_(1, arch.vocabulary)
        head = list(model.head.parameters())
        changed = head or list(model.parameters())
        outputs: list[list[Tensor]] = []
        try:
            for parameter in changed:
                parameter.normal_(std=1e6 if head else 1.0)
            # Weights of size 1, because exp() of large outputs is infinite.
            for factor in (1.0, -1.0, -1e-6, -1.0) if head else (1.0, -1.0):
                for parameter in changed:
                    parameter.mul_(factor)
                outputs.append([model.train(mode)(x) for mode in (True, False)])
        # Errors of models are reported where models are created.
        except Exception:
            return [LOGITS, LOGITS]
    return [_output_kind(torch.cat(pair)) for pair in zip(*outputs, strict=True)]


def _output_kind(outputs: Tensor) -> str:
    outputs = outputs[outputs.isfinite().all(-1)]
    if not len(outputs):
        return LOGITS
    if bool(outputs.any() and ((outputs >= 0) & (outputs <= 1)).all()):
        return PROBABILITIES
    sums = outputs.exp().sum(-1)
    return LOG_PROBABILITIES if torch.allclose(sums, torch.ones_like(sums), 1e-3) else LOGITS


def _output_notes(arch: ModelSpec, kinds: Sequence[str], objective: Objective) -> list[str]:
    """Return a note if a loss and predictions that need logits receive something else.

    Raises:
        UserError: If the loss needs log-probabilities and the model returns logits.
    """
    function = objective.function if isinstance(objective, Supervised) else None
    needs_log = (
        function is not None
        and function.task.kind == "multiclass"
        and function.needs_log_probabilities
    )
    model = f"model {arch.display_name}"
    if needs_log and kinds[0] == LOGITS:
        raise UserError(
            "objective: the loss is linear in the outputs, as torch.nn.NLLLoss, and has no minimum "
            f"on the logits of {model}; use torch.nn.CrossEntropyLoss, which applies log-softmax"
        )
    if PROBABILITIES in kinds:
        return [
            Caution(
                f"{model}: the outputs are probabilities, but losses and predictions apply softmax "
                "or sigmoid to outputs; return logits, without softmax or sigmoid"
            )
        ]
    if LOG_PROBABILITIES in kinds and isinstance(objective, Supervised) and not needs_log:
        return [
            Caution(
                f"{model}: the outputs are log-probabilities, to which the loss applies softmax "
                "again; return logits, without log-softmax"
            )
        ]
    return []


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
