"""What a comparison may claim: p-values of enough seeds, and the words under a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hetero_fl.reporting.wording import MISSING, digits
from hetero_fl.task import Task

LEAST_SEEDS = 5
"""With fewer pairs a paired t-test has so little power, and leans so much on normality, that its p is no finding."""


def p_value(a: Mapping[int, float], b: Mapping[int, float]) -> str:
    """Two-sided paired t-test over the seeds that both have; a dash where they are too few for a finding."""
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < LEAST_SEEDS:
        return MISSING
    difference = np.array([a[s] - b[s] for s in seeds])
    if np.ptp(difference) <= 1e-12:  # the test statistic would be 0/0 or infinite
        return "1" if abs(difference[0]) <= 1e-12 else "<0.001"
    from scipy import stats  # takes longer to load than everything else here

    p = float(stats.ttest_rel([a[s] for s in seeds], [b[s] for s in seeds]).pvalue)
    return "<0.001" if p < 0.001 else digits(p, 2)


def seconds_note(jobs: int | None) -> str:
    """What “Seconds” are, and whether they can be compared."""
    text = "Seconds: a run by the clock, evaluation included"
    if jobs == 1:
        return f"{text}, one run at a time."
    shared = f"{jobs} runs shared the machine" if jobs else "runs may have shared the machine"
    return f"{text}; {shared}, so they are no measure of speed."


def caption_of(first: str, seeds: Sequence[int], found: Sequence[str], bounds: bool, task: Task) -> str:
    """What stands under a table; `first`: the column that p-values are about, `found`: those p-values."""
    scale = (
        f"Errors in {task.unit or 'the target’s unit'}"
        if task.kind == "regression"
        else f"Metrics in percent{', but for the perplexity' if task.many else ''}"
    )
    if len(seeds) > 1:
        text = f"{scale}, mean ± standard deviation over seeds {', '.join(map(str, seeds))}. "
    else:
        text = f"{scale}, one seed ({seeds[0]}): differences may be chance. "
    if bounds:
        text += "Below the rule: bounds, which have all rows or all models in one place and take no part. "
    text += "Bold: best of the column. "
    if any(p not in ("", "best", MISSING) for p in found):
        text += f"p: two-sided paired t-test by seed against the best in “{first}”, uncorrected. "
    if MISSING in found:
        text += "A dash under p: fewer than five seeds, too few for a test. "
    return text + "MB: 10⁶ bytes exchanged in a run, up and down, as encoded."
