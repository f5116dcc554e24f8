"""Global validation and test sets, and the splits of each client.

Rows are held out at random, by patient, or by date.
"""

from hetero_fl.data.splits.holdout import (
    common_sets,
    holdout_strategy,
    with_test,
)
from hetero_fl.data.splits.rows import (
    MIN_TRAIN_ROWS,
    RowSelection,
    Splits,
    check_categories,
    check_classes,
    draw_rows,
    enough_rows,
    mark_rare_class,
    sample_patients,
    split_by_date,
    split_counts,
)

__all__ = [
    "MIN_TRAIN_ROWS",
    "RowSelection",
    "Splits",
    "check_categories",
    "check_classes",
    "common_sets",
    "draw_rows",
    "enough_rows",
    "holdout_strategy",
    "mark_rare_class",
    "sample_patients",
    "split_by_date",
    "split_counts",
    "with_test",
]
