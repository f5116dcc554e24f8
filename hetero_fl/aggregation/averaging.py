"""Averaging named tensors over their owners: by architecture, and across architectures where a common part is declared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads, normalised, weighted_sum
from hetero_fl.architecture import Tensors

Owner = tuple[str, tuple[int, ...], str]  # (tensor name, shape, group or "" for common ones)


def average_by_owner(
    uploads: Uploads, name: str, common: Sequence[str] = (), weighted: bool = True
) -> dict[str, Tensors]:
    """For each architecture group the mean of what its members sent under `name`, weighted by the items' weights or plain.

    Tensors whose names start with a prefix in `common` are averaged with those of equal name and shape of every group;
    others only within their group: equal shapes never mix by accident. Groups and tensors that nobody sent are left out.
    """
    owners: dict[Owner, list[tuple[float, Tensor]]] = {}
    groups: dict[str, dict[str, Owner]] = {}
    for upload in uploads.having(name):
        item = upload.payload.item(name)
        weight = float(item.weight) if weighted else 1.0
        tensors: Mapping[str, Tensor] = item.values  # type: ignore[assignment]
        for n, tensor in tensors.items():
            owner = (n, tuple(tensor.shape), "" if common and n.startswith(tuple(common)) else upload.group)
            owners.setdefault(owner, []).append((weight, tensor))
            groups.setdefault(upload.group, {})[n] = owner
    means = {
        owner: weighted_sum([t for _, t in held], normalised([w for w, _ in held])) for owner, held in owners.items()
    }
    return {g: {n: means[owner] for n, owner in wanted.items()} for g, wanted in groups.items()}
