"""Rules against combinations of settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hetero_fl.experiment.compatibility.config_facts import ConfigFacts
from hetero_fl.utils.errors import UserError

Facts = TypeVar("Facts", bound=ConfigFacts)


@dataclass(frozen=True)
class CompatibilityRule(Generic[Facts]):
    """Rule against a combination of settings that cannot work or may not be intended.

    Args:
        keys: The two configuration keys that the rule concerns.
        violation: Function that checks a run. The argument is a `ConfigFacts` or `RunFacts` object.
            The function returns a false value if the run satisfies the rule, and otherwise a
            description of the violation, or a list of such descriptions.
        message: Format string of the message. The field `{run}` is the argument of `violation`. If
            a description is a mapping, its keys are additional fields. Any other description is
            the field `{found}`.
        line_type: Type of the lines: `Caution` if results, or the protection of clients, may not be
            what the configuration suggests, otherwise `str`.
    """

    keys: tuple[str, str]
    violation: Callable[[Facts], Any]
    message: str
    line_type: type[str] = str

    def lines(self, run: Facts) -> list[str]:
        """Return one message for each violation, or no messages if the run satisfies the rule."""
        found = self.violation(run)
        if not found:
            return []
        lines = []
        for violation in found if isinstance(found, list) else [found]:
            values = violation if isinstance(violation, Mapping) else {"found": violation}
            lines.append(self.line_type(self.message.format(run=run, **values)))
        return lines


def check_rules(rules: Mapping[str, CompatibilityRule[Facts]], run: Facts) -> None:
    """Raise UserError with the first message if a run violates a rule."""
    for rule in rules.values():
        for line in rule.lines(run):
            raise UserError(line)
