"""What a site's file allows a server to ask for; nothing is limited that is not named."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from hetero_fl.config.base import Section
from hetero_fl.errors import nearest
from hetero_fl.own_code import OWN


class BudgetConfig(Section):
    """What this site's training rows may be given away in all runs together, by its own account."""

    epsilon: PositiveFloat = Field(description="ε of everything that it has ever answered")
    delta: float = Field(
        1e-5, gt=0, lt=1, description="δ at which ε is computed; well below one over its training rows"
    )


class AllowsConfig(Section):
    """Limits of a site, against which every configuration, task and answer is checked before it goes on."""

    methods: list[str] | None = Field(None, description="values of algorithm.name; none: any")
    own_code: list[str] = Field(
        [],
        description="python:module:Name that a server's configuration may have this site run; the node needs `--allow-code`",
    )
    rounds: PositiveInt | None = Field(
        None, description="most rounds of a run, and most times that it trains in one; none: no limit, here and below"
    )
    epochs: PositiveFloat | None = Field(None, description="most passes over its rows in one task")
    steps: PositiveInt | None = Field(None, description="most optimiser steps in one task")
    upload_bytes: PositiveInt | None = Field(None, description="most bytes of one upload")
    total_bytes: PositiveInt | None = Field(None, description="most bytes of all its answers, in all runs together")
    secure_sum_only: bool = Field(False, description="whether an upload may leave in a secure sum alone")
    cohort: PositiveInt | None = Field(
        None, description="fewest clients whose sum may be told: of a secure sum, those with whom it shares masks"
    )
    privacy: BudgetConfig | None = Field(
        None, description="only runs whose noise this site adds itself (privacy.unit: record or local), up to this much"
    )

    @model_validator(mode="after")
    def _known(self) -> AllowsConfig:
        from hetero_fl.algorithms import algorithm

        for name in self.methods or ():
            if name not in algorithm and not name.startswith(OWN):
                raise ValueError(f"found method '{name}'{nearest(name, algorithm, '`hetero-fl methods`')}")
        for name in self.own_code:
            if not name.startswith(OWN):
                raise ValueError(f"found own_code '{name}'; write python:package.module:Name")
        return self
