"""Plots of scores against costs."""

from __future__ import annotations

from itertools import pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchmarks.league.plots import draw_costs
from benchmarks.league.scores import CostPoint


@pytest.mark.parametrize("largest", [3.0, 50.0, 2245.0])
def test_labels_of_costs_do_not_overlap(largest: float) -> None:
    points = [
        CostPoint("DS-FL", "components", 0.65, 82.8, 3.4),
        CostPoint("Hybrid", "components", largest, 84.2, 3.8),
    ]
    panels = {f"Federation {place}": points for place in range(6)}

    figure = draw_costs(panels, ["Hybrid", "DS-FL"], "Exchanged (MB)", "Score (%)")

    FigureCanvasAgg(figure).draw()
    axis = figure.axes[0].xaxis
    low, high = axis.get_view_interval()
    labels = [
        label.get_window_extent()
        for label in axis.get_ticklabels()
        if low <= label.get_position()[0] <= high
    ]
    assert len(labels) >= 2
    assert all(left.x1 < right.x0 for left, right in pairwise(labels))
