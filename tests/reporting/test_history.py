"""The metrics of a run as a data frame."""

from __future__ import annotations

from hetero_fl.reporting.run import history_frame


def test_history_contains_no_statistics_over_clients() -> None:
    scores = {"auroc": 0.9, "auroc_std": 0.1, "auroc_worst": 0.8, "auroc_undefined": 2}

    frame = history_frame([{"round": 1, "personal": scores}])

    assert frame.to_numpy().tolist() == [[1, "mean", "personal", "auroc", 0.9]]
