"""The commands `audit`, `compare`, `export`, `join` and `check`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.exceptions import Exit

from hetero_fl.cli.run_options import (
    PATH,
    allow_code_option,
    code_permission,
    command,
    config_option,
    make_printer,
    overrides_argument,
    quiet_option,
    run_argument,
)
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.text import split_top_level

if TYPE_CHECKING:
    from hetero_fl.experiment.comparison import Study


@command()
@run_argument
@click.option(
    "--clients", metavar="ID,…", help="whose rows are sought (default: the first two clients)"
)
@click.option(
    "--attack",
    default="both",
    metavar="NAME",
    help="membership, inversion or both, as far as they apply",
)
@click.option(
    "--shadows", default=4, help="shadow runs, even; 0: the attack by the loss alone, at once"
)
@click.option("--images", default=3, help="steps to invert, of each client")
@click.option("--batch", default=1, help="images in a step, 1 to 4")
@click.option("--seed", default=0, help="of the audit's own draws")
@click.option(
    "--out", type=PATH, help="folder for figures, picture and report (default: RUN/audit)"
)
@allow_code_option
@quiet_option
def audit(
    run: Path,
    clients: str | None,
    attack: Literal["membership", "inversion", "both"],
    shadows: int,
    images: int,
    batch: int,
    seed: int,
    out: Path | None,
    allow_code: bool,
    quiet: bool,
) -> None:
    """Attack a finished run: who was a member, and images from an upload."""
    from rich.console import Console
    from rich.table import Table

    from hetero_fl import experiment
    from hetero_fl.experiment.auditing.report import (
        INVERSION,
        MEMBERSHIP,
        inversion_rows,
        membership_rows,
    )

    folder = out or run / "audit"
    say = make_printer(quiet)
    content = experiment.audit(
        run,
        clients=[name.strip() for name in clients.split(",") if name.strip()] if clients else None,
        attack=attack,
        shadows=shadows,
        images=images,
        batch=batch,
        seed=seed,
        out=folder,
        say=say,
        allow_code=code_permission(allow_code),
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
        say(note)
    say(f"report: {folder / 'audit.html'}")
    print(folder)


@command()
@overrides_argument
@config_option
@click.option(
    "--algorithms",
    metavar="A,B,…",
    help="names, or name:setting=value; `all`: all that this configuration admits",
)
@click.option(
    "--study",
    type=PATH,
    metavar="FILE",
    help="a YAML file that holds config, algorithms and seeds; options win",
)
@click.option("--seeds", metavar="0,1,…", help="default: the study's, else 0")
@click.option(
    "--out",
    type=PATH,
    help="folder of the comparison; finished runs in it are kept (default, of a study: runs/NAME)",
)
@click.option("--jobs", type=int, help="runs at a time (default: one per core, one thread each)")
@click.option(
    "--grid", multiple=True, metavar="key=a,b,c", help="tune each algorithm alike, by validation"
)
@allow_code_option
@quiet_option
def compare(
    overrides: tuple[str, ...],
    config: Path | None,
    algorithms: str | None,
    study: Path | None,
    seeds: str | None,
    out: Path | None,
    jobs: int | None,
    grid: tuple[str, ...],
    allow_code: bool,
    quiet: bool,
) -> None:
    """Compare algorithms over seeds: table, figure and report."""
    from hetero_fl import experiment
    from hetero_fl.experiment.comparison import Study

    loaded = Study.load(study) if study else None
    source = _option_or_study("config", config, loaded)
    folder = _option_or_study("out", out, loaded)
    labels = _option_or_study("algorithms", algorithms, loaded)
    tuned = {}
    for entry in grid:
        key, equals, values = entry.partition("=")
        if not equals or not values:
            raise UserError(f"--grid: found '{entry}'; write key=a,b,c")
        tuned[key] = split_top_level(values, ",")
    changes = [*(loaded.overrides if loaded else ()), *(overrides)]
    origins = {}
    if loaded is not None and study is not None:
        own = loaded.overrides if algorithms else [*loaded.overrides, *loaded.algorithms]
        origins = dict.fromkeys(own, f"study {study.name}")
    default_seeds = "0" if loaded is None else ",".join(map(str, loaded.seeds))
    found = experiment.compare(
        source,
        labels,
        parse_numbers("--seeds", seeds or default_seeds),
        out=folder,
        overrides=changes,
        grid=tuned,
        jobs=loaded.jobs if jobs is None and loaded is not None else jobs,
        quiet=quiet,
        origins=origins,
        allow_code=code_permission(allow_code),
    )
    print((found / "comparison.md").read_text(encoding="utf-8"))


def _option_or_study(name: str, value: Any, study: Study | None) -> Any:
    value = getattr(study, name) if value is None and study is not None else value
    if value is None:
        raise UserError(f"--{name} is missing: give it, or a --study that holds it (see --help)")
    return value


@command()
@run_argument
@click.option("--client", metavar="ID", help="whose model, or server (default: all)")
@click.option(
    "--format",
    "file_format",
    default="onnx",
    metavar="NAME",
    help="onnx or safetensors",
)
@click.option("--home", is_flag=True, help="with the client's own label frequencies")
@click.option(
    "--out", type=PATH, help="folder for models, cards and score.py (default: RUN/export)"
)
@allow_code_option
@quiet_option
def export(
    run: Path,
    client: str | None,
    file_format: str,
    home: bool,
    out: Path | None,
    allow_code: bool,
    quiet: bool,
) -> None:
    """Export models of a run as files that predict without this package."""
    from hetero_fl import experiment

    made = experiment.export(
        run,
        client,
        file_format,
        out,
        home,
        say=make_printer(quiet),
        allow_code=code_permission(allow_code),
    )
    print(next(iter(made.values())).model.parent)


@command()
@run_argument
@click.argument(
    "overrides",
    nargs=-1,
    metavar="[key.path=value]...",
    help="settings of the joining client: optimizer.lr=…",
)
@click.option(
    "--data",
    required=True,
    metavar="FILE|NAME",
    help="the joining client's: a local file or folder, or a source by name",
)
@click.option("--model", metavar="NAME", help="of the zoo (default: the run's most frequent)")
@click.option(
    "--take",
    type=click.Choice(["backbone", "teacher", "both"]),
    help="begin with (default: each that there is)",
)
@click.option(
    "--label",
    metavar="COLUMN",
    help="of a table: the column of labels (default: the run's own)",
)
@click.option("--patients", default="10,30,100,300", metavar="N,…", help="labeled")
@click.option("--seeds", default="0,1,2,3,4", metavar="0,1,…")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=10,
    help="of fine-tuning, but at least 60 steps; from scratch × 4",
)
@click.option(
    "--out", type=PATH, help="folder for table, picture and JSON (default: RUN/join-MODEL)"
)
@allow_code_option
@quiet_option
def join(
    run: Path,
    overrides: tuple[str, ...],
    data: str,
    model: str | None,
    take: str | None,
    label: str | None,
    patients: str,
    seeds: str,
    epochs: int,
    out: Path | None,
    allow_code: bool,
    quiet: bool,
) -> None:
    """Join a finished run as a new client, and compare with training from scratch."""
    from hetero_fl import experiment
    from hetero_fl.experiment.onboarding.transfer import TransferSource
    from hetero_fl.reporting.run import Run

    labeled = parse_numbers("--patients", patients)
    numbers = parse_numbers("--seeds", seeds)
    permission = code_permission(allow_code)
    loaded = Run(run, permission)
    model = model or TransferSource(loaded).most_common_model
    named = "".join(c if c.isalnum() or c in "._-" else "_" for c in model)
    folder = out or run / f"join-{named}"
    experiment.join(
        loaded,
        data,
        model,
        out=folder,
        label=label,
        transfer=take,
        patients=labeled,
        seeds=numbers,
        epochs=epochs,
        overrides=overrides,
        say=make_printer(quiet),
        allow_code=permission,
    )
    print((folder / "join.md").read_text(encoding="utf-8"))
    print(folder)


def parse_numbers(flag: str, text: str) -> list[int]:
    """Parse whole numbers with commas between them. Raises UserError for anything else, and for none."""
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise UserError(f"{flag}: found '{text}'; write whole numbers with commas, such as 0,1,2")
    return found


@command()
@click.argument("run", type=PATH, metavar="RUN", help="directory of a run, finished or not")
def check(run: Path) -> None:
    """Check that a run directory is whole: lines, checksums, models, checkpoints."""
    from hetero_fl.reporting.integrity import inspect
    from hetero_fl.reporting.run_directory import is_locked

    if is_locked(run):
        raise UserError(f"{run}: another process is at work there; check it when that has ended")
    found = inspect(run)
    for line in found.lines:
        print(f"error: {line}", file=sys.stderr)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if found.damage:
        raise Exit(2)
    print(f"{run}: whole; {found.state}")
