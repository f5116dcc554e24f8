"""Large populations: no step of a run lists all clients; a sample of clients is evaluated."""

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
from hetero_fl.federation.cost import expected_cost
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import ClientIds, IdSeries
from tests.support.federations import config, rounds_of

MILLION = 1_000_000
# enough clients to notice work for each of them
MANY = 100_000
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
    # about 40 to 400 training rows
    partition = {"kind": "drawn", "alpha": 0.5, "rows": 160, "spread": 0.5}
    given = {
        "data__partition": partition,
        "data__train_limit": 700,
        "clients__per_round": 8,
        "runtime": {"executor": "serial", "threads": 1},
    }
    return config(method, models, clients, **{**given, **changes})


@pytest.fixture
def forbid_full_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a step other than matching overrides on loading iterates over all clients."""
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
        full = kind.__iter__

        def listed(self: Any, full: Any = full) -> Iterator[str]:
            for count, client_id in enumerate(full(self)):
                assert loading or count < 2000, f"{type(self).__name__} is listed"
                yield client_id

        monkeypatch.setattr(kind, "__iter__", listed)


@pytest.mark.slow
@pytest.mark.parametrize("method", STATEFUL)
def test_runs_do_not_iterate_over_all_clients(
    method: str, forbid_full_iteration: None, tmp_path: Path
) -> None:
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
    assert sum(profile.count for profile in prepared.federation.client_infos.profiles) == clients
    finished = run(source, out=tmp_path / "run")
    cohorts = [record["cohort"] for record in finished.metrics]
    assert [len(set(c)) for c in cohorts] == [8, 8] and cohorts[0] != cohorts[1]
    evaluated = [client["id"] for client in finished.summary["clients"]]
    assert len(evaluated) == 5 and set(evaluated) == set(finished.metrics[-1]["clients"])
    assert set(finished.models) - {"server"} == set(evaluated)
    c = prepared.config
    cost = expected_cost(
        prepared.method, prepared.federation, c.rounds, c.clients.per_round, c.evaluation.every
    )
    counted = finished.summary["communication"]
    forecast, sent = (
        [cost.up.total(), cost.down.total() + cost.evaluation.total()],
        [counted["up_bytes"], counted["down_bytes"]],
    )
    assert cost.is_upper_bound == (method == "fedkd")
    assert (
        all(t >= s for t, s in zip(forecast, sent, strict=True))
        if cost.is_upper_bound
        else forecast == sent
    )
    if shown:
        page = re.sub(r"\s+", " ", (tmp_path / "run" / "report.html").read_text())
        assert re.search(
            r"1,000,000 clients could participate; 5 of them \(.*\) were evaluated", page
        )


@pytest.mark.parametrize("method", ["centralized", "ensemble"])
def test_methods_that_need_all_clients_refuse_large_populations(
    method: str, forbid_full_iteration: None
) -> None:
    with pytest.raises(
        UserError,
        match=rf"^algorithm.name={method} needs the rows or models of all clients in one place",
    ):
        prepare(many(method))
    prepare(many(method, clients=500, data__partition={"kind": "drawn", "rows": 40}))


def test_check_of_a_million_clients_prints_representatives(
    forbid_full_iteration: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(many()))
    assert main(["--config", str(path), "--check"], command="train") == 0
    out = capsys.readouterr().out
    assert (
        "… 999,990 more" in out
        and "every evaluation uses the same 100 of 1,000,000 clients" in " ".join(out.split())
    )


def test_every_evaluation_uses_the_same_clients() -> None:
    source = config(clients=6, data__partition={"kind": "iid"}, evaluation={"clients": 2})
    rounds = rounds_of(source, num_rounds=0)
    first = rounds.evaluate()
    rounds.run_round()
    second = rounds.evaluate()
    assert set(first.clients) == set(second.clients) and len(first.clients) == 2
    # scores do not depend on the number of evaluated clients
    all_evaluated = rounds_of({**source, "evaluation": {}}, num_rounds=1).evaluate()
    assert {c: r.scores for c, r in second.clients.items()} == {
        c: all_evaluated.clients[c].scores for c in second.clients
    }


def test_large_populations_evaluate_a_hundred_clients_by_default() -> None:
    assert len(prepare(many(clients=1000)).federation.evaluated_clients) == 1000
    assert len(prepare(many(clients=1001)).federation.evaluated_clients) == 100
