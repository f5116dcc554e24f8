"""Run methods that a user writes in a file."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent, indent
from typing import Any

import pytest

from hetero_fl.experiment import run
from hetero_fl.utils.errors import UserError
from tests.support.federations import config

START = '''"""A method and what it uses."""

from dataclasses import dataclass, replace

import torch

from hetero_fl.algorithms import FedAvg, local_fit, upload_model
from hetero_fl.core.objectives import Objective, Supervised
from hetero_fl.core.payload import Item, ItemSpec
from hetero_fl.core.plan import Fit, Predict, Rows

ELSEWHERE, EQUAL = Predict("model", Rows("proxy")), Predict("model", Rows("proxy"))


@dataclass(frozen=True)
class Clumsy(Supervised):
    def loss(self, nets, batch, context):
        return nets.model(batch.x) @ torch.zeros(3, 3)

    total_loss = Objective.total_loss


def create_fit(server):
    Fit({next(iter(server.models)): None}, None, Rows("proxy"))


class Mine(FedAvg):
'''


def run_method(body: str, **changes: Any) -> None:
    """Run a federation with a method in the file `own.py`; a `UserError` must precede the run.

    Args:
        body: Body of the class, which is derived from FedAvg. It begins in line 28.
        **changes: Changes of the configuration (see `config`).
    """
    text = START + indent(dedent(body).strip("\n"), "    ")
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.delitem(sys.modules, "own", raising=False)
        Path("own.py").write_text(text + "\n")
        try:
            run(config("python:own:Mine", "mlp", **changes), out="run")
        except UserError:
            assert not Path("run").exists()
            raise
