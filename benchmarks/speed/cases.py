"""Cases of the benchmark `speed`: configurations, contenders, and targets of the time ratios."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.speed.contenders import (
    Config,
    Contender,
    Framework,
    HtFLlib,
    PflResearch,
)
from benchmarks.speed.federations import FLOWER, OURS, FlowerApp, Pipes
from hetero_fl.utils.environment import available_cores
from tests.frozen_bits.cases import METHODS, merged

CPU, CUDA, AGAINST = "cpu", "cuda", "--against"
LOOP = "bare loop"
FEW, MANY = "1,000 clients", "1,000,000 clients"
SERIAL = Framework({"runtime": {"executor": "serial"}})
BATCHED = Framework({"runtime": {"executor": "batched"}})
TWO_WORKERS = Framework({"runtime": {"executor": "processes", "workers": 2, "threads": 1}})
AUTO = Framework({"runtime": {"executor": "auto"}})
EXECUTORS = {"serial": SERIAL, "batched": BATCHED, "processes": TWO_WORKERS, "auto": AUTO}
VECTORIZED = {"serial": SERIAL, "batched": BATCHED}
REFERENCE_LOOP = Framework(form="loop")
SERIAL_AGAINST_LOOP = {LOOP: REFERENCE_LOOP, "serial": SERIAL}
ALL_CORES = {"executor": "serial", "threads": available_cores()}
LABEL_SKEW = {
    "partition": {"kind": "dirichlet", "alpha": 0.5, "min_size": 30},
    "split": {"validation": 0.0, "test": 0.25},
}
LARGE_MODELS = ["fedavg_cnn", "torchvision:resnet18"]
# The CNN of HtFLlib has no padding.
HTFLLIB_MODELS = ["python:benchmarks.science.htfllib_models:ValidCNN", "torchvision:resnet18"]


class Images(NamedTuple):
    """Numbers of random training images, of their pixels on a side, and of their channels."""

    rows: int
    side: int
    channels: int

    def write(self, path: Path) -> Config:
        """Write images of ten classes in the MedMNIST layout.

        Args:
            path: The `.npz` file to write.

        Returns:
            The section `data` of a configuration that reads the file.
        """
        generator = np.random.default_rng(0)
        shape = (self.side, self.side, *([self.channels] if self.channels > 1 else []))
        arrays = {}
        for part, count in {"train": self.rows, "val": 100, "test": 200}.items():
            arrays[f"{part}_images"] = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
            arrays[f"{part}_labels"] = generator.integers(0, 10, (count, 1), dtype=np.uint8)
        np.savez(path, **arrays)
        return {"name": "npz", "path": str(path)}


@dataclass(frozen=True)
class Case:
    """Configurations whose times are summed, and the programs that execute them in turns.

    In each turn of a case, each contender executes all configurations.

    Args:
        name: Name of the case.
        configs: Configurations, keyed by label.
        contenders: Programs to compare, keyed by name. The first is the reference.
        targets: Largest acceptable ratio of the times of two contenders, keyed by their names.
        images: Generated images of the configurations. If None, they name a data set.
        rounds: Rounds per turn. If 0, a turn is a whole run.
        length: Number of rounds of a whole run.
        rivals: Programs of another library that `--rival` adds, keyed by name.
        runs_with: Devices and options with which the case is executed by default.
        memory: Largest acceptable ratio of the peak memory to that of the first contender. If None,
            memory is not compared.
    """

    name: str
    configs: Mapping[str, Config]
    contenders: Mapping[str, Contender]
    targets: Mapping[tuple[str, str], float] = field(default_factory=dict)
    images: Images | None = None
    rounds: int = 1
    length: int = 1
    rivals: Mapping[str, Contender] = field(default_factory=dict)
    runs_with: tuple[str, ...] = (CPU,)
    memory: float | None = None

    def tasks(self, pairs: int, folder: Path, runtime: Config) -> list[dict[str, Any]]:
        """Write the images, and return the tasks of a process for `timed_rounds.py`.

        Args:
            pairs: Number of timed turns.
            folder: Folder of the images.
            runtime: Changes to the section `runtime` of all configurations.
        """
        data = self.images.write(folder / "images.npz") if self.images else {}
        tasks = []
        for config in self.configs.values():
            # The only round of DENSE does all the work.
            rounds = 0 if config["algorithm"]["name"] == "dense" else self.rounds
            # One round before the first turn, and one after the last turn with a full evaluation.
            planned = pairs * rounds + 2 if rounds else self.length
            changes = {"data": data, "runtime": runtime, "rounds": planned}
            tasks.append({"config": merged(config, changes), "turns": pairs, "rounds": rounds})
        return tasks


def federation(method: str = "fedavg", **sections: Any) -> Config:
    """Return a configuration with SGD, one thread, and no local tests, plots or report.

    Args:
        method: Name of the method.
        **sections: Sections that are merged into the configuration.
    """
    base: Config = {
        "name": "speed",
        "data": {
            "partition": {"kind": "iid"},
            "split": {"validation": 0.0, "test": 0.0},
            "proxy": {"size": 0},
        },
        "clients": {"defaults": {"optimizer": {"name": "sgd", "lr": 0.05}, "batch_size": 10}},
        "algorithm": {"name": method},
        "runtime": {"executor": "serial", "threads": 1},
        "output": {"plots": False, "report": False},
    }
    if method == "dense":
        quick = {"synthesis_epochs": 2, "generator_steps": 3, "student_steps": 4}
        base["algorithm"] |= quick
    return merged(base, sections)


def fedavg_cifar(name: str, runtime: Config, contenders: Mapping[str, Contender]) -> Case:
    """Return a case of FedAvg with a CNN on images of CIFAR-10 shape.

    Args:
        name: Name of the case.
        runtime: Section `runtime` of the configuration.
        contenders: Programs to compare.
    """
    config = federation(
        clients={"count": 20, "defaults": {"model": "fedavg_cnn", "steps": 5}},
        evaluation={"every": 1_000},
        runtime=runtime,
    )
    return Case(
        name,
        {"fedavg": config},
        contenders,
        {("serial", LOOP): 1.05, ("auto", LOOP): 0.8},
        Images(1_100, side=32, channels=3),
        runs_with=(CPU, AGAINST),
    )


def population(count: int) -> Config:
    """Return the section `clients` with a number of clients, of which 50 train in a round."""
    groups = [{"name": "client", "count": count, "model": "mlp"}]
    return {"clients": {"per_round": 50, "groups": groups}}


def small_federation(method: str) -> Config:
    """Return a configuration with three small CNNs and three MLPs, for comparisons of commits."""
    return federation(
        method,
        data={
            "name": "digits",
            "train_limit": 700,
            "test_limit": 100,
            "proxy": {"size": 100},
            **LABEL_SKEW,
        },
        clients={
            "groups": [
                {"name": "cnn", "count": 3, "model": "cnn_gn_small"},
                {"name": "mlp", "count": 3, "model": {"name": "mlp", "hidden": [64]}},
            ],
        },
        server={"model": "linear"},
    )


def federation_of_loops(method: str) -> Config:
    """Return a configuration whose steps are as long as usual, for comparisons with loops."""
    return federation(
        method,
        data={"proxy": {"size": 200}, **LABEL_SKEW},
        clients={
            "count": 6,
            "defaults": {"model": ["fedavg_cnn", "cnn_bn_small"], "batch_size": 32},
        },
    )


def executors(
    name: str,
    images: Images,
    clients: int,
    defaults: Config,
    *,
    contenders: Mapping[str, Contender] = EXECUTORS,
    targets: Mapping[tuple[str, str], float] | None = None,
    length: int = 0,
    runs_with: tuple[str, ...] = (CPU,),
) -> Case:
    """Return a case of FedAvg that compares executors.

    Args:
        name: Name of the case.
        images: Generated images.
        clients: Number of clients.
        defaults: Settings of the clients.
        contenders: Programs to compare.
        targets: Targets besides that of `auto`, which must not be slower than any other.
        length: If positive, a turn is a whole run of so many rounds.
        runs_with: Devices and options with which the case is executed by default.
    """
    config = federation(
        clients={"count": clients, "defaults": defaults}, evaluation={"every": 1_000}
    )
    return Case(
        name,
        {"fedavg": config},
        contenders,
        {
            **{("auto", other): 1.1 for other in ("serial", "batched", "processes")},
            **(targets or {}),
        },
        images,
        rounds=0 if length else 1,
        length=length,
        runs_with=runs_with,
    )


GRAY, COLOR = (28, 1), (32, 3)
MLP = Images(6_000, *GRAY), 100, {"model": "mlp"}
SMALL_CNN = Images(1_200, *GRAY), 20, {"model": "cnn_bn_small"}
CNN = Images(1_000, *COLOR), 20, {"model": "fedavg_cnn"}
RESNET = Images(576, *COLOR), 6, {"model": "torchvision:resnet18", "batch_size": 32}
TWO_MODELS = Images(1_200, *GRAY), 20, {"model": ["mlp", "cnn_bn_small"]}
MANY_CNNS = Images(6_000, *GRAY), 100, {"model": "cnn_bn_small"}
MANY_RESNETS = Images(6_000, *COLOR), 100, {"model": "resnet8"}
TRANSFORMER = {"name": "vit", "patch": 4, "width": 192, "depth": 12, "heads": 3}
MANY_TRANSFORMERS = Images(6_000, *COLOR), 100, {"model": TRANSFORMER}

CASES = [
    Case(
        "overhead",
        {
            "fedavg": federation(
                clients={"count": 300, "defaults": {"model": "linear", "steps": 1}},
                evaluation={"every": 1_000},
            )
        },
        SERIAL_AGAINST_LOOP,
        images=Images(6_000, side=8, channels=1),
        rounds=2,
        runs_with=(CPU, AGAINST),
    ),
    fedavg_cifar("fedavg_cifar_serial", ALL_CORES, {**SERIAL_AGAINST_LOOP, "auto": AUTO}),
    fedavg_cifar(
        "fedavg_cifar_processes",
        {"executor": "processes", "workers": 2},
        {LOOP: REFERENCE_LOOP, "two workers": TWO_WORKERS},
    ),
    Case(
        "heterogeneous",
        {
            method: federation(
                method,
                data={"split": {"validation": 0.0, "test": 0.25}, "test_limit": 50},
                clients={"count": 4, "defaults": {"model": LARGE_MODELS, "batch_size": 25}},
                runtime=ALL_CORES,
            )
            for method in ("fd", "fedproto", "fml", "fedkd")
        },
        {**SERIAL_AGAINST_LOOP, "two workers": TWO_WORKERS},
        {("serial", LOOP): 1.05, ("two workers", LOOP): 0.82},
        Images(200, *COLOR),
        runs_with=(CPU, AGAINST),
    ),
    Case(
        "executors",
        {
            f"{method}, {name}": federation(
                method,
                data={"split": {"validation": 0.0, "test": 0.25}, "test_limit": 50},
                clients={"count": clients, "defaults": defaults},
                **contender.changes,
            )
            for method, clients, defaults in (
                ("fedavg", 24, {"model": "cnn_bn_small", "batch_size": 32, "steps": 10}),
                # Models of 8 MB, which are the private state.
                ("fd", 12, {"model": "fedavg_cnn"}),
            )
            for name, contender in (("serial", SERIAL), ("two workers", TWO_WORKERS))
        },
        {"hetero_fl": Framework()},
        images=Images(1_200, *COLOR),
        runs_with=(AGAINST,),
    ),
    Case(
        "every_method",
        {method: small_federation(method) for method in METHODS},
        {"serial": SERIAL},
        runs_with=(AGAINST,),
    ),
    Case(
        "loops",
        {method: federation_of_loops(method) for method in METHODS},
        SERIAL_AGAINST_LOOP,
        {("serial", LOOP): 1.05},
        Images(2_000, *GRAY),
    ),
    Case(
        "population",
        {
            method: federation(
                method,
                data={"name": "digits", "partition": {"kind": "drawn", "alpha": 0.5, "rows": 60}},
                evaluation={"clients": 50},
                **population(1_000_000),
            )
            # Clients of FedPer have private state.
            for method in ("fedavg", "fedper")
        },
        {FEW: Framework(population(1_000)), MANY: Framework()},
        {(MANY, FEW): 1.1},
        rounds=3,
        runs_with=(CPU, AGAINST),
        memory=1.2,
    ),
    Case(
        "cohort",
        {
            "fedavg": federation(
                data={"partition": {"kind": "iid", "min_size": 2}},
                clients={
                    "count": 200,
                    "per_round": 200,
                    "defaults": {"model": "fedavg_cnn", "steps": 1},
                },
                evaluation={"every": 1_000, "clients": 2},
            )
        },
        {
            "2 clients a round": Framework({"clients": {"per_round": 2}}),
            "serial": SERIAL,
            "two workers": TWO_WORKERS,
        },
        images=Images(400, *COLOR),
        memory=1.15,
    ),
    Case(
        "startup",
        {
            "fedavg": federation(
                data={"name": "digits", "split": {"test": 0.2}},
                clients={"count": 4, "defaults": {"model": ["mlp", "cnn_bn_small"]}},
            )
        },
        {"command": Framework(form="command")},
        rounds=0,
        runs_with=(CPU, AGAINST),
    ),
    executors("executors_mlp", *MLP, targets={("auto", "serial"): 0.5}, runs_with=(CPU, CUDA)),
    executors("executors_small_cnn", *SMALL_CNN, targets={("batched", "serial"): 0.7}),
    executors("executors_cnn", *CNN),
    executors("executors_resnet", *RESNET),
    executors("executors_two_models", *TWO_MODELS),
    executors("runs_mlp_short", *MLP, length=2),
    executors("runs_mlp_long", *MLP, length=40),
    executors("runs_small_cnn_short", *SMALL_CNN, length=4),
    executors("runs_small_cnn_long", *SMALL_CNN, length=80),
    executors("runs_cnn_short", *CNN, length=2),
    executors("runs_cnn_long", *CNN, length=20),
    executors("runs_resnet_short", *RESNET, length=1),
    executors("runs_resnet_long", *RESNET, length=5),
    executors("runs_two_models_short", *TWO_MODELS, length=5),
    executors("runs_two_models_long", *TWO_MODELS, length=80),
    executors(
        "vectorized_cnn",
        *MANY_CNNS,
        contenders=VECTORIZED,
        targets={("batched", "serial"): 0.2},
        runs_with=(CUDA,),
    ),
    executors("vectorized_resnet", *MANY_RESNETS, contenders=VECTORIZED, runs_with=(CUDA,)),
    executors("vectorized_vit", *MANY_TRANSFORMERS, contenders=VECTORIZED, runs_with=(CUDA,)),
    executors(
        "precision",
        *MANY_RESNETS,
        contenders={
            "float32": SERIAL,
            "bfloat16": Framework({"runtime": {"executor": "serial", "precision": "bfloat16"}}),
        },
        runs_with=(CUDA,),
    ),
    Case(
        "federation_overhead",
        {
            "fedavg": federation(
                data={"name": "digits"},
                clients={"groups": [{"name": "site", "count": 4, "model": "mlp"}]},
            )
        },
        {
            "Flower's own": FlowerApp(FLOWER),
            "over Flower": FlowerApp(OURS),
            "over pipes": Pipes(),
        },
        {("over Flower", "Flower's own"): 1.3, ("over pipes", "Flower's own"): 0.1},
    ),
    Case(
        "pfl_research",
        {
            "fedavg": federation(
                clients={
                    "count": 1_000,
                    "per_round": 50,
                    "defaults": {
                        "model": "python:benchmarks.speed.pfl_model:SimpleCNN",
                        "optimizer": {"lr": 0.1},
                    },
                },
                evaluation={"every": 10_000},
            )
        },
        {"serial": SERIAL, "auto": AUTO},
        {("serial", "pfl-research"): 0.97, ("auto", "pfl-research, two processes"): 0.95},
        Images(50_000, *COLOR),
        rivals={
            "pfl-research": PflResearch(processes=1),
            "pfl-research, two processes": PflResearch(processes=2),
        },
        runs_with=(CPU, CUDA),
    ),
    Case(
        "htfllib",
        {
            "fd": federation(
                "fd",
                data={"split": {"validation": 0.0, "test": 0.25}, "test_limit": 32},
                clients={
                    "count": 20,
                    "defaults": {
                        "model": HTFLLIB_MODELS,
                        # HtFLlib fails if a loss is not finite, as with a larger rate.
                        "optimizer": {"lr": 0.001},
                        "batch_size": 32,
                    },
                },
                runtime=ALL_CORES,
            )
        },
        {**VECTORIZED, "two workers": TWO_WORKERS},
        {
            ("batched", "HtFLlib"): 0.2,
            ("serial", "HtFLlib"): 0.95,
            ("two workers", "HtFLlib"): 0.7,
        },
        Images(20 * 256, *COLOR),
        rivals={"HtFLlib": HtFLlib()},
        runs_with=(CPU, CUDA),
    ),
]
