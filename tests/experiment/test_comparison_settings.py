"""Comparisons report the settings of each method and the source of each setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hetero_fl.cli import main
from hetero_fl.experiment import compare
from hetero_fl.experiment.comparison.jobs import Variant
from hetero_fl.experiment.used_settings import used_settings
from hetero_fl.reporting.comparison.facts import Setting
from hetero_fl.utils.errors import UserError
from tests.reporting.test_report import Page
from tests.support.federations import config

# the method of the configuration file; 2.0 is the default of `temperature`
FILE = {"name": "hybrid", "temperature": 2.0, "heads": "keep"}


def small(algorithm: dict[str, Any] = FILE) -> dict[str, Any]:
    source = config(models="linear", clients=2, rounds=1)
    return {**source, "algorithm": algorithm}


def settings_of(
    label: str,
    overrides: tuple[str, ...] = (),
    point: tuple[str, ...] = (),
    origins: dict[str, str] | None = None,
) -> tuple[Setting, ...]:
    used = used_settings(small(), list(overrides), {Variant.parse(label): point}, origins or {})
    ((_, found),) = used.methods
    return found


@pytest.mark.parametrize("label", ["local", "fedavg", "feddf"])
def test_used_settings_of_another_method_are_its_defaults(label: str) -> None:
    assert settings_of(label) == ()


def test_used_settings_name_file_variant_override_and_grid() -> None:
    found = settings_of(
        "hybrid:replay_weight=0:clients.per_round=1",
        ("algorithm.align=0.5",),
        ("algorithm.distill_epochs=7",),
    )

    assert set(found) == {
        Setting("heads", "keep", "algorithm section of the configuration"),
        Setting("align", "0.5", "override"),
        Setting("replay_weight", "0.0", "variant"),
        Setting("clients.per_round", "1", "variant"),
        Setting("distill_epochs", "7", "grid"),
    }


def test_used_settings_name_the_last_source() -> None:
    (found,) = settings_of("hybrid:heads=take", point=("algorithm.heads=keep",))
    assert found == Setting("heads", "keep", "grid")
    assert settings_of("hybrid:heads=take") == ()


def test_used_settings_name_the_study() -> None:
    found = settings_of("fedprox:mu=0.5", origins={"fedprox:mu=0.5": "study small.yaml"})
    assert found == (Setting("mu", "0.5", "study small.yaml"),)


@pytest.mark.parametrize(
    ("algorithm", "labels", "note"),
    [
        (
            FILE,
            ["local", "hybrid", "hybrid:replay_weight=0"],
            "The settings in the algorithm section of the configuration apply to Hybrid only; all "
            "other methods use their defaults.",
        ),
        (
            FILE,
            ["local"],
            "The settings in the algorithm section of the configuration "
            "(temperature = 2.0, heads = keep) belong to "
            "Hybrid, which is not compared: all methods "
            "use their defaults.",
        ),
        ({"name": "fedavg"}, ["local", "fedavg"], ""),
    ],
)
def test_note_names_the_method_of_the_file_settings(
    algorithm: dict[str, Any], labels: list[str], note: str
) -> None:
    used = used_settings(small(algorithm), [], {Variant.parse(label): () for label in labels}, {})
    assert used.note == note


@pytest.mark.slow
def test_compare_prints_and_writes_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_process: list[str]
) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small()))
    command = [
        "--config",
        str(tmp_path / "small.yaml"),
        "--algorithms",
        "local,fedprox:mu=0.5,fedavg,hybrid",
    ]
    grid = ["--grid", "clients.defaults.optimizer.lr=0.01,0.02", "--jobs", "2"]

    assert main([*command, *grid, "--out", str(tmp_path / "out")], command="compare") == 0

    console = capsys.readouterr().err
    note = "apply to Hybrid only; all other methods use their defaults."
    page = Page((tmp_path / "out" / "report.html").read_text())
    written = (tmp_path / "out" / "comparison.md").read_text()
    for text in (console, written, page.text):
        assert note in text and "algorithm section of small.yaml" in text
    assert "settings of Local, FedAvg: defaults" in console
    assert "settings of FedProx (mu = 0.5): mu = 0.5 (variant)" in console
    assert "settings of Hybrid: heads = keep (algorithm section of small.yaml)" in console
    section = written.partition("## Settings")[2].partition("## Methods")[0]
    (hybrid,) = [line for line in section.splitlines() if line.startswith("- **Hybrid:**")]
    assert (
        "heads = keep (algorithm section of small.yaml); clients.defaults.optimizer.lr = 0.0"
        in hybrid
    )
    assert hybrid.endswith("(grid, chosen by validation)")


@pytest.mark.slow
def test_compare_names_the_study_as_the_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_process: list[str]
) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small()))
    study = {
        "config": "small.yaml",
        "algorithms": ["local:logit_adjustment=true", "fedavg"],
        "jobs": 1,
    }
    (tmp_path / "both.yaml").write_text(
        yaml.safe_dump({**study, "overrides": ["algorithm.logit_adjustment=true"]})
    )

    assert (
        main(
            ["--study", str(tmp_path / "both.yaml"), "--out", str(tmp_path / "out")],
            command="compare",
        )
        == 0
    )

    console = capsys.readouterr().err
    assert "settings of FedAvg: logit_adjustment = true (study both.yaml)" in console
    assert "logit_adjustment = true): logit_adjustment = true (study both.yaml)" in console
    assert "belong to Hybrid, which is not compared" in console


OWN_METHOD = """
from hetero_fl.algorithms.averaging import FedAvg


class Custom(FedAvg):
    \"\"\"FedAvg with an additional setting.\"\"\"

    strength: float = 1.0
"""


def test_used_settings_run_no_code_without_permission() -> None:
    variant = Variant.parse("python:not_there:Custom")
    with pytest.raises(UserError, match="allow_code=True"):
        used_settings(small(), [], {variant: ()}, {}, allow_code=frozenset())


@pytest.mark.slow
def test_compare_lists_the_settings_of_a_custom_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: list[str]
) -> None:
    (tmp_path / "custom_settings.py").write_text(OWN_METHOD)
    monkeypatch.syspath_prepend(str(tmp_path))

    labels = ["local", "hybrid", "python:custom_settings:Custom:strength=3"]
    out = compare(small(), labels, out=tmp_path / "out", jobs=1, allow_code=True).path

    text = (out / "comparison.md").read_text()
    assert "- **Custom (strength = 3):** strength = 3.0 (variant)" in text
    assert "heads = keep (algorithm section of the configuration)" in text


def test_method_defaults_of_clients_are_listed(tmp_path: Path) -> None:
    compare(small({"name": "local"}), "local,hybrid,fedavg_ft", out=tmp_path, jobs=1)

    section = (tmp_path / "comparison.md").read_text().partition("## Settings")[2]
    lines = [line for line in section.partition("## Methods")[0].splitlines() if line]
    assert sorted(lines) == [
        "- **FedAvg-FT:** fine_tune_epochs = 5 (default of the method)",
        "- **Hybrid:** logit_adjustment = true, recalibrate = [proxy_predictions, local_test] "
        "(default of the method)",
        "- **Local:** defaults",
    ]


def test_method_defaults_leave_written_options_out(tmp_path: Path) -> None:
    source = small({"name": "local"})
    source["clients"]["defaults"] = {
        **source["clients"].get("defaults", {}),
        "logit_adjustment": True,
        "recalibrate": ["local_test"],
    }
    compare(source, "local,hybrid", out=tmp_path, jobs=1)

    section = (tmp_path / "comparison.md").read_text().partition("## Settings")[2]
    lines = [line for line in section.partition("## Methods")[0].splitlines() if line]
    written = "logit_adjustment = true, recalibrate = [local_test] (clients section of "
    assert [line.partition(":** ")[2] for line in lines] == 2 * [f"{written}the configuration)"]
