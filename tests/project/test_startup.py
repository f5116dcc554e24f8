"""Import times: heavy libraries are loaded only where they are used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "IPython",
    "jinja2",
    "matplotlib",
    "medmnist",
    "omegaconf",
    "pandas",
    "PIL",
    "pyarrow",
    "rich",
    "scipy",
    "sklearn",
    "tensorboard",
    "timm",
    "torchmetrics",
    "torchvision",
}
STARTS = {
    "a worker process": (
        "import hetero_fl.federation.executors.processes",
        HEAVY,
    ),
    "the help": (
        "from hetero_fl.cli import main\nmain(['--help'])",
        HEAVY | {"torch", "numpy", "pydantic"},
    ),
    "a command's help": (
        "from hetero_fl.cli import main\nmain(['audit', '--help'])",
        HEAVY | {"torch", "numpy", "pydantic"},
    ),
    "the list of methods": (
        "from hetero_fl.cli import main\nassert main(['methods']) == 0",
        HEAVY - {"rich"},
    ),
    "the package": (
        "import hetero_fl, hetero_fl.utils.errors",
        HEAVY | {"torch", "numpy", "pydantic", "click", "model_zoo"},
    ),
    "the digits": (
        "from hetero_fl.data import load_source\nfrom hetero_fl.config.data import SourceConfig\n"
        "from pathlib import Path\n"
        "assert len(load_source(SourceConfig(name='digits'), Path()).train) == 1797",
        HEAVY - {"omegaconf"},
    ),
    "a run": ("import hetero_fl.experiment", HEAVY - {"rich"}),
    "a run with plots and a report": (
        "from tempfile import mkdtemp\nimport hetero_fl\n"
        "config = {'data': {'name': 'digits', 'proxy': {'size': 200}}, 'rounds': 1}\n"
        "config |= {'clients': {'count': 2}, 'algorithm': {'name': 'hybrid'}}\n"
        "run = hetero_fl.run(config, out=mkdtemp())\n"
        "assert (run.path / 'report.html').stat().st_size > 0\n"
        "assert (run.path / 'plots' / 'curves.png').stat().st_size > 0",
        {"pandas", "scipy", "sklearn", "timm", "torchvision", "tabulate"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_heavy_libraries_are_not_loaded_at_the_start(name: str) -> None:
    code, heavy = STARTS[name]
    code += "\nimport json, sys"
    code += "\nprint('\\n' + json.dumps(sorted(n for n in sys.modules if '.' not in n)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "hetero_fl" in loaded
    assert not loaded & heavy
