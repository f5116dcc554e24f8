"""Names from the files of strangers reach the terminal, logs and warnings escaped."""

from __future__ import annotations

import ast
import io
import json
import re
import warnings
from pathlib import Path

import pytest

import hetero_fl
from hetero_fl.cli import main, warnings_in_one_line
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.terminal import Terminal

PACKAGE = Path(hetero_fl.__file__).parent
# Clears the screen, sets its title, reverses the text, and is no valid markup of rich.
EVIL = "\x1b[2J\x1b]0x\x07\x9b1m\u202e[/red]"
SHOWN = r"\x1b[2J"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")


def test_names_in_a_data_file_and_a_configuration_do_not_control_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f"{i},{i % 7},{'ab'[i % 2]}{EVIL},{i % 3}{EVIL}" for i in range(180)]
    Path("data.csv").write_text("\n".join([f"age{EVIL},weight,y{EVIL},site", *rows]))
    config = {
        "rounds": 1,
        "data": {
            "name": "table",
            "path": "data.csv",
            "label": f"y{EVIL}",
            "group": "site",
            "partition": {"kind": "natural"},
            "proxy": {"size": 0},
        },
        "clients": {"defaults": {"model": "mlp"}, "count": 3},
        "algorithm": {"name": "local"},
        "output": {"plots": False},
    }
    Path("c.yaml").write_text(json.dumps(config))

    for status, *command in (
        (0, "train", "-c", "c.yaml", "--check"),
        (0, "train", "-c", "c.yaml", "--out", "run"),
        (2, "train", "-c", "c.yaml", "--check", f"data.label=z{EVIL}"),
        (0, "evaluate", "run", "--data", "data.csv"),
        (2, "evaluate", "run", "--data", f"data{EVIL}.csv"),
        (2, "export", f"run{EVIL}"),
    ):
        assert main([*map(str, command)]) == status
        shown = "".join(capsys.readouterr())
        assert not CONTROL.search(shown) and (SHOWN in shown or command[0] == "evaluate")
    assert not CONTROL.search(Path("run/log.txt").read_text())
    assert not CONTROL.search(Path("run/report.html").read_text())


def test_progress_error_and_warning_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = io.StringIO()
    progress = Progress(tmp_path / "log.txt", console=Terminal(file=shown, force_terminal=True))

    with pytest.raises(ZeroDivisionError), progress:
        progress.start(2, 2)
        progress.show_task(f"{EVIL} trains")
        progress.log(f"round 1: {EVIL} dropped")
        raise ZeroDivisionError(EVIL)
    with warnings.catch_warnings(record=True) as recorded, warnings_in_one_line():
        warnings.simplefilter("always")
        warnings.warn_explicit(EVIL, UserWarning, str(PACKAGE / "__init__.py"), 1)
        warnings.warn_explicit(EVIL, UserWarning, "pandas.py", 1)

    log = (tmp_path / "log.txt").read_text()
    assert log.count(SHOWN) == 3 and not CONTROL.search(log)
    # The live display itself moves the cursor.
    assert shown.getvalue().count(SHOWN) >= 2 and "\x1b[2J" not in shown.getvalue()
    assert not CONTROL.search(capsys.readouterr().err + str(recorded[0].message))


def test_all_output_is_escaped_in_one_place() -> None:
    """Only `echo` prints, and only `Terminal` is created as a console."""
    found = {
        f"{file.relative_to(PACKAGE)}: {node.func.id}"
        for file in PACKAGE.rglob("*.py")
        # Processes of Flower print for their parent, and `score.py` runs without the package.
        if "flower" not in file.parts and file.name != "score.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id in ("print", "Console")
    }

    assert found == {"utils/errors.py: print", "deployment/monitoring.py: print"}
