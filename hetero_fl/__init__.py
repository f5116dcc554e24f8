"""Federated learning with heterogeneous models.

`Federation` trains clients with their own models and data; `run` and `compare` do the same for a
configuration file.
"""

from importlib import import_module
from typing import Any


def _read_stub() -> dict[str, tuple[str, str]]:
    """Return the module and the name in it of each public name, as listed in `__init__.pyi`.

    The lines of the stub, which type checkers read too, are `from MODULE import NAME as NAME`, and
    `PUBLIC_NAME = NAME` for imported classes with another public name.
    """
    import ast
    from pathlib import Path

    found: dict[str, tuple[str, str]] = {}
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name: (str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Assign):
            name, original = ast.unparse(node).split(" = ")
            found[name] = found.pop(original)
    return found


# Public names are imported on first use, so that `import hetero_fl` is fast.
_LOCATIONS = _read_stub()
__all__ = [name for name in _LOCATIONS if name != "__version__"]


def __dir__() -> list[str]:
    return sorted(_LOCATIONS)


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module 'hetero_fl' has no attribute {name!r}")
    module, original = _LOCATIONS[name]
    return getattr(import_module(module), original)
