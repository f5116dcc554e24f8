"""Check the content of an installed wheel outside of a checkout.

Usage: `python check_wheel.py FILE.whl`.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import hetero_fl
import model_zoo
from hetero_fl.config.data import SourceConfig
from hetero_fl.data import load_source

WANTED = (
    "hetero_fl/py.typed",
    "model_zoo/py.typed",
    "hetero_fl/data/embedded/chest_xray.npz",
    "hetero_fl/data/embedded/digits.npz",
    "hetero_fl/data/embedded/LICENSE.md",
    "hetero_fl/reporting/templates/base.html",
    "hetero_fl/reporting/templates/comparison.html",
    "hetero_fl/reporting/templates/report.html",
)
UNWANTED = ("tests/", "scripts/", "configs/", "benchmarks/", "examples/")


def main(wheel: str) -> None:
    """Check the files of the wheel and load the embedded data set."""
    names = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in WANTED if name not in names]
    assert not missing, f"the wheel lacks {missing}"
    assert any(name.endswith("licenses/LICENSE") for name in names), "the wheel has no license"
    assert not [name for name in names if name.startswith(UNWANTED)], (
        "the wheel contains more than the packages"
    )

    for package in (hetero_fl, model_zoo):
        assert "site-packages" in str(package.__file__), (
            f"{package.__file__} is not the installed package"
        )
    data = load_source(SourceConfig(name="chest_xray"), Path("nowhere"))
    rows = {name: len(examples) for name, examples in data.splits().items()}
    assert rows == {"train": 2000, "validation": 200, "test": 624}, rows
    print(f"{Path(wheel).name}: {len(names)} files, chest X-rays {rows}")


if __name__ == "__main__":
    main(sys.argv[1])
