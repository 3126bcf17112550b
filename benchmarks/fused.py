"""A round of fused clients against the same round unfused, at small batches.

Each width has a worker of its own, and they take turns, a round at a time: every client trains once, and the width
says how many share each pass (`engine.fused`). Medians over the turns, and of the ratios of the unfused round of
the same turn to it: above 1 fusing is quicker. CPU seconds of the process on a CPU, seconds by the clock on a GPU.

    python benchmarks/fused.py [--device cpu] [--precision fp32] [--pairs 8] [--clients 16] [--batch-size 8]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from fedlora import scenario
from fedlora.engine import Worker
from fedlora.engine.base import chunks
from fedlora.prepare import calibrate, prepare

WIDTHS = (1, 2, 4, 8)
SCENARIO = """
name: fused
model: {base: minilm, adapter: {r: 8, alpha: 8, targets: [query, value]}}
data: {dataset: tweets, partition: {kind: sampled, examples: 64}, max_length: 64}
clients: {total: 1, local_steps: 4, lr: 0.1}
strategy: {use: fedavg_lora}
rounds: 1
engine: {kind: inline}
"""
PRIVATE = ("clients.use=dp_sgd", "privacy={epsilon: 8, delta: 1.0e-3}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="fp32")
    parser.add_argument("--pairs", type=int, default=8, help="turns that count")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--base", default="minilm")
    told = parser.parse_args()
    print(f"{told.base}, r = 8, {told.clients} clients x 4 steps of {told.batch_size} tweets, on {told.device}")
    print(f"{'private':>8} {'fused':>6} {'ms a client':>12} {'ratio':>6} {'range':>12}")
    for private in (False, True):
        rounds = {width: _round(told, private, width) for width in WIDTHS}
        seconds: dict[int, list[float]] = {width: [] for width in WIDTHS}
        for turn in range(-1, told.pairs):
            for width in WIDTHS:
                took = rounds[width]()
                if turn >= 0:
                    seconds[width].append(took)
        for width in WIDTHS:
            ratios = sorted(a / b for a, b in zip(seconds[1], seconds[width], strict=True))
            spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
            each = 1000 * statistics.median(seconds[width]) / told.clients
            print(f"{'yes' if private else 'no':>8} {width:>6} {each:>12.1f} ", end="")
            print(f"{statistics.median(ratios):>6.2f} {spread:>12}", flush=True)


def _round(told: argparse.Namespace, private: bool, width: int) -> Callable[[], float]:
    """Trains every client once; the seconds that it took."""
    settings = [
        f"clients.total={told.clients}",
        f"clients.batch_size={told.batch_size}",
        f"model.base={told.base}",
    ]
    settings += [f"clients.micro_batch_size={told.batch_size}", f"engine.fused={width}"]
    settings += [f"engine.precision={told.precision}", f"engine.gpus_per_worker={int(told.device == 'cuda')}"]
    ready = prepare(scenario.parse(SCENARIO, overrides=[*settings, *(PRIVATE if private else ())]))
    noise = calibrate(ready.scenario, ready.data)
    worker = Worker(replace(ready.setup, noise=noise))
    instruction = worker.strategy.instruct(1, dict(worker.task.initial))
    pieces = chunks(range(told.clients), fused=width)
    clock = time.perf_counter if told.device == "cuda" else time.process_time

    def run() -> float:
        began = clock()
        for piece in pieces:
            replies = worker.train(instruction, piece, True)
            assert not any(report.error for report in replies.reports)
        return clock() - began

    return run


if __name__ == "__main__":
    main()
