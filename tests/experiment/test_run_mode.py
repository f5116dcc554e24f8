"""Asynchronous mode: which methods support it, and notes on settings that it ignores."""

from __future__ import annotations

import pytest

from hetero_fl.config.base import StalenessConfig
from hetero_fl.experiment import prepare
from hetero_fl.federation.asynchronous import AsynchronousTrainer
from hetero_fl.utils.errors import UserError
from tests.support.federations import METHODS, MIXED, config

ASYNC = {"threads": 1, "mode": "async"}
SYNCHRONOUS = (
    *("centralized", "ensemble", "feddf", "kt_pfl", "fedtgp"),
    *("fedgh", "fedgen", "fedkd", "fedgkt", "dense"),
)


def test_every_method_supports_asynchronous_mode_or_refuses_it(subtests: pytest.Subtests) -> None:
    for method in METHODS:
        source = config(method, MIXED, clients=4, runtime=ASYNC)
        if method == "ds_fl":
            source["algorithm"]["proxy_rows"] = None
        with subtests.test(method=method):
            if method not in SYNCHRONOUS:
                assert prepare(source).config.runtime.mode == "async"
                continue
            words = f"^algorithm.name={method} cannot be combined with runtime.mode=async"
            with pytest.raises(UserError, match=words):
                prepare(source)


@pytest.mark.parametrize("method", ["fedasync", "fedbuff"])
def test_asynchronous_methods_imply_the_mode(method: str) -> None:
    prepared = prepare(config(method, MIXED, clients=4))

    assert prepared.config.runtime.mode == "async"
    assert isinstance(prepared.make_trainer(), AsynchronousTrainer)
    assert any(note.startswith("runtime.mode=async") for note in prepared.notes)
    assert prepare(prepared.config).config == prepared.config


def test_schedules_count_server_versions() -> None:
    for num_rounds, source in (
        (20, config("fedasync", clients=4, rounds=5)),
        (8, config("fedbuff", clients=4, rounds=5, clients__per_round=3)),
        (5, config("hybrid", clients=4, rounds=5, runtime=ASYNC)),
    ):
        assert prepare(source).federation.num_rounds == num_rounds


def test_staleness_weights_match_the_formulas() -> None:
    for kind, a, weights in (
        ("constant", None, [1, 1, 1]),
        ("polynomial", None, [1, 2**-0.5, 1 / 3]),
        ("polynomial", 1.0, [1, 1 / 2, 1 / 9]),
        ("hinge", None, [1, 1, 1 / 41]),
        ("hinge", 0.5, [1, 1, 1 / 3]),
    ):
        section = StalenessConfig(kind=kind, a=a)  # type: ignore[arg-type]
        assert [section.weight(t) for t in (0, 1, 8)] == pytest.approx(weights, rel=1e-15), kind
