#!/usr/bin/env python3
"""On a GPU: a round of 100 small CNN clients, batched against serial, and how busy the device is.

    python -m benchmarks gpu

Busy is the time of the round in which a kernel runs, by torch's profiler, over the round's time. Target: batched against
serial 0.2. Without a GPU it says so and ends.
"""

from __future__ import annotations

import time

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Ours, arguments, in_turns, parsed, print_ratios
from benchmarks.speed.executors import configuration
from hetero_fl.data import make_images
from hetero_fl.experiment import prepare

CLIENTS, ROWS, SIDE = 100, 60, 28
TARGET = 0.2


def busy(run: Ours) -> float:
    """Share of a round in which the device computes."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        begun = time.perf_counter()
        run.round()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    total, reached = 0.0, float("-inf")
    for start, end in spans:  # kernels on several streams overlap
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6 / seconds


def main() -> None:
    """Ratio and shares."""
    options = parsed(arguments(__doc__))
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return
    clients = 10 if options.quick else CLIENTS
    dataset = make_images(clients * ROWS + 1, 100, classes=10, side=SIDE)
    prepared = prepare(
        configuration(clients, ROWS, {"model": "cnn_bn_small", "batch_size": 10}),
        dataset=dataset,
    )
    runs = {name: Ours(prepared, executor=name, device="cuda") for name in ("serial", "batched")}
    seconds = in_turns({name: run.round for name, run in runs.items()}, options.pairs)
    title = f"{clients} small CNN clients of {ROWS} examples on {torch.cuda.get_device_name()}"
    print_ratios(title, seconds, "serial", {"batched": TARGET})
    for name, run in runs.items():
        print(f"  {name}: the device computes in {busy(run):.0%} of a round")


if __name__ == "__main__":
    main()
