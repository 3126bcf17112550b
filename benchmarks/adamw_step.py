"""A step of AdamW against one of SGD, plain and private: CPU time, on the same batches.

Both are fedlora's clients on MiniLM, r = 8, with the options that scenarios have. They take turns in one process,
on one thread; the median of the ratios of neighbours is printed with the range of their middle half.

    python benchmarks/adamw_step.py [--turns 12] [--steps 4] [--batch-size 32]
"""

import argparse
import statistics
import time

import torch
from dp_step import load_task

from fedlora.client import Rng, Settings, load

OPTIMIZERS = {"sgd": {}, "adamw": {"kind": "adamw"}}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    told = parser.parse_args()
    torch.set_num_threads(1)
    task, partition = load_task(told.batch_size)
    print(f"MiniLM, r = 8, {told.steps} steps of {told.batch_size} tweets, one thread, {told.turns} turns")
    print(f"{'trained':>9} {'client':>7} {'sgd ms':>7} {'adamw ms':>8} {'ratio':>6}  middle half")
    for trained in ("LoRA", "FFA-LoRA"):
        names = tuple(n for n, slot in sorted(task.layout.items()) if slot.role != "A" or trained == "LoRA")
        for use in ("sgd", "dp_sgd"):
            client, took = load(use, {}), {kind: list[float]() for kind in OPTIMIZERS}
            for turn in range(-1, told.turns):
                for kind, asked in OPTIMIZERS.items():
                    settings = Settings(
                        round=1,
                        train=names,
                        send=names,
                        local_steps=told.steps,
                        batch_size=told.batch_size,
                        lr=0.001,
                        micro_batch_size=told.batch_size,
                        noise_multiplier=1.0,
                        clip_norm=1.0,
                        optimizer=asked,
                    )
                    began = time.process_time()
                    client.fit(task, {}, partition, settings, Rng(0, 1, 0))
                    if turn >= 0:
                        took[kind].append((time.process_time() - began) / told.steps)
            ratios = [b / a for a, b in zip(took["sgd"], took["adamw"], strict=True)]
            first, _, third = statistics.quantiles(ratios, n=4)
            sgd, adamw = (1000 * statistics.median(found) for found in took.values())
            print(f"{trained:>9} {use:>7} {sgd:>7.1f} {adamw:>8.1f} {statistics.median(ratios):>6.3f}  ", end="")
            print(f"{first:.3f}-{third:.3f}", flush=True)


if __name__ == "__main__":
    main()
