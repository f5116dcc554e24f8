#!/usr/bin/env python3
"""Test and measure training on a GPU, in parts of a few minutes each.

    python -m benchmarks gpu_suite --out FOLDER [--minutes 9] [--only PART …]
                                   [--pfl CHECKOUT] [--htfllib CHECKOUT] [--dry]

At its end, each part writes FOLDER/PART.json and updates FOLDER/table.md. Parts that have a file
are not repeated. A part is not started if it may not end within `--minutes`. Repeat the command
until no part is left. Parts that failed or were interrupted are executed last. Images are generated
and nothing is downloaded.

With `--pfl` and `--htfllib`, pfl-research and HtFLlib are also measured. CHECKOUT is a checkout of
the project, whose dependencies must be installed. With `--dry`, small cases are executed on the
CPU. The results of dry runs are meaningless and must be written to a separate folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from xml.etree import ElementTree

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import TrainerRun, in_turns, now
from benchmarks.speed import htfllib, pfl_research
from benchmarks.speed.against_commit import CHILD, write_images
from benchmarks.speed.executors import configuration
from hetero_fl.data import make_images
from hetero_fl.experiment import PreparedRun, prepare
from model_zoo import create_model

ROOT = Path(__file__).parents[1]
GPU_TESTS = "tests/engine/test_gpu.py"
TEST_PROCESSES = 8
CLIENTS, ROWS, BATCH = 100, 60, 10
# Options of each model, and side length and number of channels of its images.
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "cnn": ({"name": "cnn_bn_small"}, 28, 1),
    "mlp": ({"name": "mlp"}, 28, 1),
    "resnet8": ({"name": "resnet8"}, 32, 3),
    "vit_tiny": ({"name": "vit", "patch": 4, "width": 192, "depth": 12, "heads": 3}, 32, 3),
}
# Values of `runtime.executor`, keyed by the names in the results.
EXECUTORS = {"serial": "serial", "vectorized": "batched"}
SWITCHES = (
    "none",
    "bfloat16",
    "TF32",
    "channels-last",
    "CUDA graph",
    "torch.compile",
    "fused optimizer",
)
# Training steps per turn of `measure_switches`.
STEPS = 50


@dataclass(frozen=True)
class Setting:
    """Device and size of the measurements.

    Attributes:
        is_dry: Whether to execute small cases on the CPU.
        pairs: Number of timed turns.
        pfl: Checkout of pfl-research. If None, pfl-research is not measured.
        htfllib: Checkout of HtFLlib. If None, HtFLlib is not measured.
    """

    is_dry: bool
    pairs: int = 5
    pfl: Path | None = None
    htfllib: Path | None = None

    @property
    def device(self) -> str:
        """Name of the torch device."""
        return "cpu" if self.is_dry else "cuda"


@dataclass
class Outcome:
    """The result of a part.

    Attributes:
        title: Description of the measurement.
        seconds: Seconds of each turn, keyed by contender.
        targets: Tuples of a contender, its reference, and the target ratio or None.
        details: Additional results, keyed by contender.
        tests: Numbers of tests, keyed by result, and the names of the failed tests.
        failures: Reasons why contenders could not be measured, keyed by contender.
    """

    title: str
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    targets: Sequence[tuple[str, str, float | None]] = ()
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tests: Mapping[str, Any] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)


def run_tests(setting: Setting) -> Outcome:
    """Run the tests that are marked `gpu` in several processes."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", GPU_TESTS, "-m", "gpu"]
        command += ["-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}"]
        command += ["-k", "mlp or pretended"] if setting.is_dry else ["-n", str(TEST_PROCESSES)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "HETERO_FL_TEST_GPU": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if not report.exists():
            raise SystemExit(f"pytest ended with status {done.returncode}: {done.stdout[-500:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if {child.tag for child in case} & {"failure", "error"}]
    skipped = [case for case in cases if case.find("skipped") is not None]
    tests = {
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": len(skipped),
        "failed": len(failed),
        "failures": [case.get("name") for case in failed],
        "output": done.stdout[-6000:] if failed else "",
    }
    return Outcome("tests marked gpu", tests=tests)


def profile_round(run: TrainerRun, device: str) -> dict[str, Any]:
    """Run and profile one round.

    Returns:
        The peak memory, the fraction of the time in which the GPU computes, and the numbers of
        kernels and copies. The result is empty on a CPU.
    """
    if device == "cpu":
        run.round()
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        run.round()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = [e for e in events if e.name.startswith("Memcpy")]
    figures: dict[str, Any] = {
        "computing": _covered((e.time_range.start, e.time_range.end) for e in events) / seconds,
        "kernels": len(events) - len(copies),
        "peak MiB": torch.cuda.max_memory_allocated() / 2**20,
    }
    for direction in ("HtoD", "DtoH", "DtoD"):
        figures[f"copies {direction}"] = sum(direction in e.name for e in copies)
    return figures


def _covered(spans: Iterator[tuple[float, float]]) -> float:
    """Return the seconds that are covered by time spans in microseconds.

    The spans may overlap, because kernels run on several streams.
    """
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6


def compare_runs(
    title: str, runs: Mapping[str, TrainerRun], setting: Setting, target: float | None
) -> Outcome:
    """Time rounds of several runs in turns, and then profile one round of each run.

    Args:
        title: Description of the measurement.
        runs: Runs to compare, keyed by name. The first run is the reference.
        setting: Device and size of the measurements.
        target: Target of the time ratio to the reference, or None.
    """
    seconds = in_turns({name: run.round for name, run in runs.items()}, setting.pairs)
    details = {name: profile_round(run, setting.device) for name, run in runs.items()}
    first, *others = runs
    return Outcome(title, seconds, [(name, first, target) for name in others], details)


def equal_clients(setting: Setting, model: str) -> PreparedRun:
    """Prepare a FedAvg run in which all clients have the same model."""
    options, side, channels = MODELS[model]
    clients = 3 if setting.is_dry else CLIENTS
    rows = 20 if setting.is_dry else ROWS
    side = 16 if setting.is_dry else side
    if setting.is_dry and model == "vit_tiny":
        options = {**options, "width": 24, "depth": 1}
    data = make_images(clients * rows + 1, 100, classes=10, channels=channels, side=side)
    defaults = {"model": options, "batch_size": BATCH}
    return prepare(configuration(clients, rows, defaults), dataset=data)


def measure_vectorized(setting: Setting, model: str) -> Outcome:
    """Compare vectorized with serial training."""
    prepared = equal_clients(setting, model)
    runs = {
        name: TrainerRun(prepared, executor=executor, device=setting.device)
        for name, executor in EXECUTORS.items()
    }
    clients = prepared.federation.client_infos.values()
    rows = next(iter(clients)).num_rows
    title = f"a round of FedAvg, {len(clients)} clients with {model}, {rows} examples each"
    return compare_runs(title, runs, setting, 0.2 if model == "cnn" else None)


def measure_precision(setting: Setting, executor: str) -> Outcome:
    """Compare the values of `runtime.precision`."""
    prepared = equal_clients(setting, "resnet8")
    runs = {
        precision: TrainerRun(
            prepared, executor=executor, device=setting.device, precision=precision
        )
        for precision in ("float32", "bfloat16")
    }
    return compare_runs(
        f"a round of FedAvg with resnet8, {executor}, by precision", runs, setting, None
    )


def measure_pfl(setting: Setting) -> Outcome:
    """Measure the benchmark of pfl-research: 50 clients, which take 5 steps of 10 images each."""
    size = pfl_research.Size(12, 3) if setting.is_dry else pfl_research.Size()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder / "images.npz", size.rows, side=32, channels=3)
        commands = pfl_commands(setting, size, images, folder)
        seconds = pfl_research.measure(commands, folder, setting.pairs)
        prepared = prepare(pfl_research.configuration(images, size, device=setting.device))
        details = profile_both(prepared, setting)
    targets: list[tuple[str, str, float | None]] = [
        (name, other, 1.0 if other == "pfl-research" else None)
        for other in ("bare loop", "pfl-research")
        for name in details
        if other in seconds
    ]
    title = f"a round of pfl-research's benchmark, {size.per_round} clients"
    return Outcome(title, seconds, targets, details)


def pfl_commands(
    setting: Setting, size: pfl_research.Size, images: Path, folder: Path
) -> dict[str, list[list[str]]]:
    """Return the command lines of the processes of each contender, keyed by contender."""
    bare = [sys.executable, "-m", "benchmarks.speed.bare_loop", str(images), str(size.rows)]
    found = {"bare loop": [[*bare, str(size.per_round), setting.device]]}
    for name, executor in EXECUTORS.items():
        tasks = folder / f"{name}.json"
        config = pfl_research.configuration(
            images, size, executor=executor, device=setting.device, threads=1
        )
        task = {"config": config, "turns": setting.pairs + 1, "rounds": 1}
        tasks.write_text(json.dumps([task]))
        found[f"hetero_fl, {name}"] = [[sys.executable, str(CHILD), str(tasks)]]
    if setting.pfl is not None:
        pfl_research.write_pickles(images, size, folder)
        run = [str(pfl_research.RIVAL), str(setting.pfl / "benchmarks"), str(folder), "1500"]
        found["pfl-research"] = [
            [sys.executable, *run, "--cohort_size", str(size.per_round)],
        ]
    return found


def profile_both(prepared: PreparedRun, setting: Setting) -> dict[str, dict[str, Any]]:
    """Profile the second round with each executor.

    The first round is not profiled because it copies data that remains on the device.

    Returns:
        The results of `profile_round`, keyed by contender.
    """
    details = {}
    for name, executor in EXECUTORS.items():
        run = TrainerRun(prepared, executor=executor, device=setting.device)
        run.round()
        details[f"hetero_fl, {name}"] = profile_round(run, setting.device)
    return details


def measure_htfllib(setting: Setting) -> Outcome:
    """Compare a round of 10 CNNs and 10 ResNet-18 with HtFLlib."""
    size = htfllib.Size(4, 32, 32) if setting.is_dry else htfllib.Size()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = htfllib.compare(folder, setting.htfllib, size, setting.pairs, setting.device)
        images = folder / "images.npz"
        prepared = prepare(htfllib.configuration(images, size, device=setting.device))
        details = profile_both(prepared, setting)
    targets = [target for target in htfllib.TARGETS if target[1] in seconds]
    return Outcome(f"FD, {size.clients} clients, CNN and ResNet-18", seconds, targets, details)


def measure_switches(setting: Setting, model: str, batch_size: int) -> Outcome:
    """Measure the effect of each option in `SWITCHES` on the steps of a bare loop."""
    steps, failures = {}, {}
    for switch in SWITCHES:
        if switch == "CUDA graph" and setting.is_dry:
            continue
        try:
            run = make_steps(setting, model, batch_size, switch)
            # The first call may compile the model.
            run()
            steps[switch] = run
        except Exception as error:
            failures[switch] = f"{type(error).__name__}: {error}".splitlines()[0]
    title = f"steps of a bare loop, {model}, batches of {batch_size}, by switch"
    targets = [(switch, "none", None) for switch in steps if switch != "none"]
    return Outcome(title, in_turns(steps, setting.pairs), targets, failures=failures)


def make_steps(setting: Setting, model: str, batch_size: int, switch: str) -> Callable[[], None]:
    """Return a function that executes training steps with SGD and one option of `SWITCHES`."""
    device = torch.device(setting.device)
    draws = torch.Generator(device).manual_seed(0)
    # CPUs without bfloat16 need minutes for a batch of the suite.
    batch_size, side = (4, 16) if setting.is_dry else (batch_size, 32)
    x = torch.rand(batch_size, 3, side, side, device=device, generator=draws)
    y = torch.randint(10, (batch_size,), device=device, generator=draws)
    module = create_model(model, num_classes=10, in_channels=3, input_size=side).to(device).train()
    if switch == "channels-last":
        module.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        module.parameters(), 0.01, momentum=0.9, fused=switch == "fused optimizer" or None
    )
    forward: Callable[..., Any] = module
    if switch == "torch.compile":
        forward = torch.compile(module, backend="eager" if setting.is_dry else "inductor")

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=switch == "bfloat16"):
            loss = F.cross_entropy(forward(x).logits, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with tensor_float_32(switch == "TF32"):
        run = captured(step) if switch == "CUDA graph" else step

    def steps() -> None:
        with tensor_float_32(switch == "TF32"):
            for _ in range(2 if setting.is_dry else STEPS):
                run()

    return steps


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Capture a training step as a CUDA graph.

    Three warm-up steps are executed on a side stream first, as torch requires.

    Returns:
        A function that replays the graph.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


@contextmanager
def tensor_float_32(enabled: bool) -> Iterator[None]:
    """Enable or disable TF32 for matrix products and convolutions inside the `with` block."""
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = enabled
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


# Parts with the minutes after which a part is interrupted, most important parts first.
PARTS: dict[str, tuple[Callable[[Setting], Outcome], float]] = {
    "tests": (run_tests, 5),
    "vectorized_cnn": (partial(measure_vectorized, model="cnn"), 2),
    "pfl_research": (measure_pfl, 4),
    "htfllib": (measure_htfllib, 5),
    "vectorized_mlp": (partial(measure_vectorized, model="mlp"), 2),
    "vectorized_resnet8": (partial(measure_vectorized, model="resnet8"), 3),
    "vectorized_vit_tiny": (partial(measure_vectorized, model="vit_tiny"), 4),
    "precision_serial": (partial(measure_precision, executor="serial"), 3),
    "precision_vectorized": (partial(measure_precision, executor="batched"), 2),
    "switches_resnet8": (partial(measure_switches, model="resnet8", batch_size=10), 3),
    "switches_resnet18": (partial(measure_switches, model="resnet18", batch_size=32), 4),
}


def describe_machine(is_dry: bool) -> dict[str, str]:
    """Return the versions and devices that affect the results."""
    return {
        "device": "dry form on the CPU" if is_dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
    }


def format_part(name: str, part: Mapping[str, Any]) -> str:
    """Format the result of a part in Markdown, with a table of contenders or a list of tests."""
    lines = [f"## {name}", "", f"{part['title']} ({part['machine']['device']})", ""]
    if part["tests"]:
        counts = [f"{n} {kind}" for kind, n in part["tests"].items() if isinstance(n, int)]
        lines += [", ".join(counts), *(f"- failed: {test}" for test in part["tests"]["failures"])]
    lines += [f"- failed: {name}: {why}" for name, why in part["failures"].items()]
    rows = []
    for contender, seconds in part["seconds"].items():
        row = {"": contender, "seconds": _spread(seconds, 4)}
        for one, other, target in part["targets"]:
            if one == contender:
                pairs = zip(seconds, part["seconds"][other], strict=True)
                row[f"/ {other}"] = _spread([a / b for a, b in pairs], 2)
                row["target"] = "" if target is None else f"{target} / {other}"
        details = part["details"].get(contender, {})
        rows.append({**row, **{k: f"{v:.3g}" for k, v in details.items()}})
    if rows:
        headers = dict.fromkeys(key for row in rows for key in row)
        table = [[row.get(key, "") for key in headers] for row in rows]
        lines.append(tabulate(table, list(headers), tablefmt="github", disable_numparse=True))
    return "\n".join([*lines, ""])


def _spread(values: Sequence[float], digits: int) -> str:
    return (
        f"{statistics.median(values):.{digits}f} "
        f"({min(values):.{digits}f} to {max(values):.{digits}f})"
    )


def write_table(folder: Path) -> None:
    """Write `table.md` with the results of all parts in a folder."""
    found = {name: folder / f"{name}.json" for name in PARTS}
    parts = {n: json.loads(p.read_text("utf-8")) for n, p in found.items() if p.exists()}
    text = "\n".join(format_part(name, part) for name, part in parts.items())
    (folder / "table.md").write_text(f"# GPU suite\n\n{text}", encoding="utf-8")


def run_parts(
    names: Sequence[str], setting: Setting, folder: Path, minutes: float
) -> dict[str, str]:
    """Run the parts that have no result file yet.

    If a part fails or exceeds its time limit, the next part is run.

    Args:
        names: Names of the parts, most important first.
        setting: Device and size of the measurements.
        folder: Folder of the result files.
        minutes: Time limit for all parts together.

    Returns:
        Reasons why parts have no result file, keyed by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = now()
    missing: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (folder / f"{name}.failed").exists()):
        file = folder / f"{name}.json"
        failure_file = folder / f"{name}.failed"
        part, longest = PARTS[name]
        started_at = now()
        left = minutes - (started_at - started) / 60
        if file.exists():
            continue
        if left < longest and not setting.is_dry:
            missing[name] = f"takes {longest:g} minutes, {left:.1f} were left"
            continue
        print(f"{name} …", flush=True)
        # The file is deleted on success, so it also marks parts whose process was killed.
        failure_file.touch()
        try:
            with time_limit(60 * longest):
                outcome = vars(part(setting))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            missing[name] = f"failed: {error}".splitlines()[0]
            continue
        machine = describe_machine(setting.is_dry)
        result = {**outcome, "machine": machine, "took": now() - started_at}
        file.write_text(json.dumps(result, indent=1), encoding="utf-8")
        failure_file.unlink()
        write_table(folder)
        print(format_part(name, result), flush=True)
    return missing


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread if the `with` block takes longer than `seconds`."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_folder(folder: Path, is_dry: bool) -> None:
    """Exit if the folder contains dry results and this run is not dry, or vice versa."""
    for file in folder.glob("*.json"):
        was_dry = json.loads(file.read_text("utf-8"))["machine"] == describe_machine(True)
        if was_dry != is_dry:
            kind = "the dry form" if was_dry else "a GPU"
            sys.exit(f"gpu_suite: --out {folder} holds figures of {kind}; give another folder")


def main() -> None:
    """Run the selected parts, or all parts by default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"some of: {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--minutes", type=float, default=9, help="the command ends within this time (9)"
    )
    parser.add_argument("--pairs", type=int, default=5, help="timed turns of each contender (5)")
    parser.add_argument("--pfl", type=Path, metavar="CHECKOUT", help="pfl-research's repository")
    parser.add_argument("--htfllib", type=Path, metavar="CHECKOUT", help="HtFLlib's repository")
    parser.add_argument("--dry", action="store_true", help="small, on the CPU, for tests")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        sys.exit("gpu_suite: no GPU here; --dry runs a small form on the CPU")
    rivals = {
        name: path and path.resolve()
        for name, path in {"pfl": options.pfl, "htfllib": options.htfllib}.items()
    }
    check_folder(options.out, options.dry)
    setting = Setting(options.dry, 1 if options.dry else options.pairs, **rivals)
    missing = run_parts(options.only or list(PARTS), setting, options.out, options.minutes)
    for name, reason in missing.items():
        print(f"not run: {name} ({reason}); repeat the command")
    print(f"{options.out / 'table.md'}: all figures so far")
    sys.exit(any(reason.startswith("failed") for reason in missing.values()))


if __name__ == "__main__":
    main()
