"""Read a comparison from Python: one row per run, the tables and the plot."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hetero_fl.reporting.formatting import task_of
from hetero_fl.reporting.notebook import Picture, enable_figures
from hetero_fl.reporting.run import Run
from hetero_fl.utils.code_permission import AllowCode
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import check_entries

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from hetero_fl.reporting.comparison.runs import ComparedRuns


DIFFERENCES = "differences.csv"
"""Name of the file with the paired differences from the best method."""
DIFFERENCE_COLUMNS = ("algorithm", "difference", "low", "high", "p", "p_holm", "seeds")
"""Columns of this file."""
GAIN = "_gain_"
"""Part of the names of the columns with the gain of a client over the baseline."""


class Comparison:
    """A finished comparison in a folder.

    Args:
        path: The folder of the comparison.
        allow_code: Whether code that the run files reference may be executed.

    Attributes:
        path: The folder, with `comparison.csv`, `comparison.md`, `comparison.tex`,
            `comparison.png`, `report.html` and the run directories in `runs/`.

    Raises:
        UserError: If the folder contains no comparison.

    Example:
        >>> from tempfile import mkdtemp
        >>> import hetero_fl
        >>> config = {"data": {"name": "digits"}, "clients": {"count": 2}, "rounds": 1}
        >>> comparison = hetero_fl.compare(config, ["local", "fedavg"], out=mkdtemp(), jobs=1)
        >>> list(comparison.frame["algorithm"])
        ['local', 'fedavg']
    """

    def __init__(self, path: str | Path, allow_code: AllowCode = False) -> None:
        self.path = Path(path)
        self._permission = allow_code
        check_entries(self.path)
        if not (self.path / "comparison.csv").is_file():
            raise UserError(f"{path}: contains no comparison.csv; choose a folder of a comparison")
        self._kept: list[object] = []

    def keep(self, *objects: object) -> None:
        """Keep objects, such as a temporary folder, alive as long as this instance."""
        self._kept.extend(objects)

    def __repr__(self) -> str:
        return f"Comparison({str(self.path)!r})\n\n{self.to_markdown()}"

    def _repr_html_(self) -> str:
        picture = Picture(self.path / "comparison.png")
        return self.table().to_html(index=False) + picture._repr_html_()

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The content of `comparison.csv`, with one row for each run and scores as fractions."""
        # Imported here because loading pandas is slow.
        import pandas as pd

        return pd.read_csv(self.path / "comparison.csv")

    @cached_property
    def differences(self) -> pd.DataFrame:
        """The paired differences from the best method, with scores as fractions.

        The columns are `algorithm`, `difference`, `low` and `high` (95% interval), `p`, `p_holm`
        and `seeds`. The frame is empty if no two methods share five seeds.
        """
        # Imported here because loading pandas is slow.
        import pandas as pd

        path = self.path / DIFFERENCES
        return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=DIFFERENCE_COLUMNS)

    @cached_property
    def gains(self) -> pd.DataFrame:
        """The gain of each client over training alone, with scores as fractions.

        The columns are `algorithm`, `seed`, `test`, `metric`, `client` and `gain`, which is the
        difference from the client's score with `local` and the same seed. A positive gain is
        better, also for errors. The frame is empty if `local` was not compared.
        """
        columns = [name for name in self.frame if GAIN in str(name)]
        gains = self.frame.melt(["algorithm", "seed"], columns, "name", "gain").dropna()
        names = gains.pop("name").str.extract(
            f"(?P<test>.*?)_last_(?P<metric>.*?){GAIN}(?P<client>.*)"
        )
        return gains.join(names)[["algorithm", "seed", "test", "metric", "client", "gain"]]

    @cached_property
    def runs(self) -> list[Run]:
        """The runs, in the order of the rows of `frame`."""
        folders = self.path / "runs"
        return [Run(folders / str(name), self._permission) for name in self.frame["run"]]

    @cached_property
    def _compared(self) -> ComparedRuns:
        """The scores of the runs, with the task of the first run."""
        # Imported here because loading pandas is slow.
        from hetero_fl.reporting.comparison.facts import read_record
        from hetero_fl.reporting.comparison.runs import ComparedRuns

        first = self.runs[0].directory
        task = task_of(first.summary(), first.details())
        scores = self.frame.drop(columns=[name for name in self.frame if GAIN in str(name)])
        return ComparedRuns(scores, task, read_record(self.path).get("jobs"))

    def table(self, moment: str = "last") -> pd.DataFrame:
        """Return the means and standard deviations over seeds as text, one row for each method.

        Args:
            moment: `last` for the last round, or `best` for the round selected by validation.
        """
        # Imported here because loading pandas is slow.
        from hetero_fl.reporting.comparison.tables import score_table

        return score_table(self._compared, moment).frame

    def to_markdown(self) -> str:
        """Return the content of `comparison.md`, with means and standard deviations over seeds."""
        return (self.path / "comparison.md").read_text(encoding="utf-8")

    def to_latex(self) -> str:
        """Return the content of `comparison.tex`, with means and standard deviations over seeds."""
        return (self.path / "comparison.tex").read_text(encoding="utf-8")

    def plot(self) -> Figure:
        """Plot the scores, bytes and time of each method (see `comparison.png`)."""
        # Imported here because loading matplotlib is slow.
        from hetero_fl.reporting.comparison.plots import draw_comparison
        from hetero_fl.reporting.plots.style import plot_style

        enable_figures()
        with plot_style():
            return draw_comparison(self._compared)
