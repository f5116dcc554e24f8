"""The wheel and the source distribution: their content, and a run of the installed wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from hetero_fl import __version__

ROOT = Path(__file__).parents[2]
PACKAGES = ("hetero_fl", "model_zoo")
FILES = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "CITATION.cff")
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a `wheel` or an `sdist` without a package index, and return its path."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(out)]
    ended = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return out / ended.stdout.splitlines()[-1]


def files_of_wheel(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the checkout, tests and benchmarks included, because building writes into it."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "configs", "examples", "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "*.csv", "*.png")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_wheel_contains_exactly_the_packages(source: Path, wheel: Path) -> None:
    expected = {
        path.relative_to(source).as_posix()
        for name in PACKAGES
        for path in (source / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }

    content = {n for n in files_of_wheel(wheel) if ".dist-info/" not in n}

    assert content == expected
    for name in (
        "hetero_fl/py.typed",
        "model_zoo/py.typed",
        "hetero_fl/data/embedded/digits.npz",
        "hetero_fl/reporting/templates/report.html",
    ):
        assert name in content


@pytest.mark.slow
def test_metadata_of_the_wheel(wheel: Path) -> None:
    info = f"hetero_fl-{__version__}.dist-info"
    archive = zipfile.ZipFile(wheel)
    metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode("utf-8"))

    assert wheel.name == f"hetero_fl-{__version__}-py3-none-any.whl"
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert f"{info}/licenses/hetero_fl/data/embedded/LICENSE.md" in archive.namelist()
    assert b"hetero-fl = hetero_fl.cli:main" in archive.read(f"{info}/entry_points.txt")
    core = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in core if line.startswith(("pandas", "scipy"))]


@pytest.mark.slow
def test_source_distribution_builds_the_same_wheel(
    source: Path, wheel: Path, tmp_path: Path
) -> None:
    sdist = build("sdist", source, tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")

    again = build("wheel", tmp_path / "unpacked" / f"hetero_fl-{__version__}", tmp_path)

    assert files_of_wheel(again) == files_of_wheel(wheel)
    assert {"LICENSE", "CHANGELOG.md", "configs/digits_quickstart.yaml"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", ".venv"))]


@pytest.mark.slow
def test_installed_wheel_works_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    config = ROOT / "configs" / "digits_quickstart.yaml"

    for command in (
        ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel],
        [ROOT / ".ci" / "check_wheel.py", wheel],
        [site / "bin" / "hetero-fl", "train", "-c", config, "--out", "run", "rounds=1"],
    ):
        environment = {**os.environ, "PYTHONPATH": str(site)}
        subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=True)

    for name in ("summary.json", "report.html", "models/vit.safetensors", "plots/curves.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0
