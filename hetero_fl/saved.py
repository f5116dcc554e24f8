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

from hetero_fl.architecture import Architecture, Tensors
from hetero_fl.errors import UserError
from hetero_fl.task import Task

FORM = "hetero_fl model 1"


@dataclass(frozen=True)
class SavedModel:
    """A model of a finished run: tensors, what to build, how it sees examples, what its outputs mean.

    `preprocess` are the plain fields of `hetero_fl.data.Preprocess`; `log_prior` is added to the logits on the client's own
    examples where the method trained with logit adjustment.
    """

    tensors: Tensors
    arch: Architecture
    preprocess: dict[str, Any]
    task: Task
    log_prior: tuple[float, ...] | None = None

    def encode(self) -> bytes:
        """The content of a `.safetensors` file; equal models give equal bytes."""
        about = {
            "form": FORM,
            "architecture": json.loads(self.arch.to_json()),
            "preprocess": self.preprocess,
            "task": asdict(self.task),
            "log_prior": self.log_prior,
        }
        tensors = {n: t.detach().cpu().contiguous() for n, t in self.tensors.items()}
        return save(tensors, {"hetero_fl": json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> SavedModel:
        """Read a file. Raises UserError if it is none of ours."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["hetero_fl"])
                tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (it is no dictionary)
            if about["form"] != FORM:
                raise UserError(f"{path}: found {about['form']!r}, this release reads {FORM!r}")
            task = Task(about["task"]["kind"], about["task"]["outputs"], tuple(about["task"]["names"]))
            view = {k: tuple(v) if isinstance(v, list) else v for k, v in about["preprocess"].items()}
            prior = about["log_prior"]
            arch = Architecture.from_json(json.dumps(about["architecture"]))
            return cls(tensors, arch, view, task, None if prior is None else tuple(prior))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a saved model: {error}") from None

    def module(self) -> torch.nn.Module:
        """The model itself, ready for evaluation."""
        with torch.random.fork_rng(devices=[]):
            module = self.arch.build()
        counters = {n: t for n, t in module.state_dict().items() if n not in self.tensors and not t.is_floating_point()}
        module.load_state_dict({**counters, **self.tensors})
        return module.eval()

    @torch.no_grad()
    def logits(self, x: Tensor, home: bool = False, batch_size: int = 500) -> Tensor:
        """Logits `[N, outputs]` of preprocessed examples; `home`: as the client reads its own."""
        module = self.module()
        z = torch.cat([module(b).logits for b in x.split(batch_size)])
        return z + torch.tensor(self.log_prior, dtype=z.dtype) if home and self.log_prior is not None else z


def as_examples(x: Any) -> Tensor:
    """Raw images as users have them, `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]`, as `[N, C, H, W]`; tables as they are."""
    tensor = x if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))
    if tensor.ndim == 3:
        return tensor[:, None]
    if tensor.ndim == 4 and tensor.shape[-1] in (1, 3) and tensor.shape[1] not in (1, 3):
        return tensor.permute(0, 3, 1, 2)
    return tensor
