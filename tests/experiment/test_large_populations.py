"""Populations: nothing that a run does goes through everybody, and a part of them can be read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hetero_fl.cli import main
from hetero_fl.config.population import Population
from hetero_fl.core.participant import ClientDirectory
from hetero_fl.data.client_rows import ClientRows
from hetero_fl.experiment import prepare, run
from hetero_fl.federation.cost import communication_cost
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import ClientIds, IdSeries
from tests.helpers.small_federations import config, rounds_of

MILLION = 1_000_000
MANY = 100_000  # enough to notice work for each of them
STATEFUL = [
    "fedavg",
    "fedper",
    "hybrid",
    "fedproto",
    "fml",
    "fedkd",
    "scaffold",
    "heterofl",
    "ds_fl",
    "kt_pfl",
    "fedgkt",
    "fedgen",
    "dense",
]


def many(method: str = "fedavg", clients: int = MILLION, **changes: Any) -> dict[str, Any]:
    models = [{"name": "mlp", "hidden": [8]}, {"name": "mlp", "hidden": [12]}]
    # two digits of training rows, or three
    partition = {"kind": "drawn", "alpha": 0.5, "rows": 160, "spread": 0.5}
    given = {
        "data__partition": partition,
        "data__train_limit": 700,
        "clients__per_round": 8,
        "runtime": {"executor": "serial", "threads": 1},
    }
    return config(method, models, clients, **{**given, **changes})


@pytest.fixture
def nobody_lists_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing go through all clients, but for the patterns of overrides on loading."""
    loading = False
    match_overrides = Population._match_overrides

    def load(self: Population) -> Any:
        nonlocal loading
        loading = True
        try:
            return match_overrides(self)
        finally:
            loading = False

    monkeypatch.setattr(Population, "_match_overrides", load)
    for kind in (Population, ClientIds, IdSeries, ClientRows, ClientDirectory):
        whole = kind.__iter__

        def listed(self: Any, whole: Any = whole) -> Iterator[str]:
            for count, id in enumerate(whole(self)):
                assert loading or count < 2000, f"{type(self).__name__} is listed"
                yield id

        monkeypatch.setattr(kind, "__iter__", listed)


@pytest.mark.slow
@pytest.mark.parametrize("method", STATEFUL)
def test_runs_with_many_clients(method: str, nobody_lists_everybody: None, tmp_path: Path) -> None:
    shown = method == "fedavg"
    clients = MILLION if shown else MANY
    source = many(
        method,
        clients,
        evaluation={"clients": 5},
        clients__overrides=[{"match": "site_*7", "epochs": 2}],
        output={"plots": shown, "report": shown},
    )
    prepared = prepare(source)
    assert sum(kind.count for kind in prepared.federation.client_infos.profiles) == clients
    finished = run(source, out=tmp_path / "run")
    cohorts = [record["cohort"] for record in finished.metrics]
    assert [len(set(c)) for c in cohorts] == [8, 8] and cohorts[0] != cohorts[1]
    read = [client["id"] for client in finished.summary["clients"]]
    assert len(read) == 5 and set(read) == set(finished.metrics[-1]["clients"])
    assert set(finished.models) - {"server"} == set(read)
    c = prepared.config
    cost = communication_cost(
        prepared.method, prepared.federation, c.rounds, c.clients.per_round, c.evaluation.every
    )
    counted = finished.summary["communication"]
    told, sent = (
        [cost.up.total(), cost.down.total() + cost.evaluation.total()],
        [counted["up_bytes"], counted["down_bytes"]],
    )
    assert cost.is_upper_bound == (method == "fedkd")
    assert (
        all(t >= s for t, s in zip(told, sent, strict=True))
        if cost.is_upper_bound
        else told == sent
    )
    if shown:
        page = re.sub(r"\s+", " ", (tmp_path / "run" / "report.html").read_text())
        assert "1,000,000 clients could take part; all figures are of 5 of them" in page


@pytest.mark.parametrize("method", ["centralized", "ensemble"])
def test_who_needs_everybody_is_refused(method: str, nobody_lists_everybody: None) -> None:
    with pytest.raises(
        UserError,
        match=rf"^algorithm.name={method} needs the rows or models of all clients in one place",
    ):
        prepare(many(method))
    prepare(many(method, clients=500, data__partition={"kind": "drawn", "rows": 40}))


def test_the_check_of_a_million_clients(
    nobody_lists_everybody: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(many()))
    assert main(["--config", str(path), "--check"], command="train") == 0
    told = capsys.readouterr().out
    assert (
        "and 999,900 more" in told
        and "the models of 100 of 1,000,000 clients are read" in " ".join(told.split())
    )


def test_rows_that_are_dealt_out_do_not_suffice_for_thousands() -> None:
    with pytest.raises(
        UserError, match=r"for 5000 clients; at most 0, unless they share rows \(.*kind: drawn\)"
    ):
        prepare(many(clients=5000, data__partition={"kind": "iid"}))


def test_the_same_clients_are_read_each_time() -> None:
    source = config(clients=6, data__partition={"kind": "iid"}, evaluation={"clients": 2})
    rounds = rounds_of(source, held=0)
    first = rounds.evaluate()
    rounds.run_round()
    second = rounds.evaluate()
    assert set(first.clients) == set(second.clients) and len(first.clients) == 2
    # reading fewer changes nothing else
    everybody = rounds_of({**source, "evaluation": {}}, held=1).evaluate()
    assert {c: r.scores for c, r in second.clients.items()} == {
        c: everybody.clients[c].scores for c in second.clients
    }
    assert prepare(source).notes == [
        "evaluation.clients: every evaluation uses the same 2 of 6 clients"
    ]
    with pytest.raises(
        UserError, match=r"^evaluation.clients: must be <= 6, the number of clients, got 7$"
    ):
        prepare({**source, "evaluation": {"clients": 7}})


def test_above_a_thousand_clients_a_hundred_are_read_by_default() -> None:
    assert len(prepare(many(clients=1000)).federation.evaluated_clients) == 1000
    assert len(prepare(many(clients=1001)).federation.evaluated_clients) == 100


def test_a_population_resumes(tmp_path: Path) -> None:
    source = many("fedper", evaluation={"clients": 3})
    whole = run(source, out=tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(record: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        run(source, out=tmp_path / "cut", callbacks=[stop])
    again = run(source, out=tmp_path / "cut", resume=True)
    assert [r["clients"] for r in again.metrics] == [r["clients"] for r in whole.metrics]
