"""Scores of published tables that a CPU can replicate, and the settings of the replications.

Accuracies are percentages, with the standard deviation if the paper reports one.
"""

from __future__ import annotations

from dataclasses import dataclass

# Placeholder in overrides for the data file of the table.
FILE = "{file}"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        method: Name of the method.
        changes: Overrides of the configuration.
        mean: Published mean, or None.
        deviation: Published standard deviation, or None.
        mended: Mean and standard deviation that the authors published after they corrected an error
            in their code, or None.
        minutes: Duration of a run on one core of the machine described in benchmarks/README.md.
        seeds: Number of requested seeds that are used, starting with the first. If None, all
            requested seeds are used.
    """

    method: str
    changes: tuple[str, ...]
    mean: float | None = None
    deviation: float | None = None
    mended: tuple[float, float] | None = None
    minutes: float = 1.0
    seeds: int | None = None


@dataclass(frozen=True)
class Table:
    """A published table.

    Attributes:
        name: Name of the table.
        title: Title of the table.
        config: Name of the configuration file without suffix.
        file: Name of the data file.
        accuracy: Accuracy that corresponds to the paper: "personal", "global" or "server".
        rows: Rows of the table.
        seeds: Default seeds.
        held: Whether the paper's code evaluates each model on the classes of its client only.
    """

    name: str
    title: str
    config: str
    file: str
    accuracy: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    held: bool = False


def _fedgen(alpha: str, published: dict[str, tuple[float, float | None]]) -> list[Row]:
    """Return the rows of FedGen's table for one α.

    Args:
        alpha: Concentration of the Dirichlet distribution.
        published: Published mean and deviation, keyed by method.
    """
    proxy = f"data.proxy={{size: 3000, source: {{name: mnist, path: '{FILE}'}}}}"
    feddf = ("algorithm.name=feddf", "algorithm.temperature=1", "algorithm.distill_epochs=1", proxy)
    changes = {
        "FedAvg": ("algorithm.name=fedavg",),
        "FedProx": (
            "algorithm.name=fedprox",
            "algorithm.mu=1",
            "clients.defaults.optimizer.weight_decay=0.001",
        ),
        "FD": ("algorithm.name=fd",),
        "FedDF": (*feddf, "server.optimizer.lr=0.001"),
        "FedDF, distilled at 0.0001": (*feddf, "server.optimizer.lr=0.0001"),
        "FedGen": (
            "algorithm.name=fedgen",
            "algorithm.weight=10",
            "algorithm.latent_weight=10",
            "algorithm.decay=0.98",
        ),
        "FedAvg, BatchNorm statistics kept": ("algorithm.name=fedbn", "algorithm.keep=statistics"),
    }
    mended = {("0.1", "FedAvg"): (90.71, 1.17), ("0.1", "FedGen"): (95.68, 0.20)}
    minutes = {"FedDF": 4.0, "FedDF, distilled at 0.0001": 4.0, "FD": 4.0}
    skew = f"data.partition.alpha={alpha}"
    return [
        Row(
            f"{m}, α {alpha}",
            (skew, *c),
            *published.get(m, (None, None)),
            mended=mended.get((alpha, m)),
            minutes=minutes.get(m, 3.0),
        )
        for m, c in changes.items()
    ]


FEDGEN = Table(
    "fedgen",
    "MNIST, FedGen's table (Zhu et al., ICML 2021)",
    "fedgen_mnist",
    "mnist.npz",
    "global",
    (
        *_fedgen(
            "0.1",
            {
                "FedAvg": (90.16, 0.59),
                "FedProx": (90.10, None),
                "FD": (64.11, 1.36),
                "FedDF": (91.11, None),
                "FedDF, distilled at 0.0001": (91.11, None),
                "FedGen": (93.03, 0.32),
            },
        ),
        *_fedgen(
            "0.05",
            {
                "FedAvg": (87.70, None),
                "FedProx": (87.49, None),
                "FD": (70.56, None),
                "FedDF": (90.02, None),
                "FedDF, distilled at 0.0001": (90.02, None),
                "FedGen": (91.30, None),
            },
        ),
    ),
    held=True,
)

_WIDTHS = tuple(
    f"clients.groups.{i}.model={{name: fedproto_cnn, width: {width}}}"
    for i, width in enumerate((18, 20, 22))
)

FEDPROTO = Table(
    "fedproto",
    "MNIST, FedProto's table (Tan et al., AAAI 2022)",
    "fedproto_mnist",
    "mnist.npz",
    "personal",
    (
        Row("Local", ("algorithm.name=local",), 94.05, 2.93, minutes=5.0),
        Row(
            "FedAvg",
            ("algorithm.name=fedavg", "algorithm.weighting=uniform"),
            95.04,
            6.48,
            minutes=5.0,
        ),
        Row(
            "FedProto",
            ("algorithm.name=fedproto", "algorithm.inference=own"),
            97.13,
            0.30,
            minutes=5.0,
        ),
        Row(
            "FedProto, widths 18, 20, 22",
            ("algorithm.name=fedproto", "algorithm.inference=own", *_WIDTHS),
            97.07,
            0.50,
            minutes=5.0,
        ),
        Row(
            "FedProto, nearest of all prototypes",
            ("algorithm.name=fedproto",),
            minutes=5.0,
            seeds=1,
        ),
        Row(
            "FedProto, by the head",
            ("algorithm.name=fedproto", "algorithm.inference=head"),
            minutes=5.0,
            seeds=1,
        ),
    ),
)

NIID = Table(
    "niid",
    "MNIST, NIID-Bench (Li et al., ICDE 2022)",
    "niid_mnist",
    "mnist.npz",
    "server",
    (
        Row("FedAvg", ("algorithm.name=fedavg",), 98.89, minutes=25.0),
        Row("SCAFFOLD", ("algorithm.name=scaffold",), 99.07, minutes=25.0),
        Row("FedProx", ("algorithm.name=fedprox", "algorithm.mu=0.01"), 99.02, minutes=25.0),
    ),
    seeds=(0,),
)

ORDERING = Table(
    "ordering",
    "CIFAR-10, eight architectures: FedTGP > FD ≳ Local > FedProto (Zhang et al., AAAI 2024)",
    "ordering_cifar10",
    "cifar10.npz",
    "personal",
    (
        Row("Local", ("algorithm.name=local",), minutes=8.0),
        Row("FD", ("algorithm.name=fd",), minutes=8.0),
        Row("FedProto", ("algorithm.name=fedproto", "algorithm.weight=10"), minutes=8.0),
        Row("FedTGP", ("algorithm.name=fedtgp", "algorithm.weight=10"), minutes=8.0),
    ),
)

# With these settings, clients take 225 steps per round, as in the paper.
_STEPS = ("rounds=20", "evaluation.every=5", "clients.defaults.epochs=7")

ORDERING_LIGHT = Table(
    "ordering_light",
    "CIFAR-10, the same order with eight light architectures",
    "ordering_light",
    "cifar10.npz",
    "personal",
    (
        *ORDERING.rows,
        Row(
            "FedTGP, τ 10",
            ("algorithm.name=fedtgp", "algorithm.weight=10", "algorithm.margin=10"),
            minutes=8.0,
        ),
        Row("FedTGP, λ 1", ("algorithm.name=fedtgp", "algorithm.weight=1"), minutes=8.0),
        *(
            Row(
                f"{row.method}, 7 epochs a round, 20 rounds{more}",
                (*row.changes, *_STEPS, *skew),
                minutes=12.0,
            )
            for more, skew in (("", ()), (", α 1.0", ("data.partition.alpha=1.0",)))
            for row in ORDERING.rows
            if row.method != "FD"
        ),
    ),
    seeds=(0,),
)

TABLES = {table.name: table for table in (FEDGEN, FEDPROTO, NIID, ORDERING, ORDERING_LIGHT)}
