"""`hetero-fl compare`: many runs side by side, as options say or a study's file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_fl.brackets import pieces
from hetero_fl.cli.asked import option_of_code, permission_of
from hetero_fl.cli.join import numbers
from hetero_fl.errors import UserError

if TYPE_CHECKING:
    from hetero_fl.cli.study import Study


def setup(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--config", "-c", "--conf", type=Path, metavar="FILE", help="YAML or JSON")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the configuration")
    parser.add_argument(
        "--algorithms",
        metavar="A,B,…",
        help="names, or name:setting=value; `all`: whatever this configuration admits",
    )
    parser.add_argument(
        "--study", type=Path, metavar="FILE", help="a YAML file that holds config, algorithms and seeds; options win"
    )
    parser.add_argument("--seeds", metavar="0,1,…", help="default: the study's, else 0")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the comparison; finished runs in it are kept (default, of a study: runs/NAME)",
    )
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one per core, one thread each)")
    parser.add_argument(
        "--grid", action="append", default=[], metavar="key=a,b,c", help="tune each algorithm alike, by validation"
    )
    option_of_code(parser)
    parser.set_defaults(carry_out=carry_out)


def carry_out(options: argparse.Namespace) -> int:
    """Parse, call, print."""
    from hetero_fl.cli.study import Study
    from hetero_fl.experiment import compare

    study = Study.read(options.study) if options.study else None
    config, out = _given(options, "config", study), _given(options, "out", study)
    algorithms = _given(options, "algorithms", study)
    seeds = numbers("--seeds", options.seeds or ("0" if study is None else ",".join(map(str, study.seeds))))
    grid = {}
    for entry in options.grid:
        key, equals, values = entry.partition("=")
        if not equals or not values:
            raise UserError(f"--grid: found '{entry}'; write key=a,b,c")
        grid[key] = pieces(values, ",")
    origins = {}
    if study is not None:
        own = study.overrides if options.algorithms else [*study.overrides, *study.algorithms]
        origins = dict.fromkeys(own, f"study {options.study.name}")
    found = compare(
        config,
        algorithms,
        seeds,
        out=out,
        overrides=[*(study.overrides if study else []), *options.overrides],
        grid=grid,
        jobs=options.jobs if options.jobs is not None or study is None else study.jobs,
        quiet=options.quiet,
        origins=origins,
        allow_code=permission_of(options),
    )
    print((found / "comparison.md").read_text(encoding="utf-8"))
    return 0


def _given(options: argparse.Namespace, name: str, study: Study | None) -> Any:
    value = getattr(options, name)
    value = getattr(study, name) if value is None and study is not None else value
    if value is None:
        raise UserError(f"--{name} is missing: give it, or a --study that holds it (see --help)")
    return value
