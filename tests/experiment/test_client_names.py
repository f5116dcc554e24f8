"""Names of clients, which are also names of files and of rows in tables of results."""

from __future__ import annotations

import numpy as np
import pytest

import hetero_fl as hfl
from hetero_fl.config import expand_population
from hetero_fl.utils.errors import UserError

DATA = np.zeros((40, 4), dtype=np.float32), np.arange(40) % 2


REFUSED = ("mean", "Mean", "server", "x" * 300, ".", "..", "a/b", "a\\b", "CON", "nul", "a.", "")


def test_name_that_cannot_be_a_file_or_a_row_is_refused(subtests: pytest.Subtests) -> None:
    for name in REFUSED:
        groups = {"clients": {"groups": [{"name": name, "model": "linear"}]}}
        with subtests.test(name=name):
            with pytest.raises(UserError, match=r"name: (must|expected) ") as from_object:
                hfl.Client(name, "linear", DATA)
            with pytest.raises(
                UserError, match=r"clients\.groups\.0\.name: (must|expected) "
            ) as from_config:
                hfl.Federation.from_config(groups).prepare(hfl.Local())

            assert max(len(str(error.value)) for error in (from_object, from_config)) < 450


def test_name_of_several_clients_may_be_one_that_is_reserved(subtests: pytest.Subtests) -> None:
    for name in ("con", "aux", "mean", "server", "com1"):
        groups = {"clients": {"groups": [{"name": name, "count": 2}]}}
        with subtests.test(name=name):
            clients = expand_population(hfl.load_config(groups).clients)

            assert list(clients) == [f"{name}_1", f"{name}_2"]
            assert hfl.Client(f"{name}_2").name == f"{name}_2"
