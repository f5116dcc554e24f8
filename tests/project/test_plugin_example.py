"""The package in examples/plugin is installed into a new environment and used from there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "plugin"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Install the package into a folder, without a package index.

    Returns:
        Environment variables with which Python finds the package, hetero_fl and its dependencies.
    """
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("plugin")
    # Building writes into the source folder.
    shutil.copytree(EXAMPLE, folder / "source")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    pip = [sys.executable, "-m", "pip", "install", *options]
    subprocess.run([*pip, "--target", folder / "site", folder / "source"], check=True)
    return {**os.environ, "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}", "COLUMNS": "160"}


def run(environment: dict[str, str], folder: Path, *command: str) -> str:
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_listings_contain_the_names(environment: dict[str, str], tmp_path: Path) -> None:
    methods = run(environment, tmp_path, "-m", "hetero_fl", "methods")
    models = run(environment, tmp_path, "-m", "model_zoo", "sine*")

    assert "clipped_fedavg  Average parameters of clients" in methods
    assert "from hetero_fl_example 0.1.0" in methods and "fedavg " in methods
    assert "sine_mlp" in models


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["serial", "processes"])
def test_example_trains(environment: dict[str, str], tmp_path: Path, executor: str) -> None:
    config = str(EXAMPLE / "example.yaml")
    overrides = ("rounds=1", f"runtime.executor={executor}", "runtime.workers=1")

    run(environment, tmp_path, "-m", "hetero_fl", "train", "-c", config, "--out", "run", *overrides)

    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_tests_of_the_example_pass(environment: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "plugin")

    out = run(environment, tmp_path / "plugin", "-m", "pytest", "-q", "-p", "no:cacheprovider")

    assert "passed" in out
