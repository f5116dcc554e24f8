"""A simulated GPU: computes on the CPU with the rules and transfers of a real one.

    with PretendGPU() as gpu:
        trainer.run_round()
    print(gpu.transfers)

Tensors created on "cuda" or moved there report that device, and operations on tensors of both
sides fail as on a GPU. Copies between the sides and waits for values are recorded with the line
that caused them. Values are those of the CPU: kernels, memory and speed are not simulated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import torch

# Imported early, because it inspects functions that are replaced here.
import torch._dynamo
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = f"{Path(__file__).parents[2] / 'hetero_fl'}/"
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
GETTERS = {
    Tensor.device.__get__: lambda device: device,
    Tensor.is_cuda.__get__: lambda device: device.type == "cuda",  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda device: device.type == "cpu",  # type: ignore[attr-defined]
}
WAITS = ("aten._local_scalar_dense", "aten.equal", "aten.nonzero", "aten.masked_select")
# Operations that accept no scalars from the other side.
JOINING = ("aten.cat", "aten.stack")
INDEXING = ("aten.index.", "aten.index_put", "aten._index_put", "aten._unsafe_index")


@dataclass(frozen=True)
class Transfer:
    """A copy between host and device, or a wait for the device.

    Attributes:
        kind: "to device", "to host" or "wait".
        where: File, line and function of this package that asked for it.
        nbytes: Bytes that were copied.
    """

    kind: str
    where: str
    nbytes: int


class _Placement:
    """The storages that are on the device."""

    def __init__(self) -> None:
        # A weak reference keeps the address from being used again.
        self._on_device: dict[int, StorageWeakRef] = {}

    def device_of(self, tensor: Tensor) -> torch.device:
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        return CUDA if tensor.untyped_storage()._cdata in self._on_device else CPU

    def put(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._on_device[storage._cdata] = StorageWeakRef(storage)
        if len(self._on_device) % 4096 == 0:
            self._on_device = {k: r for k, r in self._on_device.items() if not r.expired()}


class PretendGPU:
    """A context in which torch finds one GPU.

    Attributes:
        transfers: Transfers between host and device so far.
    """

    def __init__(self) -> None:
        self.transfers: list[Transfer] = []
        self.placement = _Placement()
        # Whether an explicit copy is in progress.
        self.is_moving = False
        # The default device of new tensors.
        self.factory = CPU
        # The generator of the device.
        self.generators: dict[int, torch.Generator] = {}
        self._stack = ExitStack()

    def __enter__(self) -> PretendGPU:
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_name": lambda device=None: "pretended GPU",
            "get_rng_state": lambda device="cuda": torch.get_rng_state(),
            "set_rng_state": lambda state, device="cuda": None,
            "manual_seed": lambda seed: None,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "mem_get_info": lambda device=None: (2**33, 2**34),
            "is_current_stream_capturing": lambda: False,
            "device": lambda device: nullcontext(),
        }.items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, value))
        self._stack.enter_context(
            mock.patch.object(
                torch.accelerator,
                "current_stream",
                lambda device=None: mock.Mock(is_capturing=lambda: False),
            )
        )
        make_generator = torch.Generator

        def generator(device: str | torch.device = "cpu") -> torch.Generator:
            result = make_generator()
            if torch.device(device).type == "cuda":
                self.generators[result._cdata] = result
            return result

        self._stack.enter_context(mock.patch.object(torch, "Generator", generator))
        self._stack.enter_context(_Kernels(self))
        self._stack.enter_context(_Calls(self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def note(self, kind: str, nbytes: int = 0) -> None:
        """Record a transfer."""
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back  # type: ignore[assignment]
        where = "outside the package"
        if frame is not None:
            path = frame.f_code.co_filename.removeprefix(PACKAGE)
            where = f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
        self.transfers.append(Transfer(kind, where, nbytes))

    @contextmanager
    def moving(self, target: torch.device) -> Iterator[None]:
        """Let one operation use tensors of both sides."""
        factory, self.factory, self.is_moving = self.factory, target, True
        try:
            yield
        finally:
            self.factory, self.is_moving = factory, False


class _Calls(TorchFunctionMode):
    """A mode that handles Python calls: devices by name and moves between them."""

    def __init__(self, gpu: PretendGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        gpu = self.gpu
        if function in GETTERS:
            return GETTERS[function](gpu.placement.device_of(args[0]))
        if function in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._move(function, args, named)
        if named.get("device") is None:
            return self._call_without_device(function, args, named)
        return self._call_with_device(function, args, named)

    def _call_without_device(
        self, function: Any, args: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        gpu = self.gpu
        if function in (Tensor.numpy, Tensor.__array__) and self._is_on_device(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if function is Tensor.tolist and self._is_on_device(args[0]):
            gpu.note("wait", args[0].nbytes)
            return function(*args, **named)
        if function is Tensor.new_tensor:
            result = function(*args, **named)
            if self._is_on_device(args[0]):
                gpu.placement.put(result)
            return result
        return self._call(function, args, named)

    def _call_with_device(self, function: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        gpu = self.gpu
        if function is torch.as_tensor and _is_tensor(args[0]):
            return self._move(Tensor.to, (args[0],), named)
        if function in (torch.tensor, torch.as_tensor) and not _is_tensor(args[0]):
            target = torch.device(named.pop("device"))
            result = function(*args, **named)
            if target.type == "cuda":
                gpu.placement.put(result)
            return result
        target = torch.device(named["device"])
        named["device"] = CPU
        factory, gpu.factory = gpu.factory, CUDA if target.type == "cuda" else CPU
        try:
            with gpu.moving(gpu.factory) if any(map(_is_tensor, args)) else nullcontext():
                return function(*args, **named)
        finally:
            gpu.factory = factory

    def _call(self, function: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call a function and place its new tensors with its operands."""
        gpu = self.gpu
        operands = _tensors(args, named)
        if gpu.is_moving or not any(map(self._is_on_device, operands)):
            return function(*args, **named)
        factory, gpu.factory = gpu.factory, CUDA
        try:
            return function(*args, **named)
        finally:
            gpu.factory = factory

    def _is_on_device(self, tensor: Tensor) -> bool:
        return self.gpu.placement.device_of(tensor).type == "cuda"

    def _move(self, function: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        source, *rest = args
        here = self.gpu.placement.device_of(source)
        if function is Tensor.to:
            requests, dtype = self._parse_to(here, rest, named)
        else:
            requests, dtype = (CPU if function is Tensor.cpu else CUDA), None
        target = CUDA if requests.type == "cuda" else CPU
        copy = bool(named.get("copy")) or target != here
        layout = named.get("memory_format", torch.preserve_format)
        if target == here:
            return Tensor.to(source, dtype or source.dtype, copy=copy, memory_format=layout)
        self.gpu.note(f"to {'device' if target.type == 'cuda' else 'host'}", source.nbytes)
        with self.gpu.moving(target):
            return Tensor.to(source, dtype or source.dtype, copy=copy, memory_format=layout)

    def _parse_to(
        self, here: torch.device, rest: list[Any], named: Mapping[str, Any]
    ) -> tuple[torch.device, torch.dtype | None]:
        """Return the device and dtype passed to `Tensor.to`."""
        device, dtype = named.get("device"), named.get("dtype")
        other = rest[0] if rest else named.get("other")
        if isinstance(other, Tensor):
            device, dtype = self.gpu.placement.device_of(other), other.dtype
        elif isinstance(other, torch.dtype):
            dtype = other
        elif other is not None:
            device = other
            dtype = rest[1] if len(rest) > 1 else dtype
        return torch.device(device) if device is not None else here, dtype


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the values of nested tuples, lists and dictionaries, as pytree does more slowly."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif type(value) is dict:
        yield from _leaves(list(value.values()))
    else:
        yield value


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(values) if _is_tensor(leaf)]


class _Kernels(TorchDispatchMode):
    """A mode that places results with their operands, which must be on one side."""

    def __init__(self, gpu: PretendGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        gpu = self.gpu
        place = gpu.placement.device_of
        operands = _tensors(args, kwargs or {})
        devices = [place(t) for t in operands]
        on_device = any(d.type == "cuda" for d in devices)
        name = str(function)
        if name.startswith("aten.copy_") and devices[0] != devices[1]:
            if not gpu.is_moving:
                gpu.note(
                    f"to {'device' if devices[0].type == 'cuda' else 'host'}", operands[1].nbytes
                )
        elif on_device and not gpu.is_moving:
            self._check_operands(name, operands)
            if name.startswith(WAITS):
                gpu.note("wait", operands[0].itemsize)
            if name.startswith(INDEXING):
                self._check_indexing(name, args)
        if (on_device and not gpu.is_moving) or gpu.factory.type == "cuda":
            self._check_generators(name, _leaves((args, kwargs or {})))
        result = function(*args, **dict(kwargs or {}))
        target = gpu.factory
        if operands and not gpu.is_moving:
            target = CUDA if on_device else gpu.factory
        if target.type == "cuda":
            self._put_new_tensors(result, operands)
        return result

    def _put_new_tensors(self, result: Any, operands: list[Tensor]) -> None:
        known = {t.untyped_storage()._cdata for t in operands}
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in known:
                self.gpu.placement.put(tensor)

    def _check_operands(self, name: str, operands: list[Tensor]) -> None:
        for tensor in operands:
            if self.gpu.placement.device_of(tensor).type != "cpu":
                continue
            is_operand = tensor.ndim or name.startswith(JOINING)
            if is_operand and not name.startswith(INDEXING):
                raise RuntimeError(
                    f"{name}: Expected all tensors to be on the same device, but found at "
                    f"least two devices, cuda:0 and cpu! {tuple(tensor.shape)}"
                )
            if tensor.ndim and name.startswith(INDEXING):
                self.gpu.note("to device", tensor.nbytes)

    def _check_generators(self, name: str, values: Iterator[Any]) -> None:
        for value in values:
            if isinstance(value, torch._C.Generator) and value._cdata not in self.gpu.generators:
                raise RuntimeError(
                    f"{name}: Expected a 'cuda' device type for generator but found 'cpu'"
                )

    def _check_indexing(self, name: str, args: tuple[Any, ...]) -> None:
        """Raise RuntimeError for indices and values that a GPU would refuse."""
        place = self.gpu.placement.device_of
        base = place(args[0])
        indices = _tensors(args[1])
        if base.type == "cpu" and any(place(t) != base for t in indices):
            raise RuntimeError(
                f"{name}: indices should be either on cpu or on the same device as the indexed "
                "tensor (cpu)"
            )
        if "put" in name and _is_tensor(args[2]) and args[2].ndim and place(args[2]) != base:
            raise RuntimeError(f"{name}: expected self and source to be on the same device")
