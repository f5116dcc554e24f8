"""The commands of runs: `train`, `federate`, `compare`, `evaluate`, `join`, `audit` and others."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from click.exceptions import Exit

from hetero_fl.utils.code_permission import AllowCode, find_references
from hetero_fl.utils.errors import UserError, closest, echo
from hetero_fl.utils.text import split_top_level

if TYPE_CHECKING:
    from hetero_fl.reporting.run import Run

Best = Literal["personal", "global"]


def train(
    overrides: tuple[str, ...],
    *,
    config: Path | None = None,
    out: Path | None = None,
    resume: bool = False,
    check: bool = False,
    allow_code: AllowCode = False,
    quiet: bool = False,
) -> None:
    """Train a federation in simulation and write a run directory.

    Args:
        config: Configuration file (YAML or JSON). Optional with --resume.
        out: Run directory.  [default: runs/<name>-<timestamp>]
        resume: Continue the run in --out from its last checkpoint.
        check: Print the resolved configuration and the expected cost, and exit.

    Example:
        hetero-fl train -c configs/digits_quickstart.yaml
        hetero-fl train -c configs/digits_quickstart.yaml rounds=5 algorithm.name=fedprox
        hetero-fl train --resume --out runs/my-run
    """
    from hetero_fl.experiment import run

    finished = _run_or_check(
        run, config, overrides, out, resume=resume, check=check, allow_code=allow_code, quiet=quiet
    )
    if finished is not None and (advice := comparison_command(finished)):
        make_printer(quiet)(f"compare with training alone: {advice}")


def federate(
    overrides: tuple[str, ...],
    *,
    config: Path | None = None,
    out: Path | None = None,
    resume: bool = False,
    check: bool = False,
    allow_code: AllowCode = False,
    quiet: bool = False,
) -> None:
    """Train with a server and one process per client on this machine.

    Args:
        config: Configuration file (YAML or JSON). Optional with --resume.
        out: Run directory.  [default: runs/<name>-<timestamp>]
        resume: Continue the run in --out from its last checkpoint.
        check: Print the resolved configuration and the expected cost, and exit.

    Example:
        hetero-fl federate -c configs/digits_quickstart.yaml rounds=2
    """
    from hetero_fl.deployment.local import run_local_federation

    _run_or_check(
        run_local_federation,
        config,
        overrides,
        out,
        resume=resume,
        check=check,
        allow_code=allow_code,
        quiet=quiet,
    )


def _run_or_check(
    run: Callable[..., Run],
    config: Path | None,
    overrides: tuple[str, ...],
    out: Path | None,
    *,
    resume: bool,
    check: bool,
    allow_code: AllowCode,
    quiet: bool,
) -> Run | None:
    """Train and print the run directory, or print the configuration and the cost with `check`.

    Raises:
        UserError: If an option is missing, or if `out` of a run to resume is not a run directory.
    """
    from hetero_fl.reporting.run_directory import has_run

    if resume and out is None:
        raise UserError("--resume: requires --out, the directory of the run to continue")
    if config is None and out is not None and resume:
        if not has_run(out):
            raise UserError(
                f"--out: {out} is not a run directory{_similar_run(out)} "
                "(a new run requires --config)"
            )
        config = out / "config.yaml"
    if config is None:
        raise UserError("--config: missing; expected a YAML or JSON file (see --help)")
    if check:
        _print_check(config, overrides, allow_code)
        return None
    finished = run(
        config, out=out, overrides=overrides, resume=resume, quiet=quiet, allow_code=allow_code
    )
    if (finished.path / "report.html").exists():
        make_printer(quiet)(f"report: {finished.path / 'report.html'}")
    echo(finished.path)
    return finished


def _print_check(config: Path, overrides: tuple[str, ...], allow_code: AllowCode) -> None:
    """Print the resolved configuration and the expected cost."""
    from hetero_fl.cli.printing import print_check, print_draft
    from hetero_fl.experiment import prepare
    from hetero_fl.experiment.configuration import draft_config
    from hetero_fl.reporting.run_loggers import check_loggers

    draft = draft_config(config, overrides)
    if draft.code_references and not allow_code:
        print_draft(draft.config, draft.code_references)
    else:
        prepared = prepare(config, overrides, allow_code=allow_code)
        check_loggers(prepared.config)
        print_check(prepared)


def comparison_command(run: Run) -> str:
    """Return the command that compares a run's method with training alone and with FedAvg.

    FedAvg needs clients of the same architecture; without them, Hybrid takes its place if there is
    a proxy set. The command is empty if only training alone is left.
    """
    config = run.directory.config()
    groups = [client["group"] for client in run.directory.details()["clients"].values()]
    possible = {"fedavg": len({*groups}) < len(groups), "hybrid": run.summary["data"]["n_proxy"]}
    federated = [name for name, is_possible in possible.items() if is_possible][:1]
    names = list(dict.fromkeys(["local", *federated, run.summary["algorithm"]]))
    command = [
        *("hetero-fl", "compare", "--config", f"{run.path}/config.yaml"),
        *("--algorithms", ",".join(names), "--seeds", str(run.summary["seed"])),
        *("--out", f"{run.path}-comparison-{config['rounds']}"),
        # The settings of the run that comparisons do not have by default.
        "output.best_models=false",
        *(["runtime.mode=sync"] if config["runtime"]["mode"] == "async" else []),
        *(["--allow-code"] if find_references(config) else []),
    ]
    return shlex.join(command) if len(names) > 1 else ""


def make_printer(quiet: bool) -> Callable[[str], None]:
    """Return a function that prints a line to stderr unless `quiet` is set."""

    def print_line(line: str) -> None:
        if not quiet:
            echo(line, err=True)

    return print_line


def _similar_run(out: Path) -> str:
    """Suggest a run directory with a similar name, if there is one, for a message."""
    runs = [file.parent.name for file in out.parent.glob("*/environment.json")]
    match = closest(out.name, runs)
    return "" if match is None else f"; did you mean {out.parent / match}?"


def _load_run(run: Path, best: Best | None, allow_code: AllowCode) -> Run:
    from hetero_fl.reporting.run import Run

    loaded = Run(run, allow_code)
    return loaded.best(best) if best else loaded


def evaluate(
    run: Path,
    *,
    data: str,
    label: str | None = None,
    client: str | None = None,
    best: Best | None = None,
    personal: bool = False,
    json_file: Path | None = None,
    allow_code: AllowCode = False,
    quiet: bool = False,
) -> None:
    """Evaluate the models of a finished run on a data set.

    Args:
        data: Data set: a local file or folder, or the name of a data source.
        label: Label column of a table; separate several by commas.  [default: as in the run]
        client: Evaluate only the model of this client, or of `server`.  [default: all models]
        json_file: Also write the metrics to a JSON file.

    Example:
        hetero-fl evaluate runs/my-run --data digits
        hetero-fl evaluate runs/my-run --data clinic.csv --label diagnosis --client clinic_1
    """
    from hetero_fl import experiment
    from hetero_fl.cli.printing import print_scores
    from hetero_fl.reporting.terminal import Terminal
    from hetero_fl.utils.serialization import make_folder

    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise UserError(f"--json: expected a file in an existing folder, got {json_file}")
    if json_file:
        make_folder(json_file.parent)
    log = make_printer(quiet)
    loaded = _load_run(run, best, allow_code)
    results = experiment.evaluate(
        loaded,
        data,
        client,
        personal=personal,
        label=label,
        allow_code=allow_code,
        log=lambda note: log(f"note: {note}"),
    )
    unit = next(iter(loaded.load_models(client).values())).task.unit
    title = f"{run} on {data}" + (f", errors in {unit}" if unit else "")
    print_scores(results, title, Terminal())
    if json_file:
        try:
            json_file.write_text(json.dumps(results, indent=2), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json: {json_file}: cannot be written ({error.strerror})") from None


def audit(
    run: Path,
    *,
    clients: str | None = None,
    attack: str = "both",
    shadows: int = 4,
    images: int = 3,
    seed: int = 0,
    out: Path | None = None,
    allow_code: AllowCode = False,
    quiet: bool = False,
) -> None:
    """Audit the privacy of a finished run by attacking it.

    Membership inference determines which rows a client trained on. Gradient inversion reconstructs
    training images from an upload.

    Args:
        clients: Ids of the clients to attack, separated by commas.  [default: the first two]
        attack: Attack to run: membership, inversion, or both. With both, attacks that do not apply
            are skipped.
        shadows: Number of shadow runs, which repeat the run with different training rows: an even
            number >= 4, or 0 for the loss attack only.
        images: Number of training steps to invert per client, each on one image.
        seed: Random seed of the audit.
        out: Output folder for audit.json and audit.html.  [default: RUN/audit]

    Example:
        hetero-fl audit runs/my-run --attack membership --shadows 8
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
        attack=attack,  # type: ignore[arg-type]  # the function checks the name
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


def compare(
    overrides: tuple[str, ...],
    *,
    config: Path | None = None,
    algorithms: str | None = None,
    study: Path | None = None,
    seeds: str | None = None,
    out: Path | None = None,
    jobs: int | None = None,
    grid: tuple[str, ...] = (),
    search: Literal["optuna"] | None = None,
    space: tuple[str, ...] = (),
    budget: str | None = None,
    allow_code: AllowCode = False,
    quiet: bool = False,
) -> None:
    r"""Compare methods over several seeds.

    The table is printed and written to --out together with figures and a report. To continue
    an interrupted comparison, repeat the command.

    Args:
        config: Configuration file (YAML or JSON). Optional with --study.
        algorithms: Methods to compare, separated by commas, as NAME or NAME:setting=value. `all`
            selects all compatible methods. Optional with --study.
        study: Study file (YAML) with config, algorithms and seeds. Options override its values.
        seeds: Random seeds, such as 0,1,2.  [default: seeds of the study, otherwise 0]
        out: Output folder. Finished runs in it are reused. Optional with --study.  [default: as in
            the study]
        jobs: Number of parallel runs.  [default: as in the study, otherwise one per core with one
            thread each]
        grid: Values of a key to try, as key=a,b,c. Each method uses the value with the best
            validation score. May be repeated.
        search: Search the values of --space with Optuna, which stops runs early if they score
            worse than others after the same number of rounds. Each method uses the values with the
            best validation score.
        space: Values of a key to search: key=low..high, key=low..high:log or key=a,b,c. May be
            repeated.
        budget: Budget of the search for each method: a number of runs, or hours of training such
            as 1.5h.  [default: 20]

    Example:
        hetero-fl compare -c configs/digits_quickstart.yaml --algorithms fedavg,fedprox \
            --seeds 0,1,2 --out runs/comparison
        hetero-fl compare --study configs/studies/effect_of_k.yaml
    """
    from hetero_fl import experiment
    from hetero_fl.cli.printing import print_comparison
    from hetero_fl.experiment.comparison.study import Study

    loaded = Study.load(study) if study else None
    given = {"config": config, "algorithms": algorithms, "out": out, "jobs": jobs}
    values = {name: _option_or_study(value, loaded, name) for name, value in given.items()}
    for name in ("config", "out", "algorithms"):
        if values[name] is None:
            raise UserError(f"--{name}: missing; set it or use a --study that contains it")
    if bool(search) != bool(space):
        raise UserError("--search: use it together with --space, such as --space key=low..high")
    if budget is not None and not search:
        raise UserError("--budget: use it together with --search")
    grid_texts = _parse_pairs("--grid", grid, "key=a,b,c")
    searched = _parse_pairs("--space", space, "key=low..high or key=a,b,c")
    default_seeds = [0] if loaded is None else loaded.seeds
    comparison = experiment.compare(
        values["config"],
        values["algorithms"],
        parse_numbers("--seeds", seeds) if seeds else default_seeds,
        out=values["out"],
        overrides=[*(loaded.overrides if loaded else ()), *overrides],
        grid={key: split_top_level(texts, ",") for key, texts in grid_texts.items()},
        space=searched or None,
        budget=20 if budget is None else budget,
        jobs=values["jobs"],
        quiet=quiet,
        allow_code=allow_code,
    )
    print_comparison(comparison)
    make_printer(quiet)(f"details, pictures and runs: {comparison.path / 'report.html'}")


def _option_or_study(value: Any, study: object, name: str) -> Any:
    return getattr(study, name, None) if value is None else value


def _parse_pairs(option: str, entries: tuple[str, ...], expected: str) -> dict[str, str]:
    """Parse entries `key=values` of an option that may be repeated."""
    found: dict[str, str] = {}
    for entry in entries:
        key, _, values = entry.partition("=")
        if not key or not values:
            raise UserError(f"{option}: expected {expected}, got '{entry}'")
        if key in found:
            raise UserError(f"{option}: {key}: given twice; write all values in one option")
        found[key] = values
    return found


def export(
    run: Path,
    *,
    client: str | None = None,
    best: Best | None = None,
    file_format: str = "onnx",
    personal: bool = False,
    out: Path | None = None,
    allow_code: AllowCode = False,
    quiet: bool = False,
) -> None:
    """Export models of a finished run to ONNX or safetensors.

    Args:
        client: Export only the model of this client, or of `server`.  [default: all models]
        file_format: File format: onnx or safetensors, which cannot be combined with --personal.
        out: Output folder for models, model cards and score.py.  [default: RUN/export]

    Example:
        hetero-fl export runs/my-run --client clinic_1 --format onnx
    """
    from hetero_fl import experiment

    exported = experiment.export(
        _load_run(run, best, allow_code),
        client,
        file_format,
        out,
        personal,
        log=make_printer(quiet),
        allow_code=allow_code,
    )
    echo(next(iter(exported.values())).model.parent)


def join(
    run: Path,
    overrides: tuple[str, ...],
    *,
    data: str,
    model: str | None = None,
    transfer: Literal["backbone", "teacher", "both"] | None = None,
    label: str | None = None,
    patients: str = "10,30,100,300",
    seeds: str = "0,1,2,3,4",
    epochs: int = 10,
    out: Path | None = None,
    allow_code: AllowCode = False,
    quiet: bool = False,
) -> None:
    """Train a new client that starts from the models of a finished run.

    The result is compared with training from scratch.

    Args:
        overrides: Settings of the new client, such as optimizer.lr=0.01, or keys of `runtime`, such
            as runtime.device=cpu.
        data: Data of the new client: a local file or folder, or the name of a data source.
        model: Model of the new client.  [default: most frequent model of the run]
        transfer: What the client starts from: the shared backbone, the consensus of all models as a
            teacher, or both.  [default: all that the run provides]
        label: Label column of a table.  [default: as in the run]
        patients: Numbers of labeled patients to train on; numbers of examples if the data has no
            patients.
        seeds: Random seeds.
        epochs: Epochs of fine-tuning; at least 60 steps are taken. Training from scratch takes four
            times as many.
        out: Output folder for the table, the figure and the JSON file.  [default: RUN/join-MODEL]

    Example:
        hetero-fl join runs/my-run --data new_clinic.csv --take backbone
    """
    from hetero_fl import experiment
    from hetero_fl.experiment.joining.join import TransferSource

    num_patients = parse_numbers("--patients", patients)
    seed_numbers = parse_numbers("--seeds", seeds)
    loaded = _load_run(run, None, allow_code)
    model = model or TransferSource(loaded).most_common_model
    folder_name = "".join(c if c.isalnum() or c in "._-" else "_" for c in model)
    folder = out or run / f"join-{folder_name}"
    experiment.join(
        loaded,
        data,
        model,
        out=folder,
        label=label,
        transfer=transfer,
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


def check(run: Path) -> None:
    """Check a run directory for damaged or missing files.

    Args:
        run: Run directory, finished or not.

    Example:
        hetero-fl check runs/my-run
    """
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
