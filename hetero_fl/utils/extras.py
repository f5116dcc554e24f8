"""Optional packages, and the extras of hetero_fl that install them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from hetero_fl.utils.errors import UserError

# The extra that installs each optional package, keyed by the name under which it is imported.
EXTRAS = {
    "pandas": "tables",
    "scipy": "tables",
    "pyarrow": "tables",
    "pydicom": "dicom",
    "medmnist": "datasets",
    "datasets": "datasets",
    "transformers": "datasets",
    "tensorboard": "loggers",
    "wandb": "loggers",
    "optuna": "tables",
    "ray": "ray",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "opacus": "privacy",
    "tenseal": "he",
    "flwr": "flower",
}


def check_extra(extra: str, packages: Iterable[str], where: str) -> None:
    """Check that the packages of an extra are installed, without importing them.

    Args:
        extra: Name of the extra that installs the packages.
        packages: Names of the packages.
        where: The feature or the configuration key that needs the packages.

    Raises:
        UserError: If a package is not installed.

    Example:
        >>> from hetero_fl.utils.extras import check_extra
        >>> check_extra("tables", ["pandas"], "data.name: table")
    """
    for package in packages:
        if find_spec(package) is None:
            raise UserError(
                f"{where} needs {package}, which is not installed; "
                f"run pip install 'hetero_fl[{extra}]'"
            )


def describe_missing_package(error: ModuleNotFoundError) -> str | None:
    """Describe how to install the optional package that an import did not find.

    Returns:
        One line, or None if the missing module does not belong to an extra.

    Example:
        >>> from hetero_fl.utils.extras import describe_missing_package
        >>> describe_missing_package(ModuleNotFoundError(name="pandas"))
        "pandas is not installed; run pip install 'hetero_fl[tables]'"
    """
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"{package} is not installed; run pip install 'hetero_fl[{EXTRAS[package]}]'"
