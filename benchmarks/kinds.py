"""A private step of each kind of adapter over a plain one of the same kind: CPU time, and memory in tensors.

Both are fedlora's clients on MiniLM, each in a model of its own, on the same batches. All kinds take turns in one
process, on one thread, a plain step and a private one after another; the median of the ratios of neighbours is
printed with the range of their middle half. Memory is that of torch's allocations in a step at their peak, over
what was there before it.

    python benchmarks/kinds.py [--turns 12] [--batch-size 32] [--r 8] [--kinds lora sparse]
"""

import argparse
import statistics
import time
from typing import Any

import torch
from dp_step import load_task

from fedlora import plugins
from fedlora.client import Rng, Settings, load

WAYS = ("sgd", "dp_sgd")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", default=plugins.names("kinds"))
    told = parser.parse_args()
    torch.set_num_threads(1)
    keys = [(kind, use) for kind in told.kinds for use in WAYS]
    tasks = {key: load_task(told.batch_size, key[0], told.r) for key in keys}  # hooks stay in a model
    took = {key: list[float]() for key in keys}
    for turn in range(-1, told.turns):
        for key in keys:
            began = time.process_time()
            _step(*tasks[key], key[1], told.batch_size)
            if turn >= 0:
                took[key].append(time.process_time() - began)
    print(f"MiniLM, r = {told.r}, steps of {told.batch_size} tweets, one thread, {told.turns} turns")
    print(
        f"{'kind':>12} {'plain ms':>8} {'private ms':>10} {'ratio':>6}  {'middle half':<12} {'plain MB':>8} ",
        end="",
    )
    print(f"{'private MB':>10} {'ratio':>6}")
    for kind in told.kinds:
        plain, private = (took[kind, use] for use in WAYS)
        ratios = [b / a for a, b in zip(plain, private, strict=True)]
        first, _, third = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        ms = [1000 * statistics.median(found) for found in (plain, private)]
        mb = [_peak(*tasks[kind, use], use, told.batch_size) for use in WAYS]
        print(f"{kind:>12} {ms[0]:>8.1f} {ms[1]:>10.1f} {statistics.median(ratios):>6.3f}  ", end="")
        print(f"{first:.3f}-{third:.3f}  {mb[0]:>8.1f} {mb[1]:>10.1f} {mb[1] / mb[0]:>6.2f}", flush=True)


def _step(task: Any, partition: Any, use: str, size: int) -> None:
    """One local step of a client that trains what can train, but for a seeded A."""
    names = tuple(n for n, slot in sorted(task.layout.items()) if slot.trainable and slot.role != "A")
    settings = Settings(
        round=1,
        train=names,
        send=names,
        local_steps=1,
        batch_size=size,
        lr=0.001,
        micro_batch_size=size,
        noise_multiplier=1.0,
        clip_norm=1.0,
    )
    load(use, {}).fit(task, {}, partition, settings, Rng(0, 1, 0))


def _peak(task: Any, partition: Any, use: str, size: int) -> float:
    """The most MB that a step had allocated at once, by torch's own record of each allocation."""
    with torch.profiler.profile(profile_memory=True) as profile:
        _step(task, partition, use, size)
    now = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 2**20


if __name__ == "__main__":
    main()
