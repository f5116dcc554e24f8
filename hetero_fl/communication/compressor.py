"""Compression of payloads in one direction: a payload becomes a payload of fewer bytes.

Several tensors of an item are compressed together as one vector, by the stages of a chain (see
`compression`). In the compressed payload, the item contains the results of the stages, with names
such as "0/values" for the first vector. Model parameters are compressed as the difference from a
reference that both the sender and the receiver have. Without a reference, an empty tensor with the
name "shape/NAME", or "plain/NAME" if it is not compressed, describes each tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hetero_fl.communication.compression import (
    SORTS,
    Draw,
    Layout,
    Quantize,
    Sort,
    Stage,
    num_values,
    split_vector,
    take,
)
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.payload import Item, ItemSpec, Payload, PayloadError
from hetero_fl.utils.seeding import Key, keyed_generator

# Data types of items that are compressed.
DTYPES = {torch.float32, torch.float64}
# Maximum number of values of a tensor that a message describes.
MAX_VALUES = 1 << 30
# Name of the entry in the sender's private state with the values that have not been sent yet.
UNSENT = "unsent"


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of an item that a chain of stages compresses as one vector.

    Attributes:
        names: Names of the tensors, in the order of concatenation.
        layout: Shapes of the tensors.
        steps: The stages that change the vector, each with the layout of the vector before it.
        is_biased: Whether the sender must store the values that are not sent.
    """

    names: Sequence[str]
    layout: Layout
    steps: Sequence[tuple[Stage, Layout]]
    is_biased: bool

    @classmethod
    def from_item(cls, stages: Sequence[Stage], names: Sequence[str], item: Item) -> TensorGroup:
        """Create the group of the tensors of an item with the given names.

        Args:
            stages: The stages of the chain. Those that do not change the vector are left out.
            names: Names of the tensors.
            item: The item, of which only the shapes are used.
        """
        layout = tuple(tuple(item.tensors[name].shape) for name in names)
        steps = []
        reduced = layout
        for stage in stages:
            if stage.compresses(reduced):
                steps.append((stage, reduced))
                reduced = stage.reduced_layout(reduced)
        return cls(names, layout, steps, any(stage.biased for stage in stages))

    def split(self, vector: Tensor) -> Tensors:
        """Return the tensors that are concatenated in a vector, keyed by name."""
        return dict(zip(self.names, split_vector(vector, self.layout), strict=True))

    def compress(self, tensors: Tensors, unsent: Tensors, draw: Draw) -> tuple[Tensors, Tensors]:
        """Compress the tensors of this group.

        Args:
            tensors: The tensors of the item, keyed by name.
            unsent: Values that earlier messages omitted, keyed by tensor name.
            draw: Function that returns a random generator for a label.

        Returns:
            The results of the stages, and the values that a biased chain omits, keyed by tensor
            name. The omitted values are exactly `update + unsent - decompressed`.
        """
        parts = []
        for name in self.names:
            part = tensors[name]
            if self.is_biased and name in unsent and unsent[name].shape == part.shape:
                part = part + unsent[name]
            parts.append(part.reshape(-1))
        vector = torch.cat(parts)
        compressed = {"values": vector}
        for stage, layout in self.steps:
            compressed |= stage.compress(compressed["values"], layout, draw)
        if not self.is_biased:
            return compressed, {}
        sent = self.decompress(dict(compressed), vector.dtype, draw)
        return compressed, self.split(vector - sent)

    def decompress(self, tensors: Tensors, dtype: torch.dtype, draw: Draw) -> Tensor:
        """Return the vector in which the tensors of this group are concatenated.

        Args:
            tensors: Received results of the stages, which may be untrusted. They are removed.
            dtype: Data type of the vector.
            draw: Function that returns a random generator for a label.

        Raises:
            PayloadError: If the results are malformed.
        """
        for stage, layout in reversed(self.steps):
            tensors["values"] = stage.decompress(tensors, layout, dtype, draw)
        return take(tensors, "values", dtype, num_values(self.layout))


class Compressor:
    """Compresses and decompresses the payloads in one direction, either broadcasts or uploads.

    Args:
        stages: The configured stages.
        specs: Declarations of items, keyed by name. Broadcasts may contain items without a
            declaration.
        outputs: Number of outputs of the task, which is the number of columns of predictions.
    """

    def __init__(
        self, stages: Sequence[Stage], specs: Mapping[str, ItemSpec], outputs: int
    ) -> None:
        self._specs = specs
        self._outputs = outputs
        self._stages = {sort: _stages_for(stages, sort) for sort in (*SORTS, None)}

    def compress(
        self,
        payload: Payload,
        key: tuple[Key, ...],
        plain: frozenset[str] = frozenset(),
        reference: Payload | None = None,
        memory: dict[str, Any] | None = None,
    ) -> Payload:
        """Compress a payload.

        Args:
            payload: The payload.
            key: Values that seed the random generators. The receiver must use the same values.
            plain: Names of tensors that are not compressed, such as BatchNorm statistics.
            reference: A payload that the sender and the receiver have. Models are compressed as the
                difference from the models in the reference. If None, whole models are compressed,
                and the names and shapes of tensors are part of the compressed payload.
            memory: Private state of the sender. The values that biased chains omit are stored under
                the key `UNSENT` and added to the next message. If None, these values are lost.
        """
        compressed = Payload(report=payload.report)
        memory = {} if memory is None else memory
        for name, item in payload.items_by_name.items():
            references = _references(name, item, plain, reference)
            groups = self._groups(name, item, plain, references)
            if not groups:
                compressed.items_by_name[name] = item
                continue
            tensors = {n: tensor.detach().cpu() for n, tensor in item.tensors.items()}
            tensors |= {n: tensors[n] - known for n, known in references.items()}
            results = _empty_tensors(item, plain) if reference is None else {}
            for place, group in enumerate(groups):
                earlier = memory.get(UNSENT, {}).get(name, {})
                draw = partial(keyed_generator, *key, name, place)
                parts, unsent = group.compress(tensors, earlier, draw)
                results |= {f"{place}/{part}": tensor for part, tensor in parts.items()}
                if unsent:
                    memory[UNSENT] = {**memory.get(UNSENT, {}), name: {**earlier, **unsent}}
            compressed.items_by_name[name] = Item(results, item.weight, item.kind)
        return compressed

    def decompress(
        self,
        payload: Payload,
        key: tuple[Key, ...],
        plain: frozenset[str] = frozenset(),
        reference: Payload | None = None,
        like: Mapping[str, Item] | None = None,
    ) -> Payload:
        """Decompress a payload that was compressed by `compress`.

        The payload may be untrusted. It contains at least one bit per decompressed value, except
        for the values that sparse stages and `top_classes` omit, which bounds the memory.

        Args:
            payload: The compressed payload.
            key: The values that were passed to `compress` as `key`.
            plain: The names that were passed to `compress` as `plain`.
            reference: The payload that was passed to `compress` as `reference`.
            like: Items with the expected names, shapes and dtypes, keyed by name. If None, the
                names and shapes in the compressed payload are used.

        Raises:
            PayloadError: If the payload is malformed, or contains a value that is too large,
                infinite or NaN.
        """
        items: dict[str, Any] = {}
        for name, item in payload.items_by_name.items():
            try:
                form = Item({}) if like is None else like.get(name, Item({}))
                if like is None:
                    form, plain = _described_item(item)
                references = _references(name, form, plain, reference)
                groups = self._groups(name, form, plain, references)
                draw = partial(keyed_generator, *key, name)
                values = item.values
                if groups:
                    tensors = _decompress_groups(item, form, groups, draw)
                    tensors |= {n: tensors[n] + known for n, known in references.items()}
                    values = form.with_tensors({n: tensors[n] for n in form.tensors}).values
            except PayloadError as error:
                raise PayloadError(f"item {name[:60]!r}: {error}") from None
            items[name] = {"values": values, "weight": item.weight, "kind": item.kind}
        return Payload.from_untrusted({"items": items, "report": payload.report})

    def _groups(
        self, name: str, item: Item, plain: frozenset[str], references: Tensors
    ) -> list[TensorGroup]:
        """Divide the tensors of an item into groups, each of which is compressed as one vector.

        The result does not depend on values. The sender and the receiver therefore obtain the same
        result.

        Args:
            name: Name of the item.
            item: The item.
            plain: Names of tensors that are not compressed.
            references: Tensors from which differences are compressed, keyed by name.

        Returns:
            The groups, or an empty list if the item is not compressed.
        """
        spec = self._specs.get(name, ItemSpec(item.kind))
        dtypes = {tensor.dtype for tensor in item.tensors.values()}
        if spec.ranks or len(dtypes) != 1 or dtypes.isdisjoint(DTYPES):
            return []
        names_by_sort: dict[Sort | None, list[str]] = {}
        for tensor_name, tensor in sorted(item.tensors.items()):
            is_change = tensor_name in references or spec.kind == "update"
            sort = None if tensor_name in plain else self._sort(spec, tensor, is_change)
            names_by_sort.setdefault(sort, []).append(tensor_name)
        groups = []
        unchanged: list[str] = []
        for sort, names in names_by_sort.items():
            group = TensorGroup.from_item(self._stages[sort], names, item)
            if group.steps:
                groups.append(group)
            else:
                unchanged += names
        if groups and unchanged:
            groups.append(TensorGroup.from_item((), unchanged, item))
        return groups

    def _sort(self, spec: ItemSpec, tensor: Tensor, is_change: bool) -> Sort | None:
        """Return the meaning of the numbers of a tensor, or None if it is not compressed."""
        sorts = value_kinds(spec)
        if not sorts or not tensor.numel():
            return None
        if "change" in sorts:
            return "change" if is_change else "whole"
        if tensor.ndim < 2:
            return None
        is_prediction = "predictions" in sorts and tensor.shape[1:] == (self._outputs,)
        return "predictions" if is_prediction else "rows"


def _stages_for(stages: Sequence[Stage], sort: Sort | None) -> list[Stage]:
    """Return the stages that apply to numbers of one meaning, in order of application."""
    chain = [stage for stage in stages if sort in stage.sorts]
    if any(stage.biased for stage in chain) and isinstance(chain[-1], Quantize):
        chain[-1] = replace(chain[-1], nearest=True)
    return chain


def value_kinds(spec: ItemSpec) -> set[Sort]:
    """Return the possible meanings of the numbers of an item (see `compression.Sort`).

    The result is empty if the item is never compressed.
    """
    if spec.ranks or spec.kind == "counts":
        return set()
    if spec.kind in ("params", "update"):
        return {"change", "whole"}
    return (
        {"rows", "predictions"} if spec.kind == "rows" and spec.share == "predictions" else {"rows"}
    )


def _references(name: str, item: Item, plain: frozenset[str], reference: Payload | None) -> Tensors:
    """Return the tensors from which differences of an item's tensors are compressed."""
    if reference is None or item.kind != "params" or name not in reference:
        return {}
    known = reference.item(name).tensors
    return {
        tensor_name: known[tensor_name]
        for tensor_name, tensor in item.tensors.items()
        if tensor_name in known
        and tensor_name not in plain
        and tensor.shape == known[tensor_name].shape
        and tensor.dtype == known[tensor_name].dtype
    }


def _decompress_groups(
    item: Item, form: Item, groups: Sequence[TensorGroup], draw: Callable[..., torch.Generator]
) -> Tensors:
    """Decompress the tensors of an item.

    Args:
        item: The compressed item.
        form: Item with the names, shapes and dtypes of the uncompressed tensors.
        groups: Groups of the uncompressed tensors.
        draw: Function that returns a random generator for the place of a group and a label.

    Raises:
        PayloadError: If the compressed item is malformed.
    """
    dtype = next(iter(form.tensors.values())).dtype
    remaining = {n: t for n, t in item.tensors.items() if not n.startswith(("shape/", "plain/"))}
    tensors: Tensors = {}
    for place, group in enumerate(groups):
        prefix = f"{place}/"
        names = [name for name in remaining if name.startswith(prefix)]
        parts = {name.removeprefix(prefix): remaining.pop(name) for name in names}
        vector = group.decompress(parts, dtype, partial(draw, place))
        tensors |= group.split(vector)
        remaining |= parts
    if remaining:
        raise PayloadError(f"unexpected tensor {next(iter(remaining))[:60]!r}")
    return tensors


def _empty_tensors(item: Item, plain: frozenset[str]) -> Tensors:
    """Return an empty tensor for each tensor of an item, with the data type and the shape.

    Args:
        item: The item.
        plain: Names of tensors that are not compressed.
    """
    return {
        f"{'plain' if name in plain else 'shape'}/{name}": torch.empty(
            (0, *tensor.shape), dtype=tensor.dtype
        )
        for name, tensor in item.tensors.items()
    }


def _described_item(item: Item) -> tuple[Item, frozenset[str]]:
    """Return the uncompressed item that a compressed item describes.

    Returns:
        An item whose tensors have no memory, and the names of the tensors that are not compressed.

    Raises:
        PayloadError: If a tensor is too large.
    """
    tensors: Tensors = {}
    plain = set()
    for label, tensor in item.tensors.items():
        prefix, _, name = label.partition("/")
        if prefix in ("shape", "plain"):
            shape = tensor.shape[1:]
            if shape.numel() > MAX_VALUES:
                raise PayloadError(f"expected <= {MAX_VALUES:,} values, got {shape.numel():,}")
            tensors[name] = torch.empty(shape, dtype=tensor.dtype, device="meta")
            if prefix == "plain":
                plain.add(name)
    return Item(tensors[""] if set(tensors) == {""} else tensors, kind=item.kind), frozenset(plain)
