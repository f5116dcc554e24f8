"""Clients of a federation that is created in Python."""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from hetero_fl.config.base import OptimizerConfig, Settings
from hetero_fl.config.clients import (
    AugmentConfig,
    ClientGroup,
    ClientSettings,
    PreprocessConfig,
    Recalibration,
    ScannerConfig,
    check_client_id,
)
from hetero_fl.config.data import DataConfig, PartitionConfig
from hetero_fl.config.describe import describe_error
from hetero_fl.config.simulation import DeviceConfig
from hetero_fl.core.given_models import GivenModel, redraw_weights
from hetero_fl.core.objectives import Objective
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.labels import Kind, numbered_task, with_task
from hetero_fl.data.partition import assign_rows
from hetero_fl.data.registry import load_section
from hetero_fl.data.sources.objects import is_source, to_dataset
from hetero_fl.engine.training import try_optimizer
from hetero_fl.experiment.wording import errors_with_arguments
from hetero_fl.reporting.notebook import html_items
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.objects import OBJECT_PREFIX
from hetero_fl.utils.registry import importable_reference, reference_to
from hetero_fl.utils.text import pluralize
from model_zoo import ModelError
from model_zoo.generators import keyed_generators

Model = nn.Module | type[nn.Module] | Mapping[str, Any] | str | Any
Init = Literal["seeded", "given"]
OptimizerFunction = Callable[..., torch.optim.Optimizer]
LossLike = Callable[[Tensor, Tensor], Tensor]


class Client:
    """A client of a federation, with its own data and model.

    The arguments from `optimizer` on have the meaning of the configuration keys with the same names
    (see the reference of `clients.defaults`). If such an argument is None, the default of the
    federation applies.

    Args:
        name: Client id, which consists of letters, digits, `_` and `-`.
        model: A `torch.nn.Module`; a class or function that creates a module; the name of a model
            in `model_zoo`; or a dictionary with the name and options of such a model. If None, the
            default model of the federation is used.
        data: The client's examples: a pair (x, y) of arrays or tensors, a pandas DataFrame, a
            map-style torch `Dataset`, a Hugging Face `Dataset`, a `hetero_fl.data.Dataset`, or a
            source as in the configuration, such as `{"name": "table", "path": "clinic.csv"}`. If
            None, the client receives a part of the federation's common data.
        label: Column of the labels in a DataFrame or a Hugging Face data set.
        patient: Column of the patients in a DataFrame or a Hugging Face data set, or the patient of
            each row of `data` as an array. The rows of a patient are never divided between splits.
        validation: Validation examples. If None, they are held out of `data`.
        test: Examples of the local test set. If None, they are held out of `data`.
        head: Path of the head within the model, such as "fc". If None, the head is the layer that
            computes the logits.
        init: Initial weights. With `given`, the client starts from the weights of the module. With
            `seeded`, the weights depend on the seed only, so that all clients with the same
            architecture start equal. Default: `given` for modules, `seeded` for classes, functions
            and names.
        optimizer: Optimizer of local training: a configuration such as `Adam(lr=1e-3)`; a name such
            as "adam", or a dictionary of the keys of the section; or a function or class that
            creates a `torch.optim.Optimizer` from parameters, such as
            `functools.partial(torch.optim.RMSprop, lr=1e-3)`.
        epochs: Number of local epochs per round.
        steps: Number of local optimizer steps per round, instead of `epochs`. Only one of the two
            can be set. It replaces both defaults of the federation.
        batch_size: Number of examples per optimizer step.
        class_weights: Weights of the classes in the cross-entropy, or "balanced".
        logit_adjustment: Whether to train on the adjusted logits z + log π, where z are the logits
            and π is the class prior of the client.
        local_prior: Whether to predict the client's own rows with z + log π.
        prior_correction: Whether to predict other rows with z − log π.
        recalibrate: Kinds of predictions for which BatchNorm statistics are recomputed.
        fine_tune_epochs: Number of epochs of fine-tuning on the client's rows before each
            evaluation.
        fine_tune_before: Tests before which the model is fine-tuned: "all_tests" or "local_tests".
        objective: Loss of local training: a function of logits and targets that returns the loss of
            the batch or of each example, such as `torch.nn.CrossEntropyLoss(label_smoothing=0.1)`;
            a subclass of `Objective`; or a reference `python:module:name`.
        preprocess: Preprocessing of all inputs. `Preprocess(transform=...)` applies a function.
        augment: Augmentation of training inputs. `Augment(transform=...)` applies a function, such
            as a torchvision transform.
        scanner: Simulated properties of the device that took the images.
        shares: Kinds of data that the client may upload.
        share_every: Interval in rounds between uploads of the client.
        size: Amount of data relative to other clients.
        machine: Simulated device that trains the client's model.

    Raises:
        TypeError: If the model or the optimizer is of an unsupported type.
        UserError: If an argument is invalid.

    Example:
        >>> import numpy as np
        >>> import hetero_fl as hfl
        >>> x, y = np.zeros((40, 28, 28), dtype=np.uint8), np.arange(40) % 2
        >>> hfl.Client("clinic", model="cnn_bn_small", data=(x, y), epochs=2)
        Client('clinic', model=cnn_bn_small, data=tuple of 40 rows, epochs=2)
    """

    def __init__(
        self,
        name: str,
        model: Model | None = None,
        data: Any = None,
        *,
        label: str | int | None = None,
        patient: Any = None,
        validation: Any = None,
        test: Any = None,
        head: str | None = None,
        init: Init | None = None,
        optimizer: OptimizerConfig | OptimizerFunction | Mapping[str, Any] | str | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        class_weights: Literal["balanced"] | list[float] | None = None,
        logit_adjustment: bool | None = None,
        local_prior: bool | None = None,
        prior_correction: bool | None = None,
        recalibrate: Sequence[Recalibration] | None = None,
        fine_tune_epochs: int | None = None,
        fine_tune_before: Literal["all_tests", "local_tests"] | None = None,
        objective: LossLike | type[Objective] | str | None = None,
        preprocess: PreprocessConfig | None = None,
        augment: AugmentConfig | None = None,
        scanner: ScannerConfig | None = None,
        shares: Sequence[str] | None = None,
        share_every: int | None = None,
        size: float | None = None,
        machine: DeviceConfig | None = None,
    ) -> None:
        arguments = {
            "optimizer": optimizer,
            "epochs": epochs,
            "steps": steps,
            "batch_size": batch_size,
            "class_weights": class_weights,
            "logit_adjustment": logit_adjustment,
            "local_prior": local_prior,
            "prior_correction": prior_correction,
            "recalibrate": recalibrate,
            "fine_tune_epochs": fine_tune_epochs,
            "fine_tune_before": fine_tune_before,
            "objective": objective,
            "preprocess": preprocess,
            "augment": augment,
            "scanner": scanner,
            "shares": shares,
            "share_every": share_every,
            "size": size,
            "machine": machine,
        }
        settings = {
            key: plain_value(value) for key, value in arguments.items() if value is not None
        }
        where = f"Client({name!r}): "
        if isinstance(optimizer, torch.optim.Optimizer):
            title = type(optimizer).__name__
            shown = f"torch.optim.{title}" if hasattr(torch.optim, title) else title
            raise TypeError(
                f"{where}optimizer: expected a function of parameters or a configuration, got an "
                f"optimizer of given parameters; pass functools.partial({shown}, lr=...) or "
                "{'name': 'adam', 'lr': ...}"
            )
        label = column_name(label)
        patient = column_name(patient)
        if not isinstance(label, str | None):
            raise TypeError(f"{where}label: expected the name of a column, got {label!r}")
        _check_columns(data, where, label, patient)
        if isinstance(optimizer, str):
            settings["optimizer"] = {"name": optimizer}
        elif callable(optimizer):
            settings["optimizer"] = optimizer_section(optimizer, where)
        self.name = name
        self.data = data
        self.label = label
        self.patient = patient
        self.validation = validation
        self.test = test
        self.init: Init = init or ("given" if isinstance(model, nn.Module) else "seeded")
        self.given = given_model(model, head, self.init, where)
        self.settings = settings
        self.model = model
        # The settings refer to these objects by name, so they must exist as long as the client.
        self._named = (optimizer, objective, preprocess, augment)
        # Check the name, the settings and, if the model is given by name, the model.
        named = {"model": model} if isinstance(model, str | Mapping) else {}
        validated({"name": name, **named, **settings}, f"Client({name!r})")
        try:
            check_client_id(name)
        except ValueError as error:
            raise UserError(f"{where}name: {error}") from None

    def __repr__(self) -> str:
        arguments = (f"{key}={value}" for key, value in self.describe().items())
        return f"Client({', '.join([repr(self.name), *arguments])})"

    def _repr_html_(self) -> str:
        return html_items(f"Client {self.name}", self.describe())

    def describe(self) -> dict[str, str]:
        """Return the arguments that are set, as text keyed by name."""
        described = {}
        if self.model is not None:
            described["model"] = self.title
        if self.given is not None and self.given.head is not None:
            described["head"] = repr(self.given.head)
        described |= {name: _describe_data(data) for name, data in self.parts().items()}
        return described | {key: _describe_setting(value) for key, value in self.settings.items()}

    def parts(self) -> dict[str, Any]:
        """Return those of `data`, `validation` and `test` that are not None, keyed by name."""
        given = {"data": self.data, "validation": self.validation, "test": self.test}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def title(self) -> str:
        """Name of the model for display."""
        if self.given is not None:
            return self.given.title
        return str(self.model["name"] if isinstance(self.model, Mapping) else self.model)

    @property
    def model_config(self) -> Any:
        """The value of the configuration key `model`, or None if the client has no model."""
        if self.given is None:
            return self.model
        if isinstance(self.model, type) and self.given.head is None:
            return importable_reference(self.model) or self.given.name
        return self.given.name


def split(
    data: Any,
    clients: int | Sequence[str],
    partition: PartitionConfig | None = None,
    *,
    model: Model | Sequence[Model] | None = None,
    label: str | int | None = None,
    patient: Any = None,
    task: Task | Kind | None = None,
    seed: int = 0,
    **settings: Any,
) -> list[Client]:
    """Divide a data set among clients.

    Args:
        data: The data set, as for `Client`, or the name of a source such as "digits". Its training
            rows are divided, and each client receives a copy of its rows.
        clients: Names of the clients, or their number n for the names `client_1` to `client_n`.
        partition: How to divide the rows, such as `Dirichlet(alpha=0.5)`. If None, the rows are
            divided at random.
        model: Model of all clients, or a list of models that are assigned to the clients in turn.
        label: Column of the labels in a DataFrame or a Hugging Face data set.
        patient: Patients of the rows, as for `Client`. The rows of a patient go to one client.
        task: Kind of the task, or the task. If None, the labels determine the task.
        seed: Seed of the partition.
        **settings: Additional arguments of each `Client`.

    Returns:
        The clients, in the order of their names in `clients`.

    Raises:
        TypeError: If the data or a model is of an unsupported type.
        UserError: If there are too few rows, or an argument is invalid.

    Example:
        >>> import numpy as np
        >>> import hetero_fl as hfl
        >>> x, y = np.zeros((90, 28, 28), dtype=np.uint8), np.arange(90) % 3
        >>> clients = hfl.split((x, y), 3, hfl.Dirichlet(alpha=1.0), model=["mlp", "linear"])
        >>> [client.name for client in clients]
        ['client_1', 'client_2', 'client_3']
        >>> clients[1]
        Client('client_2', model=linear, data=Dataset of 27 rows)
    """
    if isinstance(clients, int):
        names = [f"client_{i}" for i in range(1, clients + 1)]
    else:
        names = list(clients)
    if not names:
        raise UserError("split: clients: expected at least one client, got none")
    named = {"name": data} if isinstance(data, str) else data
    named_label = column_name(label)
    patient = column_name(patient)
    _check_columns(named, "split: ", named_label, patient)
    if is_source(named):
        dataset = load_section(named)
    else:
        dataset = to_dataset(data, "data", named_label, patient=patient, task=task)
    kind = getattr(task, "kind", task)
    if kind not in (None, dataset.task.kind):
        raise UserError(f"split: task: expected {dataset.task.kind} as in the data, got {kind}")
    if isinstance(task, Task):
        dataset = with_task(dataset, numbered_task(task, [dataset.task]), "data", "task")
    given = {} if partition is None else {"partition": plain_value(partition)}
    config = DataConfig(**given)
    rows = torch.arange(len(dataset.train))
    with errors_with_arguments():
        shares = assign_rows(
            dataset,
            rows,
            names,
            config=config,
            clients={name: ClientSettings() for name in names},
            seed=seed,
            notes=[],
        )
    models = list(model) if isinstance(model, list | tuple) else [model]
    return [
        Client(
            name,
            models[i % len(models)],
            replace(dataset, train=shares[name].copy_rows(), validation=None, test=None),
            **settings,
        )
        for i, name in enumerate(names)
    ]


def column_name(column: Any) -> Any:
    """Return an integer name of a column as text, as in data sets, and other values unchanged."""
    return str(column) if isinstance(column, numbers.Integral) else column


def _check_columns(data: Any, where: str, label: str | None, patient: Any) -> None:
    """Raise UserError if columns are given for data that is not an object of the program."""
    for key, value in (("label", label), ("patient", patient)):
        if value is not None and (data is None or is_source(data)):
            raise UserError(
                f"{where}{key}: applies to data=... as an object; for a source set its key {key}"
            )


def _describe_setting(value: Any) -> str:
    """Return the `repr` of a setting, in which objects are replaced with their names."""
    return re.sub(rf"'{OBJECT_PREFIX}([^'~]+)[^']*'", r"\1", repr(value))


def _describe_data(data: Any) -> str:
    """Describe a client's data by its type and, if it has a length, its number of rows."""
    title = type(data).__name__
    if is_source(data):
        return repr(dict(data))
    rows: Any = data[1] if isinstance(data, tuple | list) and len(data) == 2 else data
    if isinstance(rows, Dataset):
        rows = rows.train
    return f"{title} of {pluralize(len(rows), 'row')}" if hasattr(rows, "__len__") else title


def given_model(model: Any, head: str | None, init: Init, where: str) -> GivenModel | None:
    """Wrap a module, or a class or function that creates one, as a `GivenModel`.

    Args:
        model: See `Client`.
        head: See `Client`.
        init: See `Client`.
        where: Prefix of error messages.

    Returns:
        The wrapped model, or None if `model` is None, a name or a dictionary.

    Raises:
        TypeError: If the model is of an unsupported type.
        UserError: If `head` or `init` does not apply to the model.
    """
    if init not in ("seeded", "given"):
        raise UserError(f"{where}init: expected 'seeded' or 'given', got {init!r}")
    if model is None or isinstance(model, str | Mapping):
        if head is not None:
            raise UserError(f"{where}head: applies to a module, got the model {model!r}")
        if init == "given":
            raise UserError(f"{where}init: 'given' needs a module with weights, got {model!r}")
        return None
    try:
        given = GivenModel(model, head)
    except TypeError as error:
        raise TypeError(f"{where}{error}") from None
    except ModelError as error:
        raise UserError(f"{where}{error}") from None
    if init == "given" and not given.is_instance:
        raise UserError(
            f"{where}init: 'given' needs a module with weights, got {given.title}; create it"
        )
    with keyed_generators(0):
        kept = redraw_weights(given.factory(True)) if init == "seeded" and given.is_instance else []
    if kept:
        raise UserError(
            f"{where}init: 'seeded' cannot redraw the parameter '{kept[0]}' of {given.title}; pass "
            "the class or a function that creates the module"
        )
    return given


def optimizer_section(create: OptimizerFunction, where: str) -> dict[str, Any]:
    """Return the section `optimizer` of a configuration for a function that creates an optimizer.

    Args:
        create: The function, which is called once to read the learning rate and to make a step.
        where: Prefix of error messages.

    Raises:
        TypeError: If the function does not return a `torch.optim.Optimizer`.
        UserError: If the function raises an exception, or the optimizer has no learning rate or
            needs a closure.
    """
    try:
        optimizer = try_optimizer(create)
    except TypeError as error:
        raise TypeError(f"{where}optimizer: {one_line(error)}") from error
    # A user's function may raise any exception.
    except Exception as error:
        raise UserError(f"{where}optimizer: {one_line(error)}") from error
    return {"name": reference_to(create), "lr": float(optimizer.param_groups[0]["lr"])}


def validated(settings: Mapping[str, Any], where: str) -> ClientGroup:
    """Validate client settings and return them as a `ClientGroup`.

    Args:
        settings: The settings, keyed by configuration key.
        where: Prefix of error messages.

    Raises:
        UserError: If a setting is invalid.
    """
    try:
        return ClientGroup.model_validate(dict(settings))
    except ValidationError as error:
        raise UserError(f"{where}: {describe_error(error, dict(settings))}") from None


def plain_value(value: Any) -> Any:
    """Convert an argument to a value that a configuration can contain.

    Configuration sections become dictionaries of the keys that are set, tuples become lists, and
    functions and classes become references. Other values are returned unchanged.

    Raises:
        TypeError: If the value is the class of a section.
    """
    if isinstance(value, type) and issubclass(value, Settings):
        title = value.__name__.removesuffix("Config")
        raise TypeError(f"expected {title}(...), got the class {title}; call it")
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, tuple):
        return list(value)
    return reference_to(value) if callable(value) else value
