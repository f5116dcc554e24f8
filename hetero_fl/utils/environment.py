"""Where a run took place: versions, machine, threads, device. Kept beside its results."""

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
    """What to know when a figure is to be reproduced. `choice`: how the run is computed (hetero_fl.federation.executors.choose)."""
    device = torch.device(choice["device"])
    return {
        "hetero_fl": package_version("hetero_fl"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": choice["threads"],
        "device": f"{device} ({torch.cuda.get_device_name(device)})"
        if device.type == "cuda"
        else str(device),
        "choice": dict(choice),
        "packages": {name: package_version(name) for name in PACKAGES},
    }


def package_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")),
                platform.machine(),
            )
    except OSError:
        return platform.processor() or platform.machine()


def choose_device(name: str) -> torch.device:
    """The device of the configuration; `auto` is the first GPU if there is one. Raises UserError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"runtime.device: found '{name}'; choose from auto, cpu, cuda, cuda:0, mps"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"runtime.device: found '{name}', but torch finds {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("runtime.device: found 'mps', but it is not available here; use cpu")
    return device


_one_core = False


def use_deterministic_algorithms(device: torch.device, enabled: bool) -> None:
    """Let this process compute the same bits on a GPU in every run, or not; on a CPU it does anyway.

    While it is enabled, an operation without a deterministic algorithm raises RuntimeError.
    """
    if device.type != "cuda":
        return
    if enabled:
        # cuBLAS reads it when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)


def use_one_core() -> None:
    """Others like this process run beside it on the other cores: it shall count on one, whatever there are."""
    global _one_core
    _one_core = True


def available_cores() -> int:
    """Those that this process may use."""
    if _one_core:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_limit() -> int | None:
    """What OMP_NUM_THREADS says, if it does."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return int(limit) if limit.isdigit() and int(limit) > 0 else None
