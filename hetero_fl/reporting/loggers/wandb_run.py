"""Logger for Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr
from typing_extensions import override

from hetero_fl.reporting.loggers.base import (
    EVALUATIONS,
    LoggedRun,
    Logger,
    register_logger,
    round_scalars,
)


@register_logger("wandb")
class WandbLogger(Logger):
    """Log to Weights & Biases.

    A resumed run continues the same run at Weights & Biases. The library stores its files in
    `wandb/` in the run directory.
    """

    module: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "loggers"

    project: str = Field("hetero_fl", min_length=1, description="project of the run")
    entity: str | None = Field(
        None, description="user or team that owns the project; `null`: the default of the account"
    )
    name: str | None = Field(
        None, description="displayed name of the run; `null`: name of the run directory"
    )
    group: str | None = Field(
        None, description="group of the run; `null`: `name` of the configuration"
    )
    tags: list[str] = Field([], description="tags of the run")
    mode: Literal["online", "offline", "disabled"] | None = Field(
        None,
        description="`offline`: write files only, for `wandb sync`; `disabled`: log nothing; "
        "`null`: WANDB_MODE if it is set, else online",
    )

    _run: Any = PrivateAttr(None)
    _has_finished: bool = PrivateAttr(False)

    @override
    def start(self, run: LoggedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.name or run.label,
            group=self.group or run.name,
            tags=self.tags,
            config=dict(run.config),
            dir=str(run.path),
            id=run.run_id,
            resume="allow",
            mode=self.mode,
            # A program may have other runs.
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        if self._run.offline:
            run.log(f"wandb: offline; to upload: wandb sync {run.path / 'wandb'}/*-{run.run_id}*")
        elif self._run.url:
            run.log(f"wandb: {self._run.url}")

    @override
    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log(round_scalars(record), step=record["round"])

    @override
    def finish(self, summary: Mapping[str, Any]) -> None:
        for test in EVALUATIONS:
            self._run.summary[f"summary/{test}"] = summary[test]
        self._has_finished = True

    @override
    def close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if self._has_finished else 1)
