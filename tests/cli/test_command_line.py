"""The command line: misspelled commands and options, and what every command has."""

from __future__ import annotations

import pytest

from hetero_fl.cli import main


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian", "-c", "x.yaml"], "error: unknown command 'trian'; did you mean 'train'? (see hetero-fl --help)"),
        (["run"], "error: unknown command 'run'; choose from audit, certificates, compare, evaluate,"),
        (["train", "--conifg", "x.yaml"], "unknown option --conifg; did you mean '--config'? (see hetero-fl train"),
        (["train", "--conifg=x.yaml"], "unknown option --conifg; did you mean '--config'?"),
        (["train", "--chekc", "-c", "x.yaml"], "unknown option --chekc; did you mean '--check'?"),
        (["evaluate", "runs/x", "--dta", "x.npz"], "unknown option --dta; did you mean '--data'?"),
        (["train", "--zzz", "-c", "x.yaml"], "error: unknown option --zzz (see hetero-fl train --help)"),
        (["compare", "--jobs", "two"], "error: argument --jobs: expected an integer, got 'two' (see"),
    ],
)
def test_parser_suggests_what_was_meant(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert line in told and told.count("\n") == 1


def test_parser_suggests_to_a_script_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--conifg", "x.yaml"], command="train") == 2
    assert "unknown option --conifg; did you mean '--config'? (see train.py --help)" in capsys.readouterr().err
