"""Models saved as safetensors files with everything that is needed for inference."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hetero_fl.core.given_models import GivenModel, restore_given
from hetero_fl.core.model_spec import ModelSpec, Tensors, freeze_lists
from hetero_fl.core.plan import forward_batch_size
from hetero_fl.core.task import Task
from hetero_fl.utils.code_permission import AllowCode, check_code, find_references
from hetero_fl.utils.errors import ArgumentError, UserError
from hetero_fl.utils.objects import OBJECT_PREFIX
from hetero_fl.utils.seeding import stream_key
from model_zoo import ModelError, SplitModel
from model_zoo.errors import one_line
from model_zoo.generators import keyed_generators
from model_zoo.module_state import load_state

FORM = "hetero_fl model 1"
# Prefix of the names of local tensors in a model file, for the client's own examples. At first,
# only BatchNorm statistics could be local.
LOCAL = "local_statistics/"


def read_model_file(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Read the metadata and the tensors of a model file without running any code.

    Raises:
        UserError: If the file is not a saved model.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, Any] = json.loads((file.metadata() or {})["hetero_fl"])
            # The file is not a dictionary and cannot be iterated.
            tensors = {n: file.get_tensor(n) for n in list(file.keys())}
        form = metadata["form"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a saved model: {error}") from None
    if form != FORM:
        raise UserError(f"{path}: expected {FORM!r}, got {form!r}")
    return metadata, tensors


def split_local_tensors(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Split the tensors of a model file into the model's tensors and the local tensors."""
    local = {n.removeprefix(LOCAL): t for n, t in tensors.items() if n.startswith(LOCAL)}
    return {n: t for n, t in tensors.items() if not n.startswith(LOCAL)}, local


def describe_invalid(error: ValidationError) -> str:
    """Return the key of the first invalid value, and what is wrong with the value."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


@dataclass(frozen=True)
class SavedModel:
    """A saved model with everything that is needed for inference.

    Args:
        tensors: Tensors of the model, keyed by name.
        arch: Architecture of the model.
        preprocess: Preprocessing of examples, as the fields of `hetero_fl.data.Preprocess`.
        task: The learning task.
        log_prior: Logarithm of the client's class prior, which is added to the logits of the
            client's own examples. If None, nothing is added.
        columns: Names of the columns of raw examples, to which the columns of a table are matched.
            Empty if columns have no names.
        categories: Names of the text columns, each with the possible values. Text columns are
            encoded as numeric columns.
        correction: Logarithm of the client's class prior, which is subtracted from the logits of
            all other examples. If None, nothing is subtracted.
        local_tensors: Tensors for the client's own examples, keyed by the name of the tensor that
            they replace: BatchNorm statistics, or all tensors of a model that was fine-tuned.
        head: Path of the head in a module that a program passed. If None, the path is that of
            `arch`.
    """

    tensors: Tensors
    arch: ModelSpec
    preprocess: dict[str, Any]
    task: Task
    log_prior: tuple[float, ...] | None = None
    columns: tuple[str, ...] = ()
    categories: tuple[tuple[str, tuple[str, ...]], ...] = ()
    correction: tuple[float, ...] | None = None
    local_tensors: Tensors = field(default_factory=dict)
    head: str | None = None

    # A file may have values of any type, which `load` checks.
    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True, defer_build=True)

    def __repr__(self) -> str:
        values = sum(tensor.numel() for tensor in self.tensors.values())
        return (
            f"SavedModel({self.arch.name!r}: {self.task.kind} with {self.arch.outputs} outputs, "
            f"input {list(self.arch.input_shape)}, {values:,} values in {len(self.tensors)} "
            "tensors)"
        )

    @property
    def is_object(self) -> bool:
        """Whether the model is a module, class or function that a program passed."""
        return self.arch.name.startswith(OBJECT_PREFIX)

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of the model file as JSON-compatible values."""
        metadata = {
            "form": FORM,
            "architecture": asdict(self.arch),
            "preprocess": {
                name: value
                for name, value in self.preprocess.items()
                if name != "pixel_range" or value is not None
            },
            "task": {
                name: value
                for name, value in asdict(self.task).items()
                if value != "" and value is not False
            },
            "log_prior": self.log_prior,
            **({} if self.correction is None else {"correction": self.correction}),
            **({"columns": self.columns} if self.columns else {}),
            **({"categories": self.categories} if self.categories else {}),
            # The head tells how to split the module when a program passes the module again.
            **({"head": self.head or self.arch.head_path} if self.is_object else {}),
        }
        plain: dict[str, Any] = json.loads(json.dumps(metadata))
        return plain

    def encode(self) -> bytes:
        """Encode the model as the content of a `.safetensors` file.

        Equal models are encoded as equal bytes.
        """
        local = {f"{LOCAL}{name}": t for name, t in self.local_tensors.items()}
        tensors = {n: t.detach().cpu().contiguous() for n, t in {**self.tensors, **local}.items()}
        return save(tensors, {"hetero_fl": json.dumps(self.metadata(), sort_keys=True)})

    @classmethod
    def load(cls, path: Path, allow_code: AllowCode = False) -> SavedModel:
        """Load a model from a file.

        Args:
            path: The file.
            allow_code: Whether the code of a user-defined model may be imported.

        Raises:
            UserError: If the file is not a saved model, or needs code that is not permitted.
        """
        metadata, tensors = read_model_file(path)
        own, local = split_local_tensors(tensors)
        try:
            check_code(find_references(metadata), str(path), allow_code)
            saved = _ADAPTER.validate_python(
                {
                    **metadata,
                    "arch": metadata.get("architecture"),
                    "tensors": own,
                    "local_tensors": local,
                }
            )
            # Lists in options are tuples in a specification.
            arch = ModelSpec.from_json(saved.arch.to_json())
            preprocess = {k: freeze_lists(v) for k, v in saved.preprocess.items()}
        except ValidationError as error:
            raise UserError(f"{path}: not a saved model: {describe_invalid(error)}") from None
        offsets = [len(each) for each in (saved.log_prior, saved.correction) if each is not None]
        if not arch.input_shape or {*offsets} - {arch.outputs}:
            raise UserError(f"{path}: not a saved model: {arch.spec_id} has {offsets} offsets")
        return replace(saved, arch=arch, preprocess=preprocess)

    def restore_object(self, model: Any, where: str) -> GivenModel:
        """Use a module of this program for all saved models with this architecture.

        Args:
            model: The module, or a class or function that creates the module.
            where: Prefix of error messages.

        Returns:
            The module under its saved name, which is valid as long as the program keeps the result.

        Raises:
            ArgumentError: If the model was not an object of a program, or the module does not fit
                the saved tensors.
        """
        name = self.arch.name
        if not self.is_object:
            raise ArgumentError(f"{where}: the saved model is {name}, which needs no module")
        try:
            given = GivenModel(model).without_caches(self.arch.shape)
            if self.head and not given.is_known_as(name):
                given = GivenModel(model, self.head).without_caches(self.arch.shape)
            arch = replace(self.arch, name=given.name)
            built = arch.build()
            load_state(built, self.tensors, arch.local_names)
            is_known = given.is_known_as(name)
            if not is_known and not given.is_instance:
                # The run may have been trained with an object of the class.
                module = GivenModel(arch.source_module(built), given.head)
                is_known = module.without_caches(arch.shape).is_known_as(name)
        except (ModelError, TypeError, ValueError, RuntimeError) as error:
            reason = one_line(error)
            raise ArgumentError(f"{where}: does not fit the saved model: {reason}") from None
        if not is_known:
            warnings.warn(
                f"{where}: {given.title} differs from the module of the run in its class, source "
                "code, attributes or frozen parameters, so its predictions may differ",
                UserWarning,
                stacklevel=5,
            )
        return restore_given(model, given.head, name)

    def module(self, personal: bool = False) -> SplitModel:
        """Build the model with the saved tensors, in evaluation mode.

        Args:
            personal: Whether the model will predict the client's own examples. If True,
                `local_tensors` are used.

        Raises:
            UserError: If the model cannot be built, or the saved tensors do not fit the model.
        """
        tensors = {**self.tensors, **self.local_tensors} if personal else self.tensors
        try:
            module = self.arch.build()
            # Older versions did not save the tensors that clients do not share.
            load_state(module, tensors, self.arch.local_names)
        # The metadata of a file may cause any error inside PyTorch.
        except Exception as error:
            raise UserError(
                f"model {self.arch.display_name}: does not fit the saved model: {one_line(error)}; "
                "use the code that the run was trained with"
            ) from None
        return module.eval()

    def source_module(self) -> nn.Module:
        """Return the module of the configured class with the saved tensors, in evaluation mode."""
        return self.arch.source_module(self.module())

    @torch.no_grad()
    def logits(self, x: Tensor, personal: bool = False, batch_size: int = 500) -> Tensor:
        """Compute the logits of preprocessed examples.

        Args:
            x: Preprocessed examples, shape `[N, *input_shape]`.
            personal: Whether these are the client's own examples. If True, `log_prior` and
                `local_tensors` are used, otherwise `correction`.
            batch_size: Maximum number of examples per forward pass (see `forward_batch_size`).

        Returns:
            Logits, shape `[N, outputs]`.
        """
        module = self.module(personal)
        size = forward_batch_size(batch_size, x)
        with keyed_generators(stream_key("predict", self.arch.spec_id)):
            z = torch.cat([module(b) for b in x.split(size)])
        offset = self.offset(personal)
        return z if offset is None else z + offset.to(z.dtype)

    def predict(self, x: Tensor, personal: bool = False) -> Tensor:
        """Compute class probabilities, or predicted values for a regression.

        Args:
            x: Preprocessed examples, shape `[N, *input_shape]`.
            personal: Whether these are the client's own examples, see `logits`.

        Returns:
            Probabilities or values, shape `[N, outputs]`.
        """
        logits = self.logits(x, personal)
        if self.task.kind == "multilabel":
            return logits.sigmoid()
        return logits if self.task.kind == "regression" else logits.softmax(-1)

    def offset(self, personal: bool) -> Tensor | None:
        """Return the vector that is added to the logits, shape `[outputs]`.

        Args:
            personal: Whether the examples are the client's own examples.

        Returns:
            The vector, or None if nothing is added.
        """
        if personal:
            return None if self.log_prior is None else torch.tensor(self.log_prior)
        return None if self.correction is None else -torch.tensor(self.correction)


_ADAPTER = TypeAdapter(SavedModel)
