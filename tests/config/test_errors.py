"""Suggestions of the nearest key, and hints on lists and mappings."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetero_fl.experiment.configuration import load_config
from hetero_fl.utils.errors import UserError


def test_missing_file_lists_the_files_of_the_folder(tmp_path: Path) -> None:
    for name in ("digits.yaml", "medical.json", "notes.md"):
        (tmp_path / name).write_text("")
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")

    found = []
    for path in (tmp_path / "zzz.yaml", tmp_path / "digit.yaml", tmp_path, tmp_path / "empty.yaml"):
        with pytest.raises(UserError) as error:
            load_config(path)
        found.append(str(error.value).replace(f"{path}: ", ""))

    listed = "the folder contains digits.yaml, empty.yaml, medical.json"
    assert found == [
        f"file not found; {listed}",
        "file not found; did you mean 'digits.yaml'?",
        f"expected a file, got a folder; {listed}",
        "has no keys; expected at least data, clients and algorithm",
    ]


def test_overrides_may_be_a_string_or_a_dictionary() -> None:
    assert load_config({}, "rounds=1").rounds == 1
    given = {
        "rounds": 2,
        "data.name": "digits",
        "algorithm": {"name": "fedprox", "mu": 0.5},
        "privacy": None,
    }
    config = load_config({}, given)
    assert (config.rounds, config.data.name, config.privacy) == (2, "digits", None)
    assert config.algorithm["name"] == "fedprox" and config.algorithm["mu"] == 0.5
