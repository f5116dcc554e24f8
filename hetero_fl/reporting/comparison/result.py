"""Read a comparison from Python: one row per run, the table and the picture."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hetero_fl.reporting.formatting import algorithm_name, tested_metric
from hetero_fl.reporting.notebook import Picture
from hetero_fl.reporting.run import Run
from hetero_fl.utils.code_permission import AllowCode
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import check_entries

if TYPE_CHECKING:
    import pandas as pd


DIFFERENCES = "differences.csv"
"""Name of the file with the paired differences from the best method."""
GAIN = "_gain_"
"""Part of the names of the columns with the gain of a client over the baseline."""
SHOWN = ("global_last_", "personal_last_")
"""Prefixes of the columns that a notebook shows."""


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
        scores = [
            str(c)
            for c in self.frame
            if str(c).startswith(SHOWN) and GAIN not in str(c) and self.frame[c].any()
        ]
        methods = self.frame.assign(algorithm=self.frame["algorithm"].map(algorithm_name))
        means = methods.groupby("algorithm", sort=False)[scores].mean()
        # A column has a name such as `personal_last_auroc`.
        means.columns = [tested_metric(*str(c).split("_last_")) for c in means.columns]
        means.index.name = "method, mean over seeds"
        table = means.to_html(float_format=lambda value: f"{value:.3f}")
        return f"{table}{self.plot()._repr_html_()}"

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
        if path.exists():
            return pd.read_csv(path)
        names = ["algorithm", "difference", "low", "high", "p", "p_holm", "seeds"]
        return pd.DataFrame(columns=names)

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

    def to_markdown(self) -> str:
        """Return the content of `comparison.md`, with means and standard deviations over seeds."""
        return (self.path / "comparison.md").read_text(encoding="utf-8")

    def to_latex(self) -> str:
        """Return the content of `comparison.tex`, with means and standard deviations over seeds."""
        return (self.path / "comparison.tex").read_text(encoding="utf-8")

    def plot(self) -> Picture:
        """Return the picture of the scores, which a notebook displays."""
        return Picture(self.path / "comparison.png")
