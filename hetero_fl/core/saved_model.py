"""Models as files: safetensors with everything needed to use them again, and nothing that can run code."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hetero_fl.core.images import as_bytes, as_numbers, channels_first, in_range
from hetero_fl.core.model_spec import ModelSpec, Tensors, freeze_lists
from hetero_fl.core.task import Task
from hetero_fl.utils.code_permission import CodePermission, find_references
from hetero_fl.utils.errors import UserError

FORM = "hetero_fl model 1"


def read_model_file(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Return what a model file says of its model, and the tensors; runs no code. Raises UserError if it is none of ours."""
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["hetero_fl"])
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (it is no dictionary)
        if about["form"] != FORM:
            raise UserError(f"{path}: found {about['form']!r}, this release reads {FORM!r}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a saved model: {error}") from None
    return about, tensors


@dataclass(frozen=True)
class SavedModel:
    """A model of a finished run: tensors, what to build, how it sees examples, what its outputs mean.

    `preprocess` are the plain fields of `hetero_fl.data.Preprocess`; `log_prior` is added to the logits on the client's own
    examples where the method trained with logit adjustment. `columns` name what lies along the last axis of raw examples,
    where that has names: tables are matched by them. `categories` are the text columns, with their values, that some of
    these encode.
    """

    tensors: Tensors
    arch: ModelSpec
    preprocess: dict[str, Any]
    task: Task
    log_prior: tuple[float, ...] | None = None
    columns: tuple[str, ...] = ()
    categories: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __repr__(self) -> str:
        values = sum(tensor.numel() for tensor in self.tensors.values())
        return (
            f"SavedModel({self.arch.name!r}: {self.task.kind} with {self.arch.outputs} outputs, input "
            f"{list(self.arch.input_shape)}, {values:,} values in {len(self.tensors)} tensors)"
        )

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of the model's file, as plain values of JSON."""
        about = {
            "form": FORM,
            "architecture": asdict(self.arch),
            "preprocess": self.preprocess,
            "task": {name: value for name, value in asdict(self.task).items() if value != ""},
            "log_prior": self.log_prior,
            **({"columns": self.columns} if self.columns else {}),
            **({"categories": self.categories} if self.categories else {}),
        }
        described: dict[str, Any] = json.loads(json.dumps(about))
        return described

    def encode(self) -> bytes:
        """The content of a `.safetensors` file; equal models give equal bytes."""
        tensors = {n: t.detach().cpu().contiguous() for n, t in self.tensors.items()}
        return save(tensors, {"hetero_fl": json.dumps(self.metadata(), sort_keys=True)})

    @classmethod
    def load(cls, path: Path, allow_code: bool | CodePermission = False) -> SavedModel:
        """Read a file.

        Raises UserError if it is none of ours, or if its model is a user's own class and `allow_code` does not permit that.
        """
        try:
            about, tensors = read_model_file(path)
            CodePermission.from_argument(allow_code).check(find_references(about), str(path))
            named = about["task"]
            task = Task(
                named["kind"],
                named["outputs"],
                tuple(named["names"]),
                named.get("unit", ""),
                named.get("rare"),
            )
            view = {k: freeze_lists(v) for k, v in about["preprocess"].items()}
            prior = about["log_prior"]
            arch = ModelSpec.from_json(json.dumps(about["architecture"]))
            named_columns = tuple(about.get("columns", ()))  # older files have none
            categories = tuple(
                (column, tuple(values)) for column, values in about.get("categories", ())
            )
            return cls(
                tensors,
                arch,
                view,
                task,
                None if prior is None else tuple(prior),
                named_columns,
                categories,
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a saved model: {error}") from None

    def module(self) -> torch.nn.Module:
        """The model itself, ready for evaluation."""
        with torch.random.fork_rng(devices=[]):
            module = self.arch.build()
        counters = {
            n: t
            for n, t in module.state_dict().items()
            if n not in self.tensors and not t.is_floating_point()
        }
        module.load_state_dict({**counters, **self.tensors})
        return module.eval()

    @torch.no_grad()
    def logits(self, x: Tensor, personal: bool = False, batch_size: int = 500) -> Tensor:
        """Logits `[N, outputs]` of preprocessed examples; `personal`: as the client reads its own."""
        module = self.module()
        z = torch.cat([module(b).logits for b in x.split(batch_size)])
        return (
            z + torch.tensor(self.log_prior, dtype=z.dtype)
            if personal and self.log_prior is not None
            else z
        )

    def examples(self, x: Any) -> Tensor:
        """Raw examples as users have them, checked to be such as this model was trained on, before preprocessing.

        Args:
            x: images `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` as uint8, or as floats in 0..1 or 0..255; tables
                `[N, F]`; series `[N, T, F]`; tokens `[N, T]` as `Vocabulary.encode` makes them. Of a model that sees
                some columns or blocks see `hetero_fl.data.inference`.

        Raises:
            UserError: no numbers, another shape than expected, a range that could mean two things, NaN or infinity.
        """
        if self.arch.vocabulary is not None:
            return self._tokens(x, self.arch.vocabulary)
        raw = as_numbers(x, "predict: x")
        where = "predict: x"
        image = len(self.arch.input_shape) == 3
        if image and raw.ndim in (3, 4) and 0 not in raw.shape:
            raw = as_bytes(raw, where)
            raw = raw[:, None] if raw.ndim == 3 else self._channels_first(raw, where)
        if not self._accepts_shape(tuple(raw.shape[1:])) or raw.ndim < 2:
            raise UserError(
                f"{where}: found shape {tuple(np.shape(x))}; this model takes {self._expected_shapes()}"
            )
        raw = raw if raw.dtype == torch.uint8 and image else raw.to(torch.get_default_dtype())
        if raw.is_floating_point() and not bool(torch.isfinite(raw).all()):
            row = int((~torch.isfinite(raw)).flatten(1).any(1).to(torch.uint8).argmax())
            raise UserError(f"{where}: NaN or infinity in row {row}")
        return in_range({where: raw})[0][where] if image else raw

    def _tokens(self, x: Any, vocabulary: int) -> Tensor:
        raw = torch.as_tensor(x)
        where = "predict: x"
        if raw.is_floating_point() or tuple(raw.shape[1:]) != self.arch.input_shape:
            found = f"{raw.dtype} of shape {tuple(raw.shape)}".removeprefix("torch.")
            raise UserError(
                f"{where}: found {found}; this model takes whole numbers {self._expected_shapes()}"
            )
        bad = ((raw < 0) | (raw >= vocabulary)).any(1)
        if bool(bad.any()):
            row = int(bad.to(torch.uint8).argmax())
            raise UserError(
                f"{where}: row {row} has a token out of range; they are 0 to {vocabulary - 1}"
            )
        return raw.long()

    def _channels_first(self, x: Tensor, where: str) -> Tensor:
        """Images with channels first: as the model takes them if it takes only one reading, else as the axes say."""
        last = x.movedim(-1, 1)
        fitting = [images for images in (x, last) if self._accepts_shape(tuple(images.shape[1:]))]
        return fitting[0].contiguous() if len(fitting) == 1 else channels_first(x, where)

    def _accepts_shape(self, shape: tuple[int, ...]) -> bool:
        """Whether examples of that shape, without the batch, become the model's input by its preprocessing."""
        seen = self.arch.input_shape
        if len(shape) != len(seen):
            return False
        resize = self.preprocess.get("resize")
        channels = self.preprocess.get("channels")
        if len(seen) != 3 or (resize is None and channels is None):
            return shape == (seen[::-1] if len(seen) == 2 else seen)
        colours = shape[0] == seen[0] or (channels is not None and (channels == 1 or shape[0] == 1))
        return colours and (resize is not None or shape[1:] == seen[1:])

    def _expected_shapes(self) -> str:
        """The shapes that fit, in words."""
        seen = self.arch.input_shape
        where = self.preprocess
        if len(seen) != 3:
            # a series lies in memory with its steps first
            return f"(N, {', '.join(map(str, reversed(seen)))})"
        channels, height, width = map(str, seen)
        if where.get("channels") is not None:
            channels = "C" if where["channels"] == 1 else f"1 or {channels}"
        if where.get("resize") is not None:
            height = "H"
            width = "W"
        return f"images (N, {channels}, {height}, {width}), uint8 or floats from 0 to 1"
