"""Populations of clients against a reference that expands every client."""

from __future__ import annotations

import pickle
from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import assume, given, settings, strategies as st

from hetero_fl.config import expand_population
from hetero_fl.config.population import GroupMembers, OverrideLayer, Population
from hetero_fl.experiment.configuration import load_config
from hetero_fl.utils.ordering import ClientIds, IdSeries, natural_order

NAMES = st.sampled_from(
    ["a", "b", "a_1", "a_2", "a_01", "a1", "a01", "site", "site_1", "A", "b-2", "a_1_1"]
)
COUNTS = st.one_of(st.integers(1, 12), st.sampled_from([99, 100, 101, 120]))
PATTERNS = st.text("ab1_2*?[]!-", min_size=1, max_size=7)
OVERRIDES = ["*", "a*", "*_1", "*1", "*[13579]", "a_1?", "*0*", "site_*"]
MODELS = ["linear", "mlp", "cnn"]
CASES = settings(max_examples=50, deadline=None, derandomize=True)


@CASES
@given(st.lists(st.tuples(NAMES, COUNTS), min_size=1, max_size=6))
def test_client_ids_are_in_natural_order(groups: list[tuple[str, int]]) -> None:
    series = [IdSeries(*group) for group in groups]
    listed = [client_id for s in series for client_id in s]
    if doubled := [client_id for client_id, n in Counter(listed).items() if n > 1]:
        with pytest.raises(ValueError) as error:
            ClientIds(series)
        assert str(error.value) in doubled
        return
    ids = ClientIds(series)
    assert list(ids) == natural_order(listed) and len(ids) == len(listed)
    assert [s.position(client_id) for s in series for client_id in s] == [
        i for s in series for i in range(len(s))
    ]
    strangers = {
        f"{s.name}_{n}" for s in series for n in ("0", "00", "1", "01", "13", "²", "1000")
    } - set(listed)
    assert all(s.position(client_id) is None for client_id in strangers for s in series)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(PATTERNS, st.text("ab1_2[]-", min_size=1, max_size=7))
def test_overrides_match_like_fnmatch(pattern: str, client_id: str) -> None:
    group = GroupMembers(IdSeries(client_id, 1))
    population = Population([group], [OverrideLayer(pattern, {})])

    assert population.matched_overrides() == [fnmatchcase(client_id, pattern)]


@CASES
@given(
    st.lists(
        st.tuples(NAMES, COUNTS, st.integers(0, 3)),
        min_size=1,
        max_size=3,
        unique_by=lambda group: group[0],
    ),
    st.lists(st.tuples(st.sampled_from(OVERRIDES), st.integers(0, 3)), max_size=3),
)
def test_settings_equal_a_reference_expansion(
    groups: list[tuple[str, int, int]], overrides: list[tuple[str, int]]
) -> None:
    """Compare with a reference that expands clients one by one."""
    listed = [(name, g) for g in groups for name in IdSeries(g[0], g[1])]
    ids = [name for name, _ in listed]
    assume(
        len(set(ids)) == len(ids)
        and all(any(fnmatchcase(name, p) for name in ids) for p, _ in overrides)
    )
    expected: dict[str, tuple[str, int]] = {}
    turns: Counter[str] = Counter()
    for name, (group, _, models) in listed:
        expected[name] = (MODELS[turns[group] % models] if models else "resnet18", 1)
        turns[group] += 1
    for number, (pattern, models) in enumerate(overrides):
        for turn, name in enumerate(name for name in ids if fnmatchcase(name, pattern)):
            expected[name] = (MODELS[turn % models] if models else expected[name][0], number + 2)
    source: dict[str, Any] = {
        "defaults": {"model": "resnet18"},
        "groups": [
            {"name": n, "count": c, **({"model": MODELS[:m]} if m else {})} for n, c, m in groups
        ],
        "overrides": [
            {"match": p, "epochs": i + 2, **({"model": MODELS[:m]} if m else {})}
            for i, (p, m) in enumerate(overrides)
        ],
    }
    population = expand_population(load_config({"clients": source}).clients)
    assert list(population) == ids
    assert {name: (s.model[0].name, s.epochs) for name, s in population.items()} == expected
    of_kind: dict[int, list[str]] = {}
    for name in ids:
        of_kind.setdefault(population.profile(name).number, []).append(name)
    assert [(kind.first, kind.count) for kind in population.profiles] == [
        (m[0], len(m)) for m in of_kind.values()
    ]
    assert len({id(s) for s in population.values()}) == len(population.profiles)
    again = pickle.loads(pickle.dumps(population))
    assert again == population and len({id(s) for s in again.values()}) == len(population.profiles)


def test_million_clients_share_few_profiles() -> None:
    source = {
        "groups": [
            {"name": "phone", "count": 999_990, "model": ["mlp", "linear"]},
            {"name": "clinic", "count": 10},
        ],
        "overrides": [
            {"match": "*77", "epochs": 3, "model": ["cnn", "mlp", "linear"]},
            {"match": "clinic_1?", "epochs": 2},
        ],
    }
    population = expand_population(load_config({"clients": source}).clients)
    assert (
        len(population) == 1_000_000
        and sum(kind.count for kind in population.profiles) == 1_000_000
    )
    assert len(population.profiles) <= 2 + 6 + 2
    assert sum(kind.count for kind in population.profiles if kind.settings.epochs == 3) == 10_000
    assert (
        population["phone_000077"].model[0].name == "cnn"
        and population["phone_999977"].model[0].name == "cnn"
    )
    # Both train the first of two models.
    assert population["phone_000005"] is population["phone_999985"]
    assert population["clinic_10"].epochs == 2 and population.ids[0] == "clinic_01"
    assert population.ids[10] == "phone_000001" and population.ids[999_999] == "phone_999990"
    assert "phone_999991" not in population and "phone_5" not in population


def test_from_settings_accepts_individual_clients() -> None:
    listed = {
        client_id: expand_population(load_config({}).clients)["client"]
        for client_id in ("site_10", "b", "site_2")
    }
    population = Population.from_settings(listed)
    assert dict(population) == listed and list(population.ids) == ["b", "site_2", "site_10"]
    assert Population.from_settings(population) is population
