"""How often to ask whether something has come: often at first, seldom when nothing has come for long."""

from __future__ import annotations

SHORTEST, LONGEST = 0.02, 0.5  # seconds
SLOWER = 1.15  # a factor from one question to the next: the longest pause after 24, three seconds in all


class Pace:
    """Pauses that grow by a factor until something comes."""

    def __init__(self) -> None:
        self._pause = SHORTEST

    def next(self) -> float:
        """Seconds until the next question."""
        pause, self._pause = self._pause, min(self._pause * SLOWER, LONGEST)
        return pause

    def reset(self) -> None:
        """Something has come: more may follow soon."""
        self._pause = SHORTEST
