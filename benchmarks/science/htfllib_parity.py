#!/usr/bin/env python3
"""Compare the accuracy of methods with HtFLlib on the same split.

    python -m benchmarks htfllib_parity --data FOLDER … [--htfllib CHECKOUT] [--rounds 30]

Each folder `--data` has the format of HtFLlib: `train/K.npz`, `test/K.npz`, optionally
`config.json`. `htfllib_split` writes such a folder from the embedded digits. The methods and their
settings are those of configs/studies/htfllib.yaml, which repeats the settings of HtFLlib's script
`total.sh`. With `--htfllib`, HtFLlib runs on the same folders with the same settings.

The output of a run goes to `OUT/hetero_fl/METHOD-FOLDER-SEED.out` or to
`OUT/HtFLlib/METHOD-FOLDER.out`, with the lines that HtFLlib prints. Finished runs with the same
settings are not repeated. Outputs of HtFLlib from another machine can be placed in `OUT/HtFLlib`.
The table lists the accuracy over all local test rows: the best and the last round, mean ± standard
deviation over folders and seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

import hetero_fl
from benchmarks.common import mean_text, seed_list
from benchmarks.science.htfllib_models import FAMILIES
from hetero_fl.config.data import SourceConfig
from hetero_fl.data import load_source
from hetero_fl.experiment.comparison.jobs import Variant
from hetero_fl.experiment.comparison.study import Study
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.registry import split_label

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "configs" / "studies" / "htfllib.yaml"
OURS = "hetero_fl"
THEIRS = "HtFLlib"
# The options of `total.sh` that all methods share. The study has the same values.
COMMON = "-dev cpu -lr 0.01 -jr 1 -lbs 10 -ls 1 -fd 512"
ACCURACY = re.compile(r"^Averaged Test Accuracy: ([\d.]+)$", re.MULTILINE)
END = "Best accuracy."
# Names of the methods in HtFLlib, and its options for them in `total.sh`.
IN_HTFLLIB: Mapping[str, tuple[str, str]] = {
    "local": ("Local", ""),
    "fd": ("FD", "-lam 1"),
    "fedproto": ("FedProto", "-lam 10"),
    "fedtgp": ("FedTGP", "-lam 10 -se 100 -mart 100"),
    "fedgh": ("FedGH", "-slr 0.01 -se 1"),
    "fml": ("FML", "-al 0.5 -bt 0.5"),
    "fedkd": ("FedKD", "-mlr 0.01 -Ts 0.95 -Te 0.98"),
    "lg_fedavg": ("LG-FedAvg", ""),
}


@dataclass(frozen=True)
class Method:
    """A method of the study.

    Attributes:
        label: The method with its settings, as in the study.
        name: Name of the method in HtFLlib.
        options: Options of the method in HtFLlib.
    """

    label: str
    name: str
    options: str

    @classmethod
    def from_label(cls, label: str) -> Method:
        """Create a method from an entry of the study."""
        return cls(label, *IN_HTFLLIB[split_label(label)[0]])


@dataclass(frozen=True)
class Split:
    """A folder in the format of HtFLlib.

    Attributes:
        path: The folder.
        test_rows: Number of test rows of each client, in natural order of the clients.
        classes: Number of classes.
        digest: Hash of the files of the clients.
    """

    path: Path
    test_rows: tuple[int, ...]
    classes: int
    digest: str

    @classmethod
    def read(cls, path: Path) -> Split:
        """Read the numbers of clients, test rows and classes.

        Raises:
            UserError: If a file is missing or malformed, or a client has no test rows.
        """
        dataset = load_source(SourceConfig(name="htfllib", path=str(path)), path)
        clients = natural_order(dataset.train.group_names)
        test = dataset.local_sets.get("test")
        if test is None or test.group is None or set(test.group_names) != set(clients):
            raise UserError(f"--data: {path}: expected training and test rows of each client")
        counts = dict(zip(test.group_names, test.group.bincount().tolist(), strict=True))
        digest = hashlib.sha256()
        for file in sorted(path.glob("*/*.npz")):
            digest.update(file.read_bytes())
        test_rows = tuple(counts[name] for name in clients)
        return cls(path, test_rows, dataset.task.outputs, digest.hexdigest()[:16])


@dataclass(frozen=True)
class Setting:
    """Settings that the runs of all methods share.

    Attributes:
        rounds: Number of rounds.
        family: Model family.
        out: Folder of the outputs.
    """

    rounds: int
    family: str
    out: Path

    def header(self, split: Split, *more: str) -> str:
        """Return the first line of an output, which identifies the split and the settings."""
        common = [f"split={split.digest}", f"family={self.family}", f"rounds={self.rounds}"]
        return " ".join(["#", *common, *more])


def format_round(round_idx: int, accuracies: Sequence[float], rows: Sequence[int]) -> str:
    """Format the evaluation of a round like HtFLlib.

    The averaged accuracy is the share of correct predictions over the test rows of all clients. The
    standard deviation is that of the clients' accuracies, without weights.

    Args:
        round_idx: Number of completed rounds.
        accuracies: Local test accuracy of each client.
        rows: Number of test rows of each client.
    """
    averaged = np.average(accuracies, weights=rows)
    lines = [f"\n-------------Round number: {round_idx}-------------", ""]
    lines += [f"Client {i}: Acc: {accuracy}" for i, accuracy in enumerate(accuracies)]
    lines += [f"Averaged Test Accuracy: {averaged:.4f}"]
    lines += [f"Std Test Accuracy: {np.std(accuracies):.4f}"]
    return "\n".join(lines)


def format_end(accuracies: Sequence[float]) -> str:
    """Format the end of an output like HtFLlib.

    Args:
        accuracies: Averaged test accuracy of each evaluation.
    """
    return f"\n{END}\n{max(accuracies)}\n"


def read_accuracies(text: str) -> list[float]:
    """Return the averaged test accuracy of each evaluation in an output."""
    return [float(value) for value in ACCURACY.findall(text)]


def is_finished(path: Path, header: str) -> bool:
    """Return whether an output is complete and belongs to the same settings."""
    if not path.exists():
        return False
    text = path.read_text(encoding="utf-8")
    return text.startswith(header + "\n") and END in text


def run_ours(method: Method, split: Split, seed: int, setting: Setting) -> None:
    """Run a method of hetero_fl, unless its output exists.

    Args:
        method: The method.
        split: The split.
        seed: Seed of the run, which does not affect the split.
        setting: Common settings.
    """
    path = our_output(method, split, seed, setting)
    header = setting.header(split, method.label, f"seed={seed}")
    if is_finished(path, header):
        return
    models = FAMILIES[setting.family]
    study = Study.load(STUDY)
    overrides = [
        *study.overrides,
        *Variant.parse(method.label).overrides,
        f"data.path={split.path.resolve()}",
        f"clients.groups=[{{name: client, count: {len(split.test_rows)}}}]",
        f"clients.defaults.model={json.dumps(models)}",
        f"rounds={setting.rounds}",
        f"seed={seed}",
    ]
    if "mentee" in method.label:
        # The global model of HtFLlib has the architecture of the first client.
        overrides.append(f"algorithm.mentee={json.dumps(models[0])}")
    lines = [header]

    def add(record: dict[str, Any]) -> None:
        scores = record["clients"]
        found = [scores[name]["personal"]["accuracy"] for name in natural_order(scores)]
        lines.append(format_round(record["round"], found, split.test_rows))

    with tempfile.TemporaryDirectory() as folder:
        hetero_fl.run(
            study.config,
            out=Path(folder, "run"),
            overrides=overrides,
            callbacks=[add],
            quiet=True,
            allow_code=True,
        )
    lines.append(format_end(read_accuracies("\n".join(lines))))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")


def run_theirs(method: Method, split: Split, setting: Setting, checkout: Path) -> None:
    """Run a method of HtFLlib, unless its output exists.

    Args:
        method: The method.
        split: The split.
        setting: Common settings.
        checkout: Checkout of HtFLlib.

    Raises:
        SystemExit: If HtFLlib fails.
    """
    path = their_output(method, split, setting)
    options = f"{COMMON} -algo {method.name} {method.options}".split()
    options += ["-nc", str(len(split.test_rows)), "-ncl", str(split.classes)]
    options += ["-gr", str(setting.rounds), "-data", "split"]
    header = setting.header(split, *options)
    if is_finished(path, header):
        return
    module = "benchmarks.science.htfllib_reference"
    system = str(checkout.resolve() / "system")
    known = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([known] if known else [])]),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        # HtFLlib reads ../dataset and writes to the working directory and to ../results.
        work = Path(folder, "system")
        work.mkdir()
        Path(folder, "dataset").mkdir()
        Path(folder, "dataset", "split").symlink_to(split.path.resolve())
        command = [sys.executable, "-m", module, system, setting.family, *options]
        ended = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, check=False
        )
    if ended.returncode:
        sys.exit(f"HtFLlib failed in {method.name}:\n{ended.stdout[-500:]}{ended.stderr[-2000:]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{header}\n{ended.stdout}", encoding="utf-8")


def our_output(method: Method, split: Split, seed: int, setting: Setting) -> Path:
    """Return the path of an output of hetero_fl."""
    return setting.out / OURS / f"{method.name}-{split.path.name}-{seed}.out"


def their_output(method: Method, split: Split, setting: Setting) -> Path:
    """Return the path of an output of HtFLlib."""
    return setting.out / THEIRS / f"{method.name}-{split.path.name}.out"


Figures = dict[str, list[float]]


def read_figures(paths: Sequence[Path]) -> Figures:
    """Return the accuracies of the best and the last round of outputs, in percent."""
    found = [read_accuracies(path.read_text(encoding="utf-8")) for path in paths]
    return {
        "best": [100 * max(accuracies) for accuracies in found],
        "last": [100 * accuracies[-1] for accuracies in found],
    }


def format_table(rows: Mapping[str, tuple[Figures, Figures | None]]) -> str:
    """Format the best and the last accuracy of each method.

    Args:
        rows: Figures of hetero_fl and, if known, of HtFLlib, keyed by method. There is one value
            per folder and seed of hetero_fl, and one per folder of HtFLlib.
    """
    cells = [["method", *(f"{p}, {r}" for r in ("best", "last") for p in (OURS, THEIRS, "diff."))]]
    for name, (ours, theirs) in rows.items():
        line = [name]
        for which in ("best", "last"):
            line.append(mean_text(ours[which]))
            if theirs is None:
                line += ["", ""]
                continue
            of_folder = np.reshape(ours[which], (len(theirs[which]), -1)).mean(axis=1)
            differences = (of_folder - theirs[which]).tolist()
            line += [mean_text(theirs[which]), mean_text(differences, sign="+")]
        cells.append(line)
    header, *lines = cells
    return tabulate(lines, header, tablefmt="plain", disable_numparse=True)


def print_ends(program: str, name: str, figures: Figures) -> None:
    """Print the mean and deviation of the best accuracy like HtFLlib at the end of its runs."""
    best = np.array(figures["best"]) / 100
    print(f"\n{program}, {name}:")
    print("std for best accuracy:", np.std(best))
    print("mean for best accuracy:", np.mean(best), flush=True)


def arguments() -> argparse.Namespace:
    """Parse the command line, and exit with one line if a folder cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="folders in the format of HtFLlib"
    )
    parser.add_argument(
        "--methods", metavar="A,B,…", help="methods by their names in HtFLlib (all of the study)"
    )
    parser.add_argument("--rounds", type=int, default=30, help="number of rounds (30)")
    parser.add_argument(
        "--seeds", type=seed_list, default=[0], metavar="A,B,…", help="seeds of hetero_fl (0)"
    )
    parser.add_argument(
        "--family", choices=FAMILIES, default="digits", help="model family of HtFLlib (digits)"
    )
    parser.add_argument("--htfllib", type=Path, metavar="CHECKOUT", help="HtFLlib's repository")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/htfllib_parity"), help="folder of the outputs"
    )
    options = parser.parse_args()
    if len({path.resolve().name for path in options.data}) < len(options.data):
        sys.exit("--data: two folders have the same name, which names the outputs; rename one")
    if options.htfllib is not None and not (options.htfllib / "system" / "flcore").is_dir():
        sys.exit(f"--htfllib: {options.htfllib}: folder 'system/flcore' not found")
    return options


def select_methods(names: str | None) -> list[Method]:
    """Return the methods of the study, or those with the given names."""
    methods = [Method.from_label(label) for label in Study.load(STUDY).algorithms]
    if names is None:
        return methods
    chosen = names.split(",")
    known = [method.name for method in methods]
    if unknown := [name for name in chosen if name not in known]:
        sys.exit(f"--methods: unknown method '{unknown[0]}'; choose from {', '.join(known)}")
    return [method for method in methods if method.name in chosen]


def main() -> None:
    """Execute the missing runs, and print the table and the end of each method."""
    options = arguments()
    methods = select_methods(options.methods)
    seeds = options.seeds
    setting = Setting(options.rounds, options.family, options.out)
    try:
        splits = [Split.read(path) for path in options.data]
        for split in splits:
            for method in methods:
                for seed in seeds:
                    run_ours(method, split, seed, setting)
                if options.htfllib is not None:
                    run_theirs(method, split, setting, options.htfllib)
    except UserError as error:
        sys.exit(str(error))
    rows: dict[str, tuple[Figures, Figures | None]] = {}
    for method in methods:
        ours = [our_output(method, split, seed, setting) for split in splits for seed in seeds]
        theirs = [their_output(method, split, setting) for split in splits]
        rows[method.name] = (
            read_figures(ours),
            read_figures(theirs) if all(path.exists() for path in theirs) else None,
        )
    print(f"{len(splits)} splits, {options.rounds} rounds, models {options.family}; percent")
    print(format_table(rows))
    for name, (our_figures, their_figures) in rows.items():
        print_ends(OURS, name, our_figures)
        if their_figures is not None:
            print_ends(THEIRS, name, their_figures)


if __name__ == "__main__":
    main()
