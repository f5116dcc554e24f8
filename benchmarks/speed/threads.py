#!/usr/bin/env python3
"""Measure the effect of a second thread on training steps, which determines the default threads.

    GOMP_SPINCOUNT=1000 python -m benchmarks threads

Forward pass, backward pass and optimizer step in plain PyTorch are timed with one and two threads,
in turns. The output is the ratio of the medians, which depends on how long idle OpenMP threads
spin. Ratios of the time with two threads to the time with one thread, on two virtual cores:

    GOMP_SPINCOUNT                1000    OpenMP's default
    mlp, batch 10                 1.44    0.99
    cnn_bn_small, batch 32        0.99    0.83
    cnn_bn_medium, batch 32       0.75    0.62
    fedavg_cnn, batch 10          0.68    0.82
    resnet18, batch 32            0.63    0.61

If two runs of the ResNet-18 case of `executors` share these two cores, they take a third longer
than one run with a GOMP_SPINCOUNT of 1000, and nine times as long with 100000, because spinning
threads compete for the cores. With `OMP_WAIT_POLICY=PASSIVE`, threads do not spin, and a second
thread makes serial rounds of `executors` at most 5 percent faster.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from benchmarks.common import add_quick
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.templates import Template, describe_model

CASES = [
    *(("mlp", (1, 28, 28), batch) for batch in (10, 32)),
    *(("cnn_bn_small", (1, 28, 28), batch) for batch in (10, 32)),
    ("cnn_bn_medium", (1, 28, 28), 32),
    ("cnn_bn_large", (1, 28, 28), 32),
    ("fedavg_cnn", (3, 32, 32), 10),
    ("resnet8", (3, 32, 32), 32),
    ("resnet18", (3, 32, 32), 32),
    ("resnet18_small", (3, 32, 32), 32),
]


def main() -> None:
    """Measure all cases and print one line for each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    add_quick(parser)
    options = parser.parse_args()
    if options.quick:
        options.turns = 1
    for name, shape, batch in CASES[:2] if options.quick else CASES:
        arch = ModelSpec.from_config(name, 10, shape)
        module = Template(arch, DeviceMemory(torch.device("cpu"))).module
        optimizer = torch.optim.SGD(module.parameters(), 0.01, fused=True)
        x, y = torch.rand(batch, *shape), torch.arange(batch) % 10
        flops = batch * describe_model(arch).forward_flops
        steps = max(2, int(3e9 / flops))
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(options.turns + 1):
            for threads, found in seconds.items():
                torch.set_num_threads(threads)
                started = time.perf_counter()
                for _ in range(steps):
                    optimizer.zero_grad()
                    F.cross_entropy(module(x).logits, y).backward()
                    optimizer.step()
                if turn:
                    found.append((time.perf_counter() - started) / steps)
        one, two = (statistics.median(found) for found in seconds.values())
        print(
            f"{name:16} batch {batch}, {flops / 1e6:6.0f} MFLOP forward: {1e3 * one:7.2f} ms, "
            f"ratio with two threads {two / one:.2f}"
        )


if __name__ == "__main__":
    main()
