"""Gradient checkpointing: time and peak memory of a private step with `model.checkpointing` and without.

Each length and way runs in a process of its own, one step in turn on the same examples. Memory is what steps take
on top of the loaded model, time is that of the CPU.

    python benchmarks/checkpointing.py [--steps 8] [--batch-size 32] [--lengths 64,256]
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from multiprocessing.connection import Connection

os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lengths", default="64,256")
    told = parser.parse_args()
    print(f"MiniLM, FFA-LoRA r = 8, dp_sgd, {told.batch_size} texts, one thread, {told.steps} steps in turn")
    print(f"{'tokens':>6} {'ms':>8} {'with':>8} {'ratio':>6} {'MB':>8} {'with':>8} {'ratio':>6}")
    for length in map(int, told.lengths.split(",")):
        _compare(told, length)


def _compare(told: argparse.Namespace, length: int) -> None:
    context = multiprocessing.get_context("spawn")
    pipes: dict[bool, Connection] = {}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    memory = dict.fromkeys(seconds, 0.0)
    for way in seconds:
        pipes[way], there = context.Pipe()
        context.Process(target=_serve, args=(there, told.batch_size, length, way), daemon=True).start()
        pipes[way].recv()
    for turn in range(-2, told.steps):
        for way, pipe in pipes.items():
            pipe.send(True)
            took, memory[way] = pipe.recv()
            if turn >= 0:
                seconds[way].append(took)
    for pipe in pipes.values():
        pipe.send(False)
    ratio = statistics.median(a / b for a, b in zip(seconds[True], seconds[False], strict=True))
    times = [1000 * statistics.median(seconds[way]) for way in (False, True)]
    print(f"{length:>6} {times[0]:>8.0f} {times[1]:>8.0f} {ratio:>6.2f} ", end="")
    print(f"{memory[False]:>8.0f} {memory[True]:>8.0f} {memory[True] / memory[False]:>6.2f}", flush=True)


def _serve(pipe: Connection, size: int, length: int, checkpointing: bool) -> None:
    """Take a step whenever told; answer with its CPU seconds and the peak MB on top of the loaded model."""
    import numpy as np
    import torch

    from fedlora.client import Rng, Settings, load
    from fedlora.data.store import Examples, Partition
    from fedlora.kinds.lora import Lora
    from fedlora.tasks import loading

    torch.set_num_threads(1)
    task = loading.load(
        "classification",
        "minilm",
        Lora(8, 8, ("query", "value")),
        labels=("a", "b"),
        seed=0,
        max_length=length,
        private=True,
        checkpointing=checkpointing,
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(1000, 20000, size * length).astype(np.int32)
    examples = Examples(tokens, np.arange(0, size * length + 1, length), rng.integers(0, 2, size))
    names = tuple(n for n, slot in sorted(task.layout.items()) if slot.role != "A")
    settings = Settings(
        round=1,
        train=names,
        send=names,
        local_steps=1,
        batch_size=size,
        lr=0.1,
        micro_batch_size=size,
        noise_multiplier=1.0,
        clip_norm=1.0,
    )
    client, partition = load("dp_sgd", {}), Partition(0, examples, np.arange(size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send(True)
    while pipe.recv():
        began = time.process_time()
        client.fit(task, {}, partition, settings, Rng(0, 1, 0))
        took = time.process_time() - began
        pipe.send((took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


if __name__ == "__main__":
    main()
