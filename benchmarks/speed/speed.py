#!/usr/bin/env python3
"""Compare the seconds per round with other executors, plain loops, a commit or another library.

    python -m benchmarks speed [CASE …] [--device cuda] [--rival CHECKOUT] [--out FILE.json]
    python -m benchmarks speed [CASE …] --against COMMIT

Each contender of a case is a process that trains on request. Contenders take turns, in reverse
order every other turn, and the first turn is a warm-up. The output is the median and range of the
seconds and of the time ratios. `--against` compares the working tree with a commit, which is
checked out in a temporary worktree, and ends with the geometric mean of the medians. Names of cases
may be patterns. Images are generated, because times do not depend on their content.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from benchmarks.speed.cases import AGAINST, CASES, Case
from benchmarks.speed.contenders import Config, Framework, Process, Rival, Turns
from tests.support.commits import checked_out, resolve_commit

HERE, COMMIT = "working tree", "commit"
MOST = 5
"""Number of the slowest configurations of a case that are listed."""
RESAMPLES = 4_000
"""Number of samples of the bootstrap."""


@dataclass
class Result:
    """Seconds of a case.

    Attributes:
        seconds: Seconds of each timed turn, keyed by contender.
        by_config: The same for each configuration, keyed by label.
        memory: Peak memory in MiB, keyed by contender. Commands and other libraries have none.
    """

    seconds: dict[str, list[float]]
    by_config: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)

    def median_ratio(self, name: str, other: str, label: str | None = None) -> float:
        """Return the median time ratio of two contenders, of one configuration or of all."""
        seconds = self.seconds if label is None else self.by_config[label]
        return statistics.median(ratios(seconds, name, other))


def ratios(seconds: Mapping[str, Sequence[float]], name: str, other: str) -> list[float]:
    """Return the time ratio of two contenders for each turn."""
    return [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]


def alternate(contenders: Mapping[str, Process | Turns], pairs: int) -> dict[str, list[float]]:
    """Time contenders in turns, in reverse order every other turn.

    Args:
        contenders: The started contenders, keyed by name.
        pairs: Number of timed turns after the warm-up turn.

    Returns:
        The seconds of each timed turn, keyed by contender.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(pairs + 1):
        for name in contenders if index % 2 else reversed(contenders):
            spent = contenders[name].turn()
            if index:
                seconds[name].append(spent)
    return seconds


def measure(case: Case, pairs: int, runtime: Config) -> Result:
    """Measure a case.

    Args:
        case: The case.
        pairs: Number of timed turns after the warm-up turn.
        runtime: Changes to the section `runtime` of all configurations.
    """
    result = Result({name: [0.0] * pairs for name in case.contenders})
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tasks = case.tasks(pairs, folder, runtime)
        started = {}
        for index, (name, contender) in enumerate(case.contenders.items()):
            own = folder / str(index)
            own.mkdir()
            started[name] = stack.enter_context(contender.start(tasks, own))
        for label in case.configs:
            found = alternate(started, pairs)
            result.by_config[label] = found
            for name, spent in found.items():
                totals = zip(result.seconds[name], spent, strict=True)
                result.seconds[name] = [total + seconds for total, seconds in totals]
                if not isinstance(case.contenders[name], Rival):
                    # Complete the run of the configuration.
                    result.memory[name] = started[name].ask().get("peak_mib", math.nan)
    return result


def describe(case: Case, result: Result) -> str:
    """Format the seconds of the contenders, the time ratios and the slowest configurations."""
    lines = [case.name]
    lines += [f"  {name}: {spread(found)} s" for name, found in result.seconds.items()]
    reference, *others = result.seconds
    compared = dict.fromkeys((name, reference) for name in others)
    compared |= {pair: None for pair in case.targets if set(pair) <= result.seconds.keys()}
    for name, other in compared:
        found = ratios(result.seconds, name, other)
        line = f"  {name} / {other}: {spread(found)}, 95% interval {interval([found])}"
        if target := case.targets.get((name, other)):
            line += compared_to_target(result.median_ratio(name, other), target)
        lines.append(line)
        if len(case.configs) > 1:
            medians = {label: result.median_ratio(name, other, label) for label in case.configs}
            slowest = sorted(medians.items(), key=lambda pair: -pair[1])[:MOST]
            lines.append("    " + ", ".join(f"{label} {ratio:.3f}" for label, ratio in slowest))
    if case.memory is not None:
        base = result.memory[reference]
        for name in others:
            ratio = result.memory[name] / base
            lines.append(
                f"  memory of {name} / {reference}: {ratio:.3f} of {base:.0f} MiB"
                + compared_to_target(ratio, case.memory)
            )
    return "\n".join(lines)


def compared_to_target(ratio: float, target: float) -> str:
    """Return whether a ratio meets its target, after a semicolon."""
    return f"; target {target}: {'met' if ratio <= target else 'missed'}"


def spread(values: Sequence[float]) -> str:
    """Format the median and range of values."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def interval(ratios_by_case: Sequence[Sequence[float]]) -> str:
    """Format the 95% interval of the geometric mean of medians, by a percentile bootstrap.

    Args:
        ratios_by_case: Time ratio of each turn, for each case.
    """
    generator = np.random.default_rng(0)
    total = np.zeros(RESAMPLES)
    for found in ratios_by_case:
        drawn = generator.choice(found, (RESAMPLES, len(found)))
        total += np.log(np.median(drawn, axis=1))
    low, high = np.exp(np.percentile(total / len(ratios_by_case), [2.5, 97.5]))
    return f"{low:.3f} to {high:.3f}"


def with_rivals(case: Case, checkout: Path) -> Case:
    """Return the case with the contenders of another library.

    Args:
        case: The case.
        checkout: Checkout of the repository of the library.
    """
    rivals = {name: replace(rival, checkout=checkout) for name, rival in case.rivals.items()}
    return replace(case, contenders={**rivals, **case.contenders})


def against(case: Case, tree: Path) -> Case:
    """Return the case with the working tree and a commit as contenders.

    Args:
        case: The case.
        tree: Source tree of the commit.
    """
    *_, own = case.contenders.values()
    assert isinstance(own, Framework)
    # The configurations name the executor.
    own = replace(own, changes={})
    return replace(
        case,
        contenders={COMMIT: replace(own, tree=tree), HERE: own},
        targets={(HERE, COMMIT): 1.05},
    )


def select(names: Sequence[str], option: str) -> list[Case]:
    """Return the cases that match patterns, or those that are executed with an option by default.

    Raises:
        SystemExit: If a pattern matches no case.
    """
    for name in names:
        if not any(fnmatch(case.name, name) for case in CASES):
            known = ", ".join(case.name for case in CASES)
            sys.exit(f"no case matches {name!r}; choose from {known}")
    return [
        case
        for case in CASES
        if (any(fnmatch(case.name, name) for name in names) if names else option in case.runs_with)
    ]


def main() -> None:
    """Measure the selected cases and print their seconds and time ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names or patterns of cases")
    parser.add_argument("--against", metavar="COMMIT", help="compare the working tree with it")
    parser.add_argument(
        "--rival", type=Path, metavar="CHECKOUT", help="repository of pfl-research or HtFLlib"
    )
    parser.add_argument("--device", default="cpu", help="device of all contenders (cpu)")
    parser.add_argument("--pairs", type=int, default=9, help="turns that are counted (9)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all seconds to a file")
    parser.add_argument("--quick", action="store_true", help="one turn of a case, for tests")
    options = parser.parse_args()
    names = options.cases or (["overhead"] if options.quick else [])
    pairs = 1 if options.quick else options.pairs
    runtime = {} if options.device == "cpu" else {"device": options.device}
    results = {}
    with ExitStack() as stack:
        cases = select(names, AGAINST if options.against else options.device.partition(":")[0])
        if options.against:
            commit = resolve_commit(options.against)
            tree = stack.enter_context(checked_out(commit))
            cases = [against(case, tree) for case in cases]
        if options.rival:
            cases = [with_rivals(case, options.rival.resolve()) for case in cases if case.rivals]
        for case in cases:
            results[case.name] = measure(case, pairs, runtime)
            print(describe(case, results[case.name]), flush=True)
    document = {
        name: {"seconds": r.seconds, "by_config": r.by_config} for name, r in results.items()
    }
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if options.against:
        medians = [result.median_ratio(HERE, COMMIT) for result in results.values()]
        mean = statistics.geometric_mean(medians)
        found = [ratios(result.seconds, HERE, COMMIT) for result in results.values()]
        print(
            f"geometric mean of {len(medians)} medians: {mean:.3f}, 95% interval {interval(found)}"
        )


if __name__ == "__main__":
    main()
