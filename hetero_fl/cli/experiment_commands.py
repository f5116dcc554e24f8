"""The commands `audit`, `compare`, `export`, `join` and `check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.exceptions import Exit

from hetero_fl.cli.run_options import (
    METHODS_HINT,
    PATH,
    PERSONAL_HELP,
    allow_code_option,
    best_option,
    command,
    config_option,
    examples,
    make_printer,
    overrides_argument,
    quiet_option,
    run_argument,
)
from hetero_fl.utils.errors import UserError, echo
from hetero_fl.utils.text import split_top_level

if TYPE_CHECKING:
    from hetero_fl.experiment.comparison.study import Study
    from hetero_fl.utils.code_permission import AllowCode


@command(epilog=examples("hetero-fl audit runs/my-run --attack membership --shadows 8"))
@run_argument
@click.option(
    "--clients",
    metavar="ID,...",
    help="Ids of the clients to attack.  [default: the first two clients]",
)
@click.option(
    "--attack",
    default="both",
    metavar="NAME",
    help="Attack to run: membership, inversion, or both. With both, attacks that do not apply are "
    "skipped.",
)
@click.option(
    "--shadows",
    default=4,
    help="Number of shadow runs, which repeat the run with different training rows: an even "
    "number >= 4, or 0 for the loss attack only.",
)
@click.option(
    "--images",
    default=3,
    help="Number of training steps to invert per client, each on one image.",
)
@click.option("--seed", default=0, help="Random seed of the audit.")
@click.option(
    "--out",
    type=PATH,
    metavar="DIR",
    help="Output folder for audit.json and audit.html.  [default: RUN/audit]",
)
@allow_code_option
@quiet_option
def audit(
    *,
    run: Path,
    clients: str | None,
    attack: Literal["membership", "inversion", "both"],
    shadows: int,
    images: int,
    seed: int,
    out: Path | None,
    allow_code: AllowCode,
    quiet: bool,
) -> None:
    """Audit the privacy of a finished run by attacking it.

    Membership inference determines which rows a client trained on. Gradient inversion reconstructs
    training images from an upload.
    """
    from rich.table import Table

    from hetero_fl import experiment
    from hetero_fl.experiment.auditing.audit import audit_tables
    from hetero_fl.reporting.terminal import Terminal

    folder = out or run / "audit"
    log = make_printer(quiet)
    content = experiment.audit(
        run,
        clients=[name.strip() for name in clients.split(",") if name.strip()] if clients else None,
        attack=attack,
        shadows=shadows,
        images=images,
        seed=seed,
        out=folder,
        log=log,
        allow_code=allow_code,
    )
    for title, (columns, *rows) in audit_tables(content).items():
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*row)
        Terminal().print(table)
    for note in content["notes"]:
        log(note)
    log(f"report: {folder / 'audit.html'}")
    echo(folder)


@command(
    epilog=examples(
        "hetero-fl compare -c configs/digits_quickstart.yaml --algorithms fedavg,fedprox \\",
        "    --seeds 0,1,2 --out runs/comparison",
        "hetero-fl compare --study configs/studies/effect_of_k.yaml",
        hint=METHODS_HINT,
    )
)
@overrides_argument
@config_option("Configuration file (YAML or JSON). Optional with --study.")
@click.option(
    "--algorithms",
    metavar="A,B,...",
    help="Methods to compare, as NAME or NAME:setting=value. `all` selects all compatible methods. "
    "Optional with --study.",
)
@click.option(
    "--study",
    type=PATH,
    metavar="FILE",
    help="Study file (YAML) with config, algorithms and seeds. Options override its values.",
)
@click.option(
    "--seeds", metavar="0,1,...", help="Random seeds.  [default: seeds of the study, otherwise 0]"
)
@click.option(
    "--out",
    type=PATH,
    metavar="DIR",
    help="Output folder. Finished runs in it are reused. Optional with --study.  "
    "[default: as in the study]",
)
@click.option(
    "--jobs",
    type=int,
    help="Number of parallel runs.  "
    "[default: as in the study, otherwise one per core with one thread each]",
)
@click.option(
    "--grid",
    multiple=True,
    metavar="key=a,b,c",
    help="Values of a key to try. Each method uses the value with the best validation score. "
    "May be repeated.",
)
@click.option(
    "--search",
    type=click.Choice(["optuna"]),
    help="Search the values of --space with Optuna, which stops runs early if "
    "they score worse than others after the same number of rounds. Each method uses "
    "the values with the best validation score.",
)
@click.option(
    "--space",
    multiple=True,
    metavar="key=low..high",
    help="Values of a key to search: low..high, low..high:log or a,b,c. May be repeated.",
)
@click.option(
    "--budget",
    metavar="RUNS|HOURSh",
    help="Budget of the search for each method: a number of runs, or hours of training such as "
    "1.5h.  [default: 20]",
)
@allow_code_option
@quiet_option
def compare(
    *,
    overrides: tuple[str, ...],
    config: Path | None,
    algorithms: str | None,
    study: Path | None,
    seeds: str | None,
    out: Path | None,
    jobs: int | None,
    grid: tuple[str, ...],
    search: str | None,
    space: tuple[str, ...],
    budget: str | None,
    allow_code: AllowCode,
    quiet: bool,
) -> None:
    """Compare methods over several seeds.

    The table is printed and written to --out together with figures and a report. To continue
    an interrupted comparison, repeat the command.
    """
    from hetero_fl import experiment
    from hetero_fl.cli.printing import print_comparison
    from hetero_fl.experiment.comparison.study import Study

    loaded = Study.load(study) if study else None
    source = _option_or_study("config", config, loaded)
    folder = _option_or_study("out", out, loaded)
    labels = _option_or_study("algorithms", algorithms, loaded)
    if bool(search) != bool(space):
        raise UserError("--search: use it together with --space, such as --space key=low..high")
    if budget is not None and not search:
        raise UserError("--budget: use it together with --search")
    grid_values = {
        key: split_top_level(values, ",")
        for key, values in _parse_pairs("--grid", grid, "key=a,b,c").items()
    }
    searched = _parse_pairs("--space", space, "key=low..high or key=a,b,c")
    all_overrides = [*(loaded.overrides if loaded else ()), *overrides]
    origins = {}
    if loaded is not None and study is not None:
        from_study = loaded.overrides if algorithms else [*loaded.overrides, *loaded.algorithms]
        origins = dict.fromkeys(from_study, f"study {study.name}")
    default_seeds = [0] if loaded is None else loaded.seeds
    comparison = experiment.compare(
        source,
        labels,
        parse_numbers("--seeds", seeds) if seeds else default_seeds,
        out=folder,
        overrides=all_overrides,
        grid=grid_values,
        space=searched or None,
        budget=20 if budget is None else budget,
        jobs=loaded.jobs if jobs is None and loaded is not None else jobs,
        quiet=quiet,
        origins=origins,
        allow_code=allow_code,
    )
    print_comparison(comparison)
    make_printer(quiet)(f"details, pictures and runs: {comparison.path / 'report.html'}")


def _parse_pairs(option: str, entries: tuple[str, ...], expected: str) -> dict[str, str]:
    """Parse entries `key=values` of an option that may be repeated."""
    found: dict[str, str] = {}
    for entry in entries:
        key, equals, values = entry.partition("=")
        if not key or not equals or not values:
            raise UserError(f"{option}: expected {expected}, got '{entry}'")
        if key in found:
            raise UserError(f"{option}: {key}: given twice; write all values in one option")
        found[key] = values
    return found


def _option_or_study(name: str, value: Any, study: Study | None) -> Any:
    value = getattr(study, name) if value is None and study is not None else value
    if value is None:
        raise UserError(f"--{name}: missing; set it or use a --study that contains it (see --help)")
    return value


@command(epilog=examples("hetero-fl export runs/my-run --client clinic_1 --format onnx"))
@run_argument
@click.option(
    "--client",
    metavar="ID",
    help="Export only the model of this client, or of `server`.  [default: all models]",
)
@best_option
@click.option(
    "--format",
    "file_format",
    default="onnx",
    metavar="NAME",
    help="File format: onnx or safetensors.",
)
@click.option(
    "--personal",
    "--home",
    "personal",
    is_flag=True,
    help=f"{PERSONAL_HELP} Cannot be combined with the format safetensors.",
)
@click.option(
    "--out",
    type=PATH,
    metavar="DIR",
    help="Output folder for models, model cards and score.py.  [default: RUN/export]",
)
@allow_code_option
@quiet_option
def export(
    *,
    run: Path,
    client: str | None,
    best: str | None,
    file_format: str,
    personal: bool,
    out: Path | None,
    allow_code: AllowCode,
    quiet: bool,
) -> None:
    """Export models of a finished run to ONNX or safetensors."""
    from hetero_fl import experiment
    from hetero_fl.reporting.run import Run

    loaded = Run(run, allow_code)
    exported = experiment.export(
        loaded.best(best) if best else loaded,
        client,
        file_format,
        out,
        personal,
        log=make_printer(quiet),
        allow_code=allow_code,
    )
    echo(next(iter(exported.values())).model.parent)


@command(epilog=examples("hetero-fl join runs/my-run --data new_clinic.csv --take backbone"))
@run_argument
@click.argument(
    "overrides",
    nargs=-1,
    metavar="[key.path=value]...",
    help="Settings of the new client, such as optimizer.lr=0.01, or keys of `runtime`, such as "
    "runtime.device=cpu.",
)
@click.option(
    "--data",
    required=True,
    metavar="FILE|NAME",
    help="Data of the new client: a local file or folder, or the name of a data source.",
)
@click.option(
    "--model",
    metavar="NAME",
    help="Model of the new client.  [default: most frequent model of the run]",
)
@click.option(
    "--take",
    type=click.Choice(["backbone", "teacher", "both"]),
    help="What the client starts from: the shared backbone, the consensus of all models as a "
    "teacher, or both.  [default: all that the run provides]",
)
@click.option(
    "--label", metavar="COLUMN", help="Label column of a table.  [default: as in the run]"
)
@click.option(
    "--patients",
    default="10,30,100,300",
    metavar="N,...",
    help="Numbers of labeled patients to train on; numbers of examples if the data has no "
    "patients.",
)
@click.option("--seeds", default="0,1,2,3,4", metavar="0,1,...", help="Random seeds.")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=10,
    help="Epochs of fine-tuning; at least 60 steps are taken. Training from scratch takes four "
    "times as many.",
)
@click.option(
    "--out",
    type=PATH,
    metavar="DIR",
    help="Output folder for the table, the figure and the JSON file.  [default: RUN/join-MODEL]",
)
@allow_code_option
@quiet_option
def join(
    *,
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
    allow_code: AllowCode,
    quiet: bool,
) -> None:
    """Train a new client that starts from the models of a finished run.

    The result is compared with training from scratch.
    """
    from hetero_fl import experiment
    from hetero_fl.experiment.joining.transfer import TransferSource
    from hetero_fl.reporting.run import Run

    num_patients = parse_numbers("--patients", patients)
    seed_numbers = parse_numbers("--seeds", seeds)
    loaded = Run(run, allow_code)
    model = model or TransferSource(loaded).most_common_model
    folder_name = "".join(c if c.isalnum() or c in "._-" else "_" for c in model)
    folder = out or run / f"join-{folder_name}"
    experiment.join(
        loaded,
        data,
        model,
        out=folder,
        label=label,
        transfer=take,
        patients=num_patients,
        seeds=seed_numbers,
        epochs=epochs,
        overrides=overrides,
        log=make_printer(quiet),
        allow_code=allow_code,
    )
    echo((folder / "join.md").read_text(encoding="utf-8"))
    echo(folder)


def parse_numbers(flag: str, text: str) -> list[int]:
    """Parse a comma-separated list of one or more non-negative integers.

    Args:
        flag: Name of the option, for the error message.
        text: Value of the option.

    Raises:
        UserError: If the text is empty or contains anything but non-negative integers.
    """
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise UserError(f"{flag}: expected integers >= 0, such as 0,1,2, got '{text}'")
    return numbers


@command(epilog=examples("hetero-fl check runs/my-run"))
@click.argument("run", type=PATH, metavar="RUN", help="Run directory, finished or not.")
def check(run: Path) -> None:
    """Check a run directory for damaged or missing files."""
    from hetero_fl.reporting.integrity import describe_progress, verify
    from hetero_fl.reporting.run_directory import is_locked

    if is_locked(run):
        raise UserError(f"{run}: in use by another process; check it when that process has ended")
    problems = verify(run)
    for name, problem in problems.items():
        echo(f"error: {run / name}: {problem}", err=True)
    if problems:
        raise Exit(2)
    echo(f"{run}: no damage found; {describe_progress(run)}")
