#!/usr/bin/env python3
"""Measure the time to send and receive compressed model updates, and the compression ratio.

    python -m benchmarks compression [--threads 1] [--quick]

The models are the CNN of McMahan et al. (2017) with 1.7 million parameters, and ResNet-18 with 11
million. Updates are random, with a different scale for each tensor. The time to send includes the
update of the residual that top-k accumulates.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import yaml

from benchmarks.common import add_quick
from hetero_fl.communication.compression import build_stages
from hetero_fl.communication.compressor import Compressor
from hetero_fl.config.communication import ChannelConfig
from hetero_fl.core.payload import Item, ItemSpec, Payload, report_with_loss
from hetero_fl.utils.seeding import keyed_generator

SPECS = {"model": ItemSpec("params")}
MODELS = {"cnn": "CNN", "resnet": "ResNet-18"}
# Stages of `channel.compress`.
CHAINS = (
    "",
    "topk: 0.01",
    "topk: 0.01, quantize: 8",
    "topk: 0.1, quantize: 8",
    "randk: 0.01, quantize: 8",
    "quantize: 8",
    "quantize: 4",
    "quantize: 1",
    "half",
)


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Return the tensor shapes of a model, keyed by name.

    Args:
        size: "cnn" for the CNN. Any other value selects ResNet-18.
    """
    if size == "cnn":
        layers = [(32, 1, 5, 5), (64, 32, 5, 5), (512, 3136), (10, 512)]
    else:
        layers = [(64, 3, 3, 3)]
        before = 64
        for width in (64, 128, 256, 512):
            layers += [(width, before, 3, 3), *[(width, width, 3, 3)] * 3] + [
                (width, before, 1, 1)
            ] * (width != before)
            before = width
        layers.append((10, 512))
    result: dict[str, tuple[int, ...]] = {}
    for i, shape in enumerate(layers):
        result |= {f"{i}.weight": shape, f"{i}.bias": shape[:1]}
    return result


def measured(
    compressor: Compressor | None, sent: Payload, got: Payload, times: int
) -> tuple[float, float, int]:
    """Time sending and receiving of a payload.

    Args:
        compressor: The compressor. If None, the payload is encoded without compression.
        sent: The payload to send.
        got: The payload that the sender has received, to which the update is relative.
        times: Number of timed repetitions after a warm-up.

    Returns:
        The median milliseconds to send and to receive, and the size of the message in bytes.
    """
    key, state, taken = (0, 0, "site", "link"), dict[str, Any](), []
    for _ in range(times + 1):
        started = time.perf_counter()
        payload = sent
        if compressor:
            payload = compressor.compress(sent, key, reference=got, memory=state)
        data = payload.encode()
        between = time.perf_counter()
        received = Payload.decode(data, sent.items_by_name)
        if compressor:
            compressor.decompress(received, key, reference=got, like=sent.items_by_name)
        taken.append((between - started, time.perf_counter() - between))
    send, receive = (1000 * statistics.median(side) for side in zip(*taken[1:], strict=True))
    return send, receive, len(data)


def main() -> None:
    """Measure each compression chain with each model, and print a table row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3, help="timed turns after a warm-up turn (3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of this process (1)")
    add_quick(parser)
    options = parser.parse_args()
    pairs = 1 if options.quick else options.pairs
    torch.set_num_threads(options.threads)
    print("| model | chain | send | receive | bytes relative to float32 |")
    print("| --- | --- | ---: | ---: | ---: |")
    for size in ("cnn",) if options.quick else ("cnn", "resnet"):
        start = {n: torch.randn(s, generator=keyed_generator(n)) for n, s in shapes(size).items()}
        steps = {n: 0.001 * 1.3**i for i, n in enumerate(start)}
        moved = {
            n: t + steps[n] * torch.randn(t.shape, generator=keyed_generator(n, 1))
            for n, t in start.items()
        }
        got, sent = (
            Payload({"model": start}),
            Payload({"model": Item(moved, 600.0, "params")}, report_with_loss(1.0)),
        )
        dense = sum(4 * t.numel() for t in start.values())
        for chain in CHAINS:
            config = ChannelConfig(compress=yaml.safe_load(f"[{chain}]"))
            stages = build_stages(config.compress)
            compressor = Compressor(stages, SPECS, 10) if stages else None
            send, receive, count = measured(compressor, sent, got, pairs)
            print(
                f"| {MODELS[size]} | {f'`{chain}`' if chain else 'none'} | {send:.0f} ms "
                f"| {receive:.0f} ms | {count / dense:.2%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
