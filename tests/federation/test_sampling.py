"""Client sampling."""

from __future__ import annotations

from hetero_fl.experiment import prepare
from hetero_fl.utils.ordering import natural_order
from tests.support.federations import config


def test_draw_cohort_depends_on_round_and_attempt() -> None:
    federation = prepare(config("fedavg", clients=8)).federation

    by_round = [federation.sample_cohort(3, round_idx) for round_idx in range(8)]
    by_attempt = [federation.sample_cohort(3, 0, attempt) for attempt in range(8)]

    for cohorts in (by_round, by_attempt):
        assert len({tuple(cohort) for cohort in cohorts}) > 4
        assert all(len(set(c)) == 3 and c == natural_order(c) for c in cohorts)
    assert by_round[0] == by_attempt[0] == federation.sample_cohort(3, 0)
