"""The hardware and software environment of a run: versions, processor, threads and device."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from hetero_fl.utils.errors import UserError

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scikit-learn",
    "pydantic",
    "safetensors",
)


def describe_environment(choice: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the environment: the properties that are needed to reproduce a run.

    Args:
        choice: Device, threads and executor of the run (`hetero_fl.federation.executors.choose`).
    """
    device = torch.device(choice["device"])
    is_cuda = device.type == "cuda"
    return {
        "hetero_fl": package_version("hetero_fl"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": choice["threads"],
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if is_cuda else str(device),
        "choice": dict(choice),
        "packages": {name: package_version(name) for name in PACKAGES},
    }


def package_version(package: str) -> str | None:
    """Return the version of a package, or None if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor_name() -> str:
    """Return the name of the processor, or the architecture if the name is unknown."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")),
                platform.machine(),
            )
    except OSError:
        return platform.processor() or platform.machine()


def choose_device(name: str) -> torch.device:
    """Return the device for a value of `runtime.device`.

    The value `auto` selects a CUDA device if one is available, otherwise the CPU.

    Raises:
        UserError: If the device does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"runtime.device: unknown device '{name}'; choose from auto, cpu, cuda, cuda:0, mps"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"runtime.device: '{name}' is not available; the number of CUDA devices is "
            f"{torch.cuda.device_count()}, use cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("runtime.device: 'mps' is not available; use cpu")
    return device


def use_deterministic_algorithms(device: torch.device, enabled: bool) -> None:
    """Enable or disable deterministic algorithms on a GPU.

    For other devices, this function has no effect, because algorithms on the CPU are always
    deterministic.

    Args:
        device: Device of the run.
        enabled: Whether operations must be deterministic. Operations without a deterministic
            algorithm then raise `RuntimeError`.
    """
    if device.type != "cuda":
        return
    if enabled:
        # cuBLAS reads the variable when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)


_one_core = False


def use_one_core() -> None:
    """Limit `available_cores` to 1 in this process.

    Worker processes call this function, because other workers use the other cores.
    """
    global _one_core  # noqa: PLW0603 (a property of the process, set once when a worker starts)
    _one_core = True


def available_cores() -> int:
    """Return the number of CPU cores that this process may use.

    The result is 1 after a call of `use_one_core`.
    """
    if _one_core:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_limit() -> int | None:
    """Return the value of OMP_NUM_THREADS, or None if the value is not a positive integer."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return int(limit) if limit.isdigit() and int(limit) > 0 else None
