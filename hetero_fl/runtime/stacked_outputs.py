"""Outputs of many models of one architecture in one computation, in evaluation mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import pad_sequence

from hetero_fl.plan import ClassSums, Predict
from hetero_fl.runtime.outputs import architecture_of, class_sums, readout, tensors_of
from hetero_fl.runtime.templates import Templates
from hetero_fl.state import Participant

Work = Sequence[tuple[Participant, Predict | ClassSums]]


@torch.no_grad()
def outputs_stacked(work: Work, templates: Templates) -> list[Any]:
    """Results of equal `Predict` or `ClassSums` steps, in order. Raises RuntimeError where the model cannot be batched."""
    columns = [step.data.columns(participant) for participant, step in work]
    outputs = _forward(work, [c["x"] for c in columns], templates)
    if isinstance(work[0][1], Predict):
        return outputs
    return [class_sums(v, c["y"], p.task.outputs) for v, c, (p, _) in zip(outputs, columns, work, strict=True)]


def _forward(work: Work, inputs: Sequence[Tensor], templates: Templates) -> list[Tensor]:
    """Each model's output `[N, …]` on its own rows; those who have fewer rows drop out earlier, the most rows first."""
    step, device = work[0][1], templates.device
    template = templates(architecture_of(*work[0]), "")
    module = template.module.eval()
    order = sorted(range(len(work)), key=lambda i: -len(inputs[i]))
    models = [tensors_of(*work[i]) for i in order]
    stacked = {
        n: torch.stack([m[n].detach() for m in models]).to(mine)
        for n, mine in template.tensors.items()
        if mine.is_floating_point()  # counters do not travel, and evaluation ignores them
    }

    def outputs(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return readout(step, functional_call(module, dict(tensors), (x,)))

    x, shared = [inputs[i] for i in order], all(i is inputs[0] for i in inputs)
    found: list[list[Tensor]] = [[] for _ in order]
    for begin in range(0, len(x[0]), step.batch_size):
        active = sum(len(rows) > begin for rows in x)
        parts = [rows[begin : begin + step.batch_size] for rows in (x[:1] if shared else x[:active])]
        # Rows that fill up a shorter batch are nought; in evaluation mode no row sees another.
        batch = parts[0] if shared else pad_sequence(parts, batch_first=True)
        tensors = {n: t[:active] for n, t in stacked.items()}
        out = vmap(outputs, (0, None if shared else 0), randomness="error")(tensors, batch.to(device)).cpu()
        for i in range(active):
            found[i].append(out[i, : len(x[i]) - begin])
    whole = [torch.cat(parts) for parts in found]
    back = {i: whole[place] for place, i in enumerate(order)}
    return [back[i] for i in range(len(work))]
