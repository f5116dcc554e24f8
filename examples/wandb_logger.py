"""Log the rounds of a run to Weights & Biases (`pip install wandb`).

python examples/wandb_logger.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def wandb_logger(**settings: Any) -> Callable[[Mapping[str, Any]], None]:
    """A callback for `hetero_fl.run`; `settings` are those of `wandb.init` (project, name, config, mode …)."""
    import wandb

    logged = wandb.init(**settings)

    def log(record: Mapping[str, Any]) -> None:
        logged.log(figures(record), step=record["round"])

    return log


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """A round's means over clients by name (`global/accuracy`), its bytes, and the clients' mean training loss."""
    found = {
        f"{reading}/{metric}": value
        # at home, in common, the server's own model
        for reading in ("personal", "global", "server")
        for metric, value in (record.get(reading) or {}).items()
        if value is not None  # None: the metric is not defined (a class is missing)
    }
    losses = list(record["train_loss"].values())
    if losses:
        found["train_loss"] = sum(losses) / len(losses)
    return found | {"up_bytes": record["up_bytes"], "down_bytes": record["down_bytes"]}


if __name__ == "__main__":
    import wandb

    import hetero_fl

    run = hetero_fl.run(
        "configs/digits_quickstart.yaml", callbacks=[wandb_logger(project="hetero_fl")], quiet=False
    )
    wandb.finish()
