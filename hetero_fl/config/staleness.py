"""What an upload is worth that comes from an older version of the server: settings of asynchronous running."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from hetero_fl.config.base import Section, choice

Kind = choice("constant", "polynomial", "hinge")
STEEPNESS = {"constant": 0.0, "polynomial": 0.5, "hinge": 10.0}  # a, as Xie et al. have it


class StalenessConfig(Section):
    """s(τ), τ being the versions that the server has made since the client was given its task (Xie et al. 2019, section 5.2)."""

    kind: Kind = Field(  # type: ignore[valid-type]
        "polynomial",
        description="constant: 1; polynomial: (1 + τ)^−a; hinge: 1 up to τ = b, 1/(a·(τ − b) + 1) after it",
    )
    a: NonNegativeFloat | None = Field(None, description="how steep; none: 0.5 of the polynomial, 10 of the hinge")
    b: NonNegativeInt = Field(4, description="of the hinge: versions that cost nothing")

    @property
    def unused(self) -> list[str]:
        """What is set, and means nothing to this kind."""
        steep = ["a"] if self.kind == "constant" and self.a is not None else []
        return [*steep, *(["b"] if self.kind != "hinge" and self.b != StalenessConfig().b else [])]

    def weight(self, staleness: int) -> float:
        """s(τ), 1 for an upload that is not stale."""
        a = STEEPNESS[self.kind] if self.a is None else self.a
        if self.kind == "polynomial":
            return float((1 + staleness) ** -a)
        return 1.0 if self.kind == "constant" or staleness <= self.b else 1 / (a * (staleness - self.b) + 1)
