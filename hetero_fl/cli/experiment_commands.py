"""The commands `audit`, `compare`, `export`, `join` and `check`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_fl.cli.run_options import add_code_option, code_permission_from, make_printer
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.text import split_top_level

if TYPE_CHECKING:
    from hetero_fl.experiment.comparison import Study


# `hetero-fl audit`: what a finished run gives away.


def setup_audit(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument(
        "--clients", metavar="ID,…", help="whose rows are sought (default: the first two clients)"
    )
    parser.add_argument(
        "--attack",
        default="both",
        metavar="NAME",
        help="membership, inversion or both (default), as far as they can be tried",
    )
    parser.add_argument(
        "--shadows",
        type=int,
        default=4,
        help="shadow runs, even (default: 4); 0: the attack by the loss alone, at once",
    )
    parser.add_argument(
        "--images", type=int, default=3, help="steps to invert, of each client (default: 3)"
    )
    parser.add_argument(
        "--batch", type=int, default=1, help="images in a step, 1 to 4 (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the audit's own draws (default: 0)")
    parser.add_argument(
        "--out", type=Path, help="folder for figures, picture and report (default: RUN/audit)"
    )
    add_code_option(parser)
    parser.set_defaults(run_command=run_audit)


def run_audit(options: argparse.Namespace) -> int:
    """Parse, call, print."""
    from rich.console import Console
    from rich.table import Table

    from hetero_fl.experiment import audit
    from hetero_fl.experiment.auditing.report import (
        INVERSION,
        MEMBERSHIP,
        inversion_rows,
        membership_rows,
    )

    out = options.out or options.run / "audit"
    content = audit(
        options.run,
        clients=[name.strip() for name in options.clients.split(",") if name.strip()]
        if options.clients
        else None,
        attack=options.attack,
        shadows=options.shadows,
        images=options.images,
        batch=options.batch,
        seed=options.seed,
        out=out,
        say=make_printer(options),
        allow_code=code_permission_from(options),
    )
    for title, columns, rows in (
        ("membership inference", MEMBERSHIP, membership_rows(content)),
        ("gradient inversion", INVERSION, inversion_rows(content)),
    ):
        if rows:
            table = Table(*columns, title=title)
            for row in rows:
                table.add_row(*row)
            Console().print(table)
    for note in content["notes"]:
        make_printer(options)(note)
    make_printer(options)(f"report: {out / 'audit.html'}")
    print(out)
    return 0


# `hetero-fl compare`: many runs side by side, as options say or a study's file.


def setup_compare(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--config", "-c", "--conf", type=Path, metavar="FILE", help="YAML or JSON")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="changes to the configuration"
    )
    parser.add_argument(
        "--algorithms",
        metavar="A,B,…",
        help="names, or name:setting=value; `all`: whatever this configuration admits",
    )
    parser.add_argument(
        "--study",
        type=Path,
        metavar="FILE",
        help="a YAML file that holds config, algorithms and seeds; options win",
    )
    parser.add_argument("--seeds", metavar="0,1,…", help="default: the study's, else 0")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the comparison; finished runs in it are kept (default, of a study: runs/NAME)",
    )
    parser.add_argument(
        "--jobs", type=int, help="runs at a time (default: one per core, one thread each)"
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="key=a,b,c",
        help="tune each algorithm alike, by validation",
    )
    add_code_option(parser)
    parser.set_defaults(run_command=run_compare)


def run_compare(options: argparse.Namespace) -> int:
    """Parse, call, print."""
    from hetero_fl.experiment import compare
    from hetero_fl.experiment.comparison import Study

    study = Study.load(options.study) if options.study else None
    config = _option_or_study(options, "config", study)
    out = _option_or_study(options, "out", study)
    algorithms = _option_or_study(options, "algorithms", study)
    seeds = parse_numbers(
        "--seeds", options.seeds or ("0" if study is None else ",".join(map(str, study.seeds)))
    )
    grid = {}
    for entry in options.grid:
        key, equals, values = entry.partition("=")
        if not equals or not values:
            raise UserError(f"--grid: found '{entry}'; write key=a,b,c")
        grid[key] = split_top_level(values, ",")
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
        allow_code=code_permission_from(options),
    )
    print((found / "comparison.md").read_text(encoding="utf-8"))
    return 0


def _option_or_study(options: argparse.Namespace, name: str, study: Study | None) -> Any:
    value = getattr(options, name)
    value = getattr(study, name) if value is None and study is not None else value
    if value is None:
        raise UserError(f"--{name} is missing: give it, or a --study that holds it (see --help)")
    return value


# `hetero-fl export`: models of a finished run as files that predict without this package.


def setup_export(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("--client", metavar="ID", help="whose model, or server (default: all)")
    parser.add_argument(
        "--format",
        default="onnx",
        metavar="NAME",
        help="onnx (default) or safetensors",
    )
    parser.add_argument(
        "--home", action="store_true", help="with the client's own label frequencies"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for models, cards and score.py (default: RUN/export)"
    )
    add_code_option(parser)
    parser.set_defaults(run_command=run_export)


def run_export(options: argparse.Namespace) -> int:
    """Parse, call, print."""
    from hetero_fl.experiment import export

    made = export(
        options.run,
        options.client,
        options.format,
        options.out,
        options.home,
        say=make_printer(options),
        allow_code=code_permission_from(options),
    )
    print(next(iter(made.values())).model.parent)
    return 0


# `hetero-fl join`: what a finished run is worth to a newcomer.


def setup_join(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE|NAME",
        help="the newcomer's: a local file or folder, or a source by name",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="of the zoo (default: the run's most frequent)"
    )
    parser.add_argument(
        "--take",
        choices=("backbone", "teacher", "both"),
        help="begin with (default: each that there is)",
    )
    parser.add_argument(
        "--label",
        metavar="COLUMN",
        help="of a table: the column of labels (default: the run's own)",
    )
    parser.add_argument(
        "--patients",
        default="10,30,100,300",
        metavar="N,…",
        help="labelled (default: 10,30,100,300)",
    )
    parser.add_argument("--seeds", default="0,1,2,3,4", metavar="0,1,…")
    parser.add_argument(
        "--epochs",
        type=int,
        default=10,
        help="of fine-tuning, but at least 60 steps (default: 10); from scratch × 4",
    )
    parser.add_argument(
        "--out", type=Path, help="folder for table, picture and JSON (default: RUN/join-MODEL)"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="the newcomer's settings: optimizer.lr=…",
    )
    add_code_option(parser)
    parser.set_defaults(run_command=run_join)


def run_join(options: argparse.Namespace) -> int:
    """Parse, call, print."""
    from hetero_fl.experiment import join
    from hetero_fl.experiment.onboarding.transfer import TransferSource
    from hetero_fl.reporting.run import Run

    patients, seeds = (
        parse_numbers(f"--{name}", getattr(options, name)) for name in ("patients", "seeds")
    )
    if options.epochs < 1:
        raise UserError(f"--epochs: found {options.epochs}; take 1 or more")
    permission = code_permission_from(options)
    run = Run(options.run, permission)
    model = options.model or TransferSource(run).most_common_model
    named = "".join(c if c.isalnum() or c in "._-" else "_" for c in model)
    out = options.out or options.run / f"join-{named}"
    join(
        run,
        options.data,
        model,
        out=out,
        label=options.label,
        transfer=options.take,
        patients=patients,
        seeds=seeds,
        epochs=options.epochs,
        overrides=options.overrides,
        say=make_printer(options),
        allow_code=permission,
    )
    print((out / "join.md").read_text(encoding="utf-8"))
    print(out)
    return 0


def parse_numbers(flag: str, text: str) -> list[int]:
    """Whole numbers with commas between them. Raises UserError for anything else, and for none."""
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise UserError(f"{flag}: found '{text}'; write whole numbers with commas, such as 0,1,2")
    return found


# `hetero-fl check`: whether a run directory is whole.


def setup_check(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run, finished or not")
    parser.set_defaults(run_command=run_check)


def run_check(options: argparse.Namespace) -> int:
    """Parse, inspect, print. Returns 2 if something is missing or damaged."""
    from hetero_fl.reporting.integrity import inspect
    from hetero_fl.reporting.run_directory import is_locked

    if is_locked(options.run):
        raise UserError(
            f"{options.run}: another process is at work there; check it when that has ended"
        )
    found = inspect(options.run)
    for line in found.lines:
        print(f"error: {line}", file=sys.stderr)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if found.damage:
        return 2
    print(f"{options.run}: whole; {found.state}")
    return 0
