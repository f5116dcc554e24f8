"""Federated learning with heterogeneous models.

`hetero_fl.run` trains a federation that a configuration file or a dictionary describes, and
`hetero_fl.compare` compares methods on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hetero_fl.utils.version import __version__ as __version__

if TYPE_CHECKING:
    from hetero_fl.experiment import audit, compare, evaluate, export, join, prepare, run
    from hetero_fl.experiment.preparation import load_config
    from hetero_fl.reporting.run import Run

__all__ = ["Run", "audit", "compare", "evaluate", "export", "join", "load_config", "prepare", "run"]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    # Public names are imported on first use, so that `import hetero_fl` is fast.
    if name == "load_config":
        from hetero_fl.experiment.preparation import load_config

        return load_config
    if name == "Run":
        from hetero_fl.reporting.run import Run

        return Run
    if name in __all__:
        import hetero_fl.experiment

        return getattr(hetero_fl.experiment, name)
    raise AttributeError(f"module 'hetero_fl' has no attribute {name!r}")
