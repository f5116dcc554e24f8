"""200 generated invalid configurations: exit status 2, one line that names the key, no files."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hetero_fl.cli import main
from tests.support.cases import each_case

ROOT = Path(__file__).parents[2]
MEDICAL = yaml.safe_load((ROOT / "configs" / "benchmark" / "xrays_three_base.yaml").read_text())
Case = tuple[dict[str, Any], list[str], str]  # configuration, overrides, what the line must name


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def changed(path: tuple[Any, ...], value: Any = None, rename: str = "") -> dict[str, Any]:
    result = copy.deepcopy(MEDICAL)
    place = result
    for key in path[:-1]:
        place = place[key]
    if rename:
        place[rename] = place.pop(path[-1])
    else:
        place[path[-1]] = value
    return result


def misspelled_or_mistyped() -> Iterator[Case]:
    rng = random.Random(3)
    paths = [p for p in leaves(MEDICAL) if not isinstance(p[-1], int)]
    for i in range(130):
        path = paths[i % len(paths)]
        key = str(path[-1])
        if i % 2:
            at = rng.randrange(len(key))
            misspelt = rng.choice(
                [key + "x", key[:at] + key[at] + key[at:], key[:at] + "q" + key[at + 1 :]]
            )
            yield changed(path, rename=misspelt), [], misspelt
        else:
            yield (
                changed(path, rng.choice([{"a": 1}, [[]], [{"b": []}], float("nan"), {}])),
                [],
                key,
            )


OUT_OF_RANGE = [
    "rounds=0",
    "rounds=-3",
    "rounds=many",
    "rounds=2.5",
    "seed=-1",
    "roundz=3",
    "evaluation.every=0",
    "evaluation.patience=0",
    "runtime.workers=0",
    "runtime.threads=0",
    "runtime.device=tpu",
    "runtime.executor=quick",
    "runtime.mode=lockstep",
    "runtime.divergence=hope",
    "algorithm.name=fedmdd",
    "algorithm.temperature=0",
    "algorithm.temperature=-1",
    "algorithm.teacher=loud",
    "algorithm.heads=lose",
    "algorithm.distill_at=home",
    "algorithm.digest_epochs=0",
    "algorithm.mu=1",
    "data.partition.kind=dirichle",
    "data.partition.alpha=0",
    "data.partition.alpha=nan",
    "data.partition.alpha=inf",
    "data.partition.min_size=0",
    "data.partition.min_size=5000",
    "data.partition.classes=0",
    "data.split.test=1",
    "data.split.validation=0.9",
    "data.validation=1",
    "data.train_limit=0",
    "data.test_limit=0",
    "data.proxy.size=-1",
    "data.proxy.size=100000000",
    "data.name=chest_xrays",
    "data.path=no/such/file.npz",
    "data.path=no/such/folder",
    "clients.count=7",
    "clients.per_round=0",
    "clients.per_round=9",
    "clients.groups.0.model=cnn_bn_smal",
    "clients.groups.0.model=timm:no_such_net",
    "clients.groups.0.count=0",
    "clients.groups.7.count=2",
    "clients.groups.0.optimizer.lr=0",
    "clients.groups.0.optimizer.name=sdg",
    "clients.groups.0.optimizer.momentum=1",
    "clients.groups.0.optimizer.clip_norm=0",
    "clients.groups.0.epochs=0",
    "clients.groups.0.batch_size=0",
    "clients.groups.0.shares=[images]",
    "clients.groups.0.share_every=0",
    "clients.groups.0.scanner.contrast=0",
    "clients.groups.0.scanner.resolution=2",
    "clients.groups.0.preprocess.channels=2",
    "clients.groups.0.preprocess.resize=0",
    "clients.groups.0.augment.rotate=400",
    "clients.groups.0.class_weights=[1,2,3]",
    "clients.overrides.0.match=nobody_*",
    "server.model=resnt18",
    "init_from=no/such/run",
    "clients.defaults.class_weights=heavy",
]

IMPOSSIBLE = [
    (["algorithm.name=fedmd", "data.proxy.size=0"], "proxy"),
    (["algorithm.name=feddf", "data.proxy.size=0"], "proxy"),
    (
        [
            "algorithm.name=fedmd",
            "clients.defaults.shares=[parameters]",
            "clients.groups.2.shares=[backbone]",
        ],
        "shares",
    ),
    (
        [
            "algorithm.name=fd",
            "clients.defaults.shares=[parameters]",
            "clients.groups.2.shares=[backbone]",
        ],
        "shares",
    ),
    (["clients.groups.0.shares=[parameters,backbone]"], "shares"),
    (["data.train_limit=400"], "proxy"),
    (["data.partition.kind=natural"], "natural"),
    (["clients.groups.0.name=county"], "county"),
    (["clients.groups.0.fraction=0.5"], "fraction"),
]


def bad_values() -> Iterator[Case]:
    for override in OUT_OF_RANGE:
        key, value = override.split("=", 1)
        yield (
            MEDICAL,
            [override],
            value.strip("[]") if value.startswith("no/") else key.split(".")[-1].replace("7", ""),
        )
    for overrides, names in IMPOSSIBLE:
        yield MEDICAL, overrides, names


def bad_files(folder: Path) -> Iterator[Case]:
    """Yield files in the MedMNIST layout with one defect each."""
    rng = np.random.default_rng(0)
    x, y = (
        rng.integers(0, 255, (300, 28, 28), dtype=np.uint8),
        rng.integers(0, 2, (300, 1), dtype=np.uint8),
    )
    good = {"train_images": x, "train_labels": y, "test_images": x[:50], "test_labels": y[:50]}
    nan = x.astype(np.float32) / 255
    nan[7, 3, 3] = np.nan
    wrong: dict[str, dict[str, Any]] = {
        "nan": {"train_images": nan},
        "flat": {"train_images": x.reshape(300, -1)},
        "short": {"train_labels": y[:299]},
        "unlabelled": {"train_labels": None},
        "no_images": {"train_images": None},
        "empty": {"train_images": x[:0], "train_labels": y[:0]},
        "objects": {"train_labels": np.array([{"a": 1}] * 300, dtype=object)},
        "text": {"train_labels": np.array([["ill"]] * 300)},
        "negative": {"train_labels": y.astype(np.int64) - 3},
        "other_size": {"test_images": x[:50, :14]},
        "few": {"train_images": x[:40], "train_labels": y[:40]},
        "one_client_of_one": {"train_images": x[:7], "train_labels": y[:7]},
    }
    for name, change in wrong.items():
        path = folder / f"{name}.npz"
        np.savez(path, **{k: v for k, v in {**good, **change}.items() if v is not None})
        yield MEDICAL, [f"data.path={path}", "data.proxy.size=0", "algorithm.name=fedavg"], ""
    for name, content in {
        "torn.npz": b"PK\x03\x04torn",
        "none.npz": b"",
        "text.npz": b"a,b\n1,2\n",
    }.items():
        (folder / name).write_bytes(content)
        yield MEDICAL, [f"data.path={folder / name}"], name


def not_configurations(folder: Path) -> Iterator[tuple[Path, str]]:
    contents = {
        "tab.yaml": "a:\n\t- b",
        "list.yaml": "- 1\n- 2",
        "text.yaml": "hello",
        "torn.yaml": "a: [1, 2",
        "bytes.yaml": "a: \x00",
    }
    for name, text in contents.items():
        (folder / name).write_text(text)
        yield folder / name, name
    yield folder / "missing.yaml", "missing.yaml"


def refused(
    arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str], names: str
) -> None:
    status = main([*arguments, "--out", str(out)], command="train")
    error_lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2, (arguments, error_lines)
    assert len(error_lines) == 1 and error_lines[0].startswith("error: "), (arguments, error_lines)
    assert names in error_lines[0], (arguments, names, error_lines)
    assert "Traceback" not in error_lines[0] and not out.exists()


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_invalid_configurations_exit_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    cases = [*misspelled_or_mistyped(), *bad_values(), *bad_files(tmp_path)]
    assert len(cases) >= 200
    for i, (tree, overrides, names) in enumerate(cases[::step]):
        path = tmp_path / f"{i}.yaml"
        path.write_text(yaml.safe_dump(tree))
        refused(["--config", str(path), *overrides], tmp_path / f"out{i}", capsys, names)
    for path, names in not_configurations(tmp_path):
        refused(["--config", str(path)], tmp_path / "out", capsys, names)


@each_case(
    "number",
    [
        "9" * 5000,
        "0x" + "f" * 5000,
        "0" + "7" * 6000,
        "1" + ":59" * 3000,
        "1" + ":59" * 3000 + ".5",
    ],
)
def test_numbers_of_thousands_of_digits_exit_with_one_line(
    number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = str(ROOT / "configs" / "digits_quickstart.yaml")
    assert main(["--config", digits, f"rounds={number}"], command="train") == 2
    capsys.readouterr()
    for line in (
        "rounds: {}",
        "seed: {}",
        "version: {}",
        "clients: {{count: {}}}",
        "data: {{train_limit: {}}}",
        "algorithm: {{name: fedprox, mu: {}}}",
        "clients: {{defaults: {{model: {{name: mlp, hidden: [{}]}}}}}}",
    ):
        (tmp_path / "c.yaml").write_text(line.format(number))
        refused(["--config", str(tmp_path / "c.yaml")], tmp_path / "out", capsys, "error")
