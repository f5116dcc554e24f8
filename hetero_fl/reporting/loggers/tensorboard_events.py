"""Logger that writes event files for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import yaml
from pydantic import PrivateAttr
from typing_extensions import override

from hetero_fl.reporting.loggers.base import LoggedRun, Logger, register_logger, round_scalars

FOLDER = "tensorboard"


@register_logger("tensorboard")
class TensorBoardLogger(Logger):
    """Write event files to `tensorboard/` in the run directory.

    The step is the round. The resolved configuration is logged as text.
    """

    module: ClassVar[str] = "tensorboard"
    extra: ClassVar[str] = "loggers"

    _writer: Any = PrivateAttr(None)

    @override
    def start(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides events of this and later steps that were written before an interruption.
        purged = run.first_round if run.first_round > 1 else None
        self._writer = SummaryWriter(str(run.path / FOLDER), purge_step=purged)
        if purged is None:
            text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
            self._writer.add_text("config", f"```yaml\n{text}```", 0)

    @override
    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in round_scalars(record).items():
            self._writer.add_scalar(name, value, record["round"])
        self._writer.flush()

    @override
    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
