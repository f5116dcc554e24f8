"""Draw figures in the style of the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from hetero_fl.reporting.plots import style


def drawn(make: Callable[..., Figure | None], *content: Any) -> Figure:
    """Return the figure that a function makes of these contents."""
    with style.plot_style():
        result = make(*content)
    assert result is not None
    return result
