"""Many runs side by side: algorithms × seeds, each tuned alike if wished; what has finished is not run again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hetero_fl.algorithms import algorithm
from hetero_fl.brackets import pieces
from hetero_fl.children import leave_if_importing
from hetero_fl.config import difference, load_config, resolved
from hetero_fl.config.load import Overrides, override_list, read
from hetero_fl.environment import cores
from hetero_fl.errors import Interrupted, RunFailed, UserError
from hetero_fl.experiment.comparison_settings import used_settings
from hetero_fl.experiment.jobs import Job, Point, Source, Variant, run_all
from hetero_fl.experiment.single import prepare
from hetero_fl.own_code import CodePermission
from hetero_fl.reporting.comparison_columns import ranked
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.rundir import RunDirectory, check_vacant, locked
from hetero_fl.reporting.summary import validation_score
from hetero_fl.reporting.wording import algorithm_name
from hetero_fl.task import Task


def compare(
    source: Source,
    algorithms: Sequence[str] | str,
    seeds: Iterable[int] = (0,),
    *,
    out: str | Path,
    overrides: Overrides = (),
    grid: Mapping[str, Sequence[str]] | None = None,
    jobs: int | None = None,
    quiet: bool = True,
    origins: Mapping[str, str] | None = None,
    allow_code: bool | CodePermission = False,
) -> Path:
    """Run every algorithm with every seed and write table, figure and report into `out`.

    A script calls this under its `__main__` guard: the runs' processes import it.

    Args:
        source: A configuration file or a dictionary.
        algorithms: Names or variants (`hybrid:teacher=mean`), and "all" for all that can mean something with this
            configuration: then the best is shown first, and what is left out named with the reason.
        seeds: Each algorithm runs with each of them.
        out: The folder.
        overrides: Changes to the configuration, `key.path=value`, or a dictionary of them.
        grid: Values to try for keys; each algorithm takes the point with the best mean validation over the seeds.
        jobs: Runs at a time; None: one per core, with one thread each.
        quiet: Show no progress.
        origins: Where entries of `algorithms` and `overrides` were written, if not in this call; the
            comparison states it.
        allow_code: Whether code that a file names may run (see `hetero_fl.load_config`).

    Raises:
        UserError: Before anything runs: a configuration is impossible, or a run in `out` was made with another one.
        RunFailed: After the others have ended: runs failed; a line for each of them.
    """
    leave_if_importing()
    out, base, seeds = Path(out), override_list(overrides), list(dict.fromkeys(seeds))
    if not seeds:
        raise UserError("--seeds: found none; write whole numbers with commas, such as 0,1,2")
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs: found {jobs}; take 1 or more")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; name a folder")
    permission = CodePermission.of(allow_code)
    config = load_config(source, base, permission)
    for seed in seeds:
        load_config(source, [*base, f"seed={seed}"], permission)
    names = [n.strip() for n in (pieces(algorithms, ",") if isinstance(algorithms, str) else algorithms)]
    everything = any(n.lower() == "all" for n in names)
    asked = [Variant.parse(n) for n in names if n and n.lower() != "all"]
    admitted, left_out = _admitted(source, base, seeds[0], permission) if everything else ([], {})
    variants = list(dict.fromkeys([*admitted, *asked]))
    if not variants:
        raise UserError(f"--algorithms: found none; choose from all, {', '.join(algorithm)}")
    threads = config.runtime.threads or 1
    base += [] if config.runtime.threads else ["runtime.threads=1"]
    points = [
        tuple(f"{k}={v}" for k, v in zip(grid or {}, p, strict=True)) for p in itertools.product(*(grid or {}).values())
    ]
    work = [Job(v, p, s, out / "runs" / _folder(v, p, s)) for s in seeds for v in variants for p in points]
    _check_made_alike(source, base, work, permission)
    once = work[: len(variants) * len(points)]
    new = [job for job in once if grid or job.variant not in admitted]  # the others have been prepared
    tasks = [_task(source, base, job, permission) for job in new or once[:1]]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out}: cannot be made ({error.strerror})") from None
    with locked(out) as unheld, Progress(out / "log.txt", quiet) as progress:
        for line in unheld:
            progress.log(line)
        for name, why in left_out.items():
            progress.log(f"left out {name}: {why}")
        plain = read(Path(source)) if isinstance(source, str | Path) else source  # the file may change while it runs
        permitted = permission.with_written(source, [o for job in work for o in [*base, *job.overrides]])
        file = Path(source).name if isinstance(source, str | Path) else "the configuration"
        before = used_settings(plain, base, dict.fromkeys(variants, ()), origins or {}, file, allow_code=permitted)
        for methods, text in before.lines():
            progress.log(f"settings of {methods}: {text}")
        if before.note:
            progress.log(before.note)
        try:
            failed = run_all(plain, base, work, jobs or max(1, cores() // threads), progress, permitted)
        except KeyboardInterrupt as stop:
            raise Interrupted(out) from stop
    done = [j for j in work if j not in failed]
    scores = _validations(done, tasks[0]) if len(points) > 1 else {}
    chosen = _choose(scores, variants, points)
    notes = [f"{v.label}: {', '.join(p)} (chosen by validation)" for v, p in chosen.items() if p]
    missing = {algorithm_name(name): why for name, why in left_out.items()}
    for job, why in failed.items():
        told = [algorithm_name(job.variant.label), *job.point, f"seed {job.seed}"]
        missing[", ".join(told)] = f"it failed: {why}"
    from hetero_fl.reporting.compare import comparison_row, write_comparison  # loads what draws
    from hetero_fl.reporting.comparison_curves import hours_to_reach, write_curves
    from hetero_fl.reporting.comparison_tuning import Candidate

    best = [j for j in done if j.point == chosen[j.variant]]
    reached = hours_to_reach([Run(j.out).metrics for j in best], tasks[0])
    rows = [
        _values(j.point) | comparison_row(Run(j.out).summary) | {"algorithm": j.variant.label} | hours
        for j, hours in zip(best, reached, strict=True)
    ]
    if rows:
        shown = ranked(rows, tasks[0]) if admitted else rows
        tried = [
            Candidate(v.label, p, scores.get((v, p)), p == chosen[v])
            for v in variants
            for p in points
            if len(points) > 1
        ]
        by = "grid, chosen by validation" if len(points) > 1 else "grid"
        points_of = {j.variant: j.point for j in best}
        settings = used_settings(plain, base, points_of, origins or {}, file, by, permitted)
        write_comparison(
            out, shown, title=config.name, note="; ".join(notes), task=tasks[0], missing=missing, tried=tried,
            settings=settings,
        )  # fmt: skip
        labels = dict.fromkeys(str(row["algorithm"]) for row in shown)
        histories = {a: [Run(j.out).metrics for j in best if j.variant.label == a] for a in labels}
        write_curves(out / "curves.png", histories, tasks[0])
        write_curves(out / "curves_time.png", histories, tasks[0], timed=True)
    if failed:
        lines = (f"{job}: {' '.join(why.split())}" for job, why in failed.items())
        raise RunFailed("\n".join([f"{len(failed)} of {len(work)} runs failed", *lines]))
    return out


def _admitted(
    source: Source, base: list[str], seed: int, permission: CodePermission
) -> tuple[list[Variant], dict[str, str]]:
    """The methods that this configuration admits, and why the others are refused."""
    kept, left_out = [], {}
    for name in algorithm:
        try:
            prepare(source, [*base, f"algorithm.name={name}", f"seed={seed}"], allow_code=permission)
            kept.append(Variant.parse(name))
        except UserError as error:
            left_out[name] = str(error)
    if not kept:  # then it is no matter of the method
        raise UserError(next(iter(left_out.values())))
    return kept, left_out


def _task(source: Source, base: list[str], job: Job, permission: CodePermission) -> Task:
    """What a run learns. Raises UserError, which says by which option the key was set, if the run is impossible."""
    try:
        return prepare(source, [*base, *job.overrides], allow_code=permission).federation.task
    except UserError as error:
        line = str(error)
        for option, overrides in (("--algorithms", job.variant.overrides), ("--grid", job.point)):
            for override in overrides:
                if line.startswith(f"{override}: "):
                    raise UserError(f"{option}: {line.removeprefix(f'{override}: ')}") from None
        raise


def _check_made_alike(source: Source, base: list[str], work: list[Job], permission: CodePermission) -> None:
    """Raises UserError, before anything runs, for a run directory that is there and was made with other settings."""
    for job in work:
        if not (job.out / "config.yaml").exists():
            check_vacant(job.out)
            continue
        made = RunDirectory.open(job.out).config()
        now = resolved(load_config(source, [*base, *job.overrides], permission))
        derived = {k: v for k, v in made.get("algorithm", {}).items() if now["algorithm"].get(k, v) is None}
        now["algorithm"] |= derived  # what is left open follows from the federation
        if algorithm[now["algorithm"]["name"]].asynchronous:
            now["runtime"]["mode"] = "async"  # whatever was asked for
        if now["privacy"] is not None and now["privacy"]["noise_multiplier"] is None and made.get("privacy"):
            now["privacy"]["noise_multiplier"] = made["privacy"].get("noise_multiplier")  # follows from the target
        if differs := difference(made, now):
            raise UserError(f"--out: {job.out} was made with other settings ({differs}); choose another --out")


def _folder(variant: Variant, point: Point, seed: int) -> str:
    parts = [variant.label, *point, f"seed{seed}"]
    return "-".join("".join(c if c.isalnum() or c in "._=" else "_" for c in part) for part in parts)


def _values(point: Point) -> dict[str, str]:
    """A point's values under their keys."""
    return {key: value for key, _, value in (entry.partition("=") for entry in point)}


def _validations(done: list[Job], task: Task) -> dict[tuple[Variant, Point], float]:
    """The mean validation of each variant at each grid point over its seeds; larger is better."""
    scores: dict[tuple[Variant, Point], list[float]] = {}
    for job in done:
        scores.setdefault((job.variant, job.point), []).append(_validation(Run(job.out), task))
    return {key: sum(values) / len(values) for key, values in scores.items()}


def _choose(
    scores: Mapping[tuple[Variant, Point], float], variants: list[Variant], points: list[Point]
) -> dict[Variant, Point]:
    """For each variant the grid point with the best validation; ties to the first."""
    return {v: max(points, key=lambda p: scores.get((v, p), float("-inf"))) for v in variants}


def _validation(finished: Run, task: Task) -> float:
    """The validation of the last round that was read, at home and in common together; larger is better."""
    last = [r for r in finished.metrics if r.get("validation")][-1]
    both = [validation_score(task, last, which) for which in ("personal", "global")]
    known = [v for v in both if v is not None]
    return sum(known) / len(known) if known else float("-inf")
