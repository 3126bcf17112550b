"""A private round and an evaluation with factors in the upper two layers of MiniLM against factors in all six.

What lies below the upper two is on disk before the clock starts, as from the second run on. Both workers take
turns in one process, on one thread; CPU time, medians of the ratios of neighbours with their middle half.

    python benchmarks/frozen.py [--turns 7] [--clients 4]
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedlora import scenario as scenarios
from fedlora.engine import Worker
from fedlora.prepare import calibrate, prepare

_SETTINGS = (
    "seed=1",
    "data.dataset=tweets",
    "data.partition={kind: iid}",
    "clients={total: 40, use: dp_sgd, local_steps: 2, batch_size: 32, micro_batch_size: 64}",
    "strategy={use: ffa_lora}",
    "rounds=100",
)


def worker(layers: str) -> Worker:
    """On one thread, with what is frozen kept on disk."""
    told = [*_SETTINGS, "model.adapter={r: 8, targets: [query, value], layers: " + layers + "}"]
    ready = prepare(scenarios.load("noniid", told))
    made = Worker(replace(ready.setup, threads=1, noise=calibrate(ready.scenario, ready.data)))
    if made.kept is not None and (wanted := made.kept.wanted) is not None:

        def fill(to: Path) -> None:
            for piece in wanted.pieces:
                made.fill(to, piece)

        wanted.make(fill)
    return made


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--clients", type=int, default=4)
    told = parser.parse_args()
    workers = {"all": worker("null"), "upper two": worker("[4, 5]")}
    took = {what: {name: list[float]() for name in workers} for what in ("round", "evaluation")}
    for turn in range(-1, told.turns):
        for name, one in workers.items():
            instruction = one.strategy.instruct(1, dict(one.task.initial), [8])
            began = time.process_time()
            replies = one.train(instruction, range(told.clients), partial_sums=False)
            middle = time.process_time()
            assert all(report.error is None for report in replies.reports)
            one.evaluate(one.task.initial, "test", 0, 512)
            if turn >= 0:
                took["round"][name].append(middle - began)
                took["evaluation"][name].append(time.process_time() - middle)
    for what, found in took.items():
        ratios = np.divide(found["all"], found["upper two"])
        first, median, third = statistics.quantiles(ratios.tolist(), n=4)
        seconds = {name: f"{statistics.median(times):.2f} s" for name, times in found.items()}
        print(f"{what}: {seconds}, {median:.2f} times as fast ({first:.2f} to {third:.2f})", flush=True)


if __name__ == "__main__":
    main()
