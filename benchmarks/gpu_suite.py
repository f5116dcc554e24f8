#!/usr/bin/env python3
"""Test and measure training on a GPU, in parts of a few minutes each.

    python -m benchmarks gpu_suite --out FOLDER [--minutes 9] [--only PART …]
                                   [--pfl CHECKOUT] [--htfllib CHECKOUT] [--dry]

Each part writes FOLDER/PART.json when it ends, and FOLDER/table.md is rewritten from all of them. A
part that has its file is not repeated, and none begins that may not end within `--minutes`: repeat
the command until no part is left. A part that failed or was interrupted before comes last. Images
are generated; nothing is downloaded.

`--pfl` and `--htfllib` are checkouts of pfl-research and HtFLlib, which are then measured too; what
they import besides must be installed. `--dry` computes everything on the CPU in a small form: its
figures mean nothing, and it needs a folder of its own.
"""

from __future__ import annotations

import argparse
import json
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
CLIENTS, ROWS, BATCH = 100, 60, 10
# Model, its options, side and channels of its images.
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "cnn": ({"name": "cnn_bn_small"}, 28, 1),
    "mlp": ({"name": "mlp"}, 28, 1),
    "resnet8": ({"name": "resnet8"}, 32, 3),
    "vit_tiny": ({"name": "vit", "patch": 4, "width": 192, "depth": 12, "heads": 3}, 32, 3),
}
EXECUTORS = {"serial": "serial", "vectorized": "batched"}  # as `runtime.executor` names them
SWITCHES = (
    "none",
    "bfloat16",
    "TF32",
    "channels-last",
    "CUDA graph",
    "torch.compile",
    "fused optimizer",
)
STEPS = 50  # of a turn, when single steps are measured


@dataclass(frozen=True)
class Setting:
    """Device and size of the measurements.

    Attributes:
        is_dry: Whether everything is small and on the CPU.
        pairs: Turns that are counted.
        pfl: A checkout of pfl-research.
        htfllib: A checkout of HtFLlib.
    """

    is_dry: bool
    pairs: int = 5
    pfl: Path | None = None
    htfllib: Path | None = None

    @property
    def device(self) -> str:
        """Return the name of the device."""
        return "cpu" if self.is_dry else "cuda"


@dataclass
class Outcome:
    """The result of a part.

    Attributes:
        title: What was measured.
        seconds: Of each contender's turns.
        targets: Contender, what it is compared with, and the ratio that is aimed at.
        details: Further figures of contenders, by their names.
        tests: Numbers of tests by result, and the names of those that failed.
        failures: Why contenders could not be measured, by their names.
    """

    title: str
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    targets: Sequence[tuple[str, str, float | None]] = ()
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tests: Mapping[str, Any] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)


def run_tests(setting: Setting, expression: str) -> Outcome:
    """Run the tests that are marked `gpu` and match an expression of pytest."""
    if setting.is_dry:
        expression = "mlp or pretended"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", GPU_TESTS, "-m", "gpu", "-k", expression]
        command += ["-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
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
    return Outcome(f"tests marked gpu, {expression}", tests=tests)


def profile_round(run: TrainerRun, device: str) -> dict[str, Any]:
    """Return the peak memory of a round, the fraction of GPU computation, and the copies."""
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
    """Return the seconds of microseconds that spans cover; kernels on several streams overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6


def compare_runs(
    title: str, runs: Mapping[str, TrainerRun], setting: Setting, target: float | None
) -> Outcome:
    """Time rounds of runs in turns, then profile one of each; the first is compared with."""
    seconds = in_turns({name: run.round for name, run in runs.items()}, setting.pairs)
    details = {name: profile_round(run, setting.device) for name, run in runs.items()}
    first, *others = runs
    return Outcome(title, seconds, [(name, first, target) for name in others], details)


def equal_clients(setting: Setting, model: str) -> PreparedRun:
    """Return FedAvg of clients that all have the same model, before its first round."""
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
    """Measure vectorized against serial training."""
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
    """Measure `runtime.precision`."""
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
    """Measure pfl-research's benchmark: 50 clients, 5 steps of 10 images."""
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
    """Return the command lines of each contender's processes, by name."""
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
    """Profile the second round of each executor: the first copies what stays on the device."""
    details = {}
    for name, executor in EXECUTORS.items():
        run = TrainerRun(prepared, executor=executor, device=setting.device)
        run.round()
        details[f"hetero_fl, {name}"] = profile_round(run, setting.device)
    return details


def measure_htfllib(setting: Setting) -> Outcome:
    """Measure a round of 10 CNNs and 10 ResNet-18 against HtFLlib's."""
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
    """Measure the effect of each torch switch on steps of a bare training loop."""
    steps, failures = {}, {}
    for switch in SWITCHES:
        if switch == "CUDA graph" and setting.is_dry:
            continue
        try:
            run = make_steps(setting, model, batch_size, switch)
            run()  # compiles, where anything is compiled
            steps[switch] = run
        except Exception as error:
            failures[switch] = f"{type(error).__name__}: {error}".splitlines()[0]
    title = f"steps of a bare loop, {model}, batches of {batch_size}, by switch"
    targets = [(switch, "none", None) for switch in steps if switch != "none"]
    return Outcome(title, in_turns(steps, setting.pairs), targets, failures=failures)


def make_steps(setting: Setting, model: str, batch_size: int, switch: str) -> Callable[[], None]:
    """Return a function that takes some training steps of SGD with one switch on."""
    device = torch.device(setting.device)
    draws = torch.Generator(device).manual_seed(0)
    side = 16 if setting.is_dry else 32
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
    """Return the step as a CUDA graph, captured after some steps on a stream of its own."""
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
    """Enable or disable TF32 for float32 products and convolutions."""
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = enabled
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


# The parts, and the minutes after which each is interrupted.
PARTS: dict[str, tuple[Callable[[Setting], Outcome], float]] = {
    "tests_serial": (partial(run_tests, expression="serial"), 5),
    "vectorized_cnn": (partial(measure_vectorized, model="cnn"), 2),
    "pfl_research": (measure_pfl, 4),
    "htfllib": (measure_htfllib, 5),
    "tests_vectorized": (partial(run_tests, expression="batched"), 5),
    "tests_others": (partial(run_tests, expression="not serial and not batched"), 4),
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
    """Return a part as Markdown: a table of its contenders, or its tests."""
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
    """Write one page with all parts that have been measured."""
    found = {name: folder / f"{name}.json" for name in PARTS}
    parts = {n: json.loads(p.read_text("utf-8")) for n, p in found.items() if p.exists()}
    text = "\n".join(format_part(name, part) for name, part in parts.items())
    (folder / "table.md").write_text(f"# GPU suite\n\n{text}", encoding="utf-8")


def run_parts(
    names: Sequence[str], setting: Setting, folder: Path, minutes: float
) -> dict[str, str]:
    """Run parts that have no file yet; the others are run when one fails or takes too long.

    Args:
        names: The parts, most important first.
        setting: Where and how large.
        folder: Of the files.
        minutes: In which all of it must end.

    Returns:
        Why parts have no file, by their names.
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
        failure_file.touch()  # until it ends well, even if this process is killed
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
    """Raise TimeoutError in the main thread after `seconds`."""

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
    """Exit if a folder would contain results of both dry and full runs."""
    for file in folder.glob("*.json"):
        was_dry = json.loads(file.read_text("utf-8"))["machine"] == describe_machine(True)
        if was_dry != is_dry:
            kind = "the dry form" if was_dry else "a GPU"
            sys.exit(f"gpu_suite: --out {folder} holds figures of {kind}; give another folder")


def main() -> None:
    """Run the parts that the command line names."""
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
