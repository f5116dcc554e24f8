"""The files of a benchmark: mistakes, selection of rows, and the benchmark of the project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.league.protocol import Benchmark
from hetero_fl.config.load import read_config_file
from hetero_fl.experiment.preparation import prepare
from hetero_fl.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL: dict[str, Any] = {
    "seeds": [0, 1],
    "tuning": {
        "seeds": [2],
        "keys": ["clients.defaults.optimizer.lr"],
        "learning_rates": [0.001, 0.01, 0.1],
        "wider": [0.0001, 0.001, 0.01, 0.1, 1.0],
    },
    "rows": [
        {"method": "local", "components": "none"},
        {"method": "fedavg", "components": "none"},
        {"method": "fedavg", "components": "all", "settings": ["logit_adjustment=true"]},
    ],
    "primary": {
        "method": "fedavg",
        "against": ["local"],
        "components": "none",
        "metric": "global_last_accuracy",
        "federations": ["first"],
    },
}
FEDERATION = {"title": "First", "config": "config.yaml"}


def write(folder: Path, protocol: Any = PROTOCOL, **federations: Any) -> Path:
    folder.mkdir(exist_ok=True)
    federations = federations or {"first": FEDERATION}
    for name, content in {"protocol": protocol, **federations}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


def changed(path: str, value: Any) -> Any:
    """Return the protocol with another value at a key path."""
    protocol = yaml.safe_load(yaml.safe_dump(PROTOCOL))
    *parents, last = path.split(".")
    place = protocol
    for key in parents:
        place = place[key]
    place[last] = value
    return protocol


@pytest.mark.parametrize(
    ("protocol", "federations", "words"),
    [
        (changed("sedes", [1]), {}, "protocol.yaml: sedes: unknown key; did you mean 'seeds'?"),
        (changed("seeds", []), {}, "protocol.yaml: seeds"),
        (changed("seeds", [0, 2]), {}, "protocol.yaml: tuning.seeds: 2 is also a reported seed"),
        (changed("rows", PROTOCOL["rows"][:2] * 2), {}, "rows: local/none is listed twice"),
        (changed("tuning.learning_rates", [0.001, 0.1, 1.0]), {}, "expected neighboring values"),
        (changed("tuning.wider", [0.1, 0.01, 0.001]), {}, "wider: expected ascending values"),
        (
            changed("primary.federations", ["frist"]),
            {},
            "primary.federations: unknown federation 'frist'; did you mean 'first'?",
        ),
        (
            changed("primary.metric", "global_last_acuracy"),
            {},
            "unknown column 'global_last_acuracy'; did you mean 'global_last_accuracy'?",
        ),
        (
            changed("primary.components", "noen"),
            {},
            "primary.method: first has no row 'fedavg/noen'; did you mean 'fedavg/none'?",
        ),
        (
            changed("primary.against", ["fedmd"]),
            {},
            "primary.against: first has no row 'fedmd/none'",
        ),
        (PROTOCOL, {"first": {**FEDERATION, "row": []}}, "first.yaml: row: unknown key"),
        (
            PROTOCOL,
            {"first": {**FEDERATION, "rows": ["fedavg/al"]}},
            "first.yaml: rows: unknown row 'fedavg/al'; did you mean 'fedavg/all'?",
        ),
        (
            PROTOCOL,
            {"first": {**FEDERATION, "left_out": {"fedprox": "slow"}}},
            "first.yaml: left_out: unknown row 'fedprox'; choose from",
        ),
        (
            PROTOCOL,
            {"first": {**FEDERATION, "tuned_as": "second"}},
            "first.yaml: tuned_as: unknown federation 'second'",
        ),
        (
            PROTOCOL,
            {"first": {**FEDERATION, "retuned": {"local/none": {"seed": [1]}}}},
            "first.yaml: retuned: requires tuned_as, the federation to start from",
        ),
        (
            PROTOCOL,
            {
                "first": FEDERATION,
                "second": {**FEDERATION, "tuned_as": "first", "retuned": {"local/al": {}}},
            },
            "second.yaml: retuned: unknown row 'local/al'",
        ),
        (
            PROTOCOL,
            {
                "first": FEDERATION,
                "second": {**FEDERATION, "tuned_as": "first"},
                "third": {**FEDERATION, "tuned_as": "second"},
            },
            "third.yaml: tuned_as: second is itself tuned as first",
        ),
        (PROTOCOL, {"first": {"config": "config.yaml"}}, "first.yaml: title"),
    ],
)
def test_mistakes_in_files_are_named(
    tmp_path: Path, protocol: Any, federations: dict[str, Any], words: str
) -> None:
    folder = write(tmp_path, protocol, **federations)
    with pytest.raises(UserError) as caught:
        Benchmark.load(folder)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_rows_are_selected_by_method_or_by_method_and_components(tmp_path: Path) -> None:
    first = {**FEDERATION, "rows": ["local", "fedavg/none"]}
    second = {**FEDERATION, "left_out": {"fedavg": "too slow"}, "tuned_as": "first"}
    plan = Benchmark.load(write(tmp_path, first=first, second=second))
    assert [row.name for row in plan.rows_of("first")] == ["local/none", "fedavg/none"]
    assert [row.name for row in plan.rows_of("second")] == ["local/none"]
    assert plan.select(["second"]) == ["first", "second"], "settings are tuned first"
    with pytest.raises(UserError, match=r"unknown federation 'secnod'; did you mean 'second'\?"):
        plan.select(["secnod"])


def test_tuned_values_become_overrides() -> None:
    (row,) = (
        row
        for row in Benchmark.load(ROOT / "configs" / "benchmark").protocol.rows
        if row.name == "fedavg/all"
    )
    trial = {"clients.defaults.epochs": 3, "recalibrate": ["global_test", "local_test"], "x": True}
    assert row.overrides(trial) == (
        "clients.defaults.epochs=3",
        "algorithm.recalibrate=[global_test,local_test]",
        "algorithm.x=true",
    )


def test_each_row_of_the_benchmark_is_valid_in_each_federation() -> None:
    plan = Benchmark.load(ROOT / "configs" / "benchmark")
    assert len({row.name for row in plan.protocol.rows}) == len(plan.protocol.rows)
    for name in ("digits", "sensors", "xrays_one"):
        config = read_config_file(plan.federations[name].config)
        for row in plan.rows_of(name):
            first = row.overrides({key: values[0] for key, values in row.tuned.items()})
            prepare(config, [*plan.federation_overrides(name), *row.variant.overrides, *first])


def test_the_primary_family_has_at_most_twenty_tests() -> None:
    plan = Benchmark.load(ROOT / "configs" / "benchmark")
    primary = plan.protocol.primary
    assert len(primary.against) * len(primary.federations) <= 20
    assert len(plan.protocol.seeds) >= 10
    for name in primary.federations:
        names = {row.name for row in plan.rows_of(name)}
        methods = (primary.method, *primary.against)
        assert {f"{method}/{primary.components}" for method in methods} <= names
