"""Clients per hour on a GPU: one worker, several that share it, and as many as `auto` packs.

The clients of MiniLM on tweets take 4 steps of 16 in LoRA r 8, a hundred a round; rounds are timed from drawing
the cohort to the checkpoint, and the median of the steady ones is printed. Where the engine fuses clients, a
worker that does stands beside one that does not. Without a GPU: one line.

    python benchmarks/gpu.py [--workers 1 2 4] [--rounds 8] [--private]
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLIENTS = 100  # of a round


def main() -> int:
    """Print the table."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--private", action="store_true")
    told = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no GPU here: nothing to measure", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, {CLIENTS} clients a round, {told.rounds} rounds")
    print(f"{'engine':>28} {'of a GPU':>9} {'precision':>10} {'round s':>8} {'clients/h':>10} {'ratio':>6}")
    first = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number, engine in enumerate(_engines(told.workers)):
            seconds, share, precision = _rounds(told, engine, Path(folder) / str(number))
            rate = 3600 * CLIENTS / seconds
            first = first or rate
            print(f"{engine:>28} {share:>9.4g} {precision:>10} {seconds:>8.2f} ", end="")
            print(f"{rate:>10.0f} {rate / first:>6.2f}", flush=True)
    return 0


def _engines(workers: list[int]) -> Iterator[str]:
    """Settings of the engine."""
    from fedlora.engine.hardware import share
    from fedlora.scenario import Engine

    for count in workers:
        yield f"workers: {count}, gpus_per_worker: {share(count)}"
    if "fused" in Engine.model_fields:
        for fused in (1, 8):
            yield f"workers: 1, gpus_per_worker: 1, fused: {fused}"
    yield "gpus_per_worker: auto"


def _rounds(told: argparse.Namespace, engine: str, folder: Path) -> tuple[float, float, str]:
    """Seconds of a steady round, the share of a GPU that a worker had, and the precision."""
    from fedlora import scenario, simulate

    made = scenario.parse(f"""
name: gpu
model: {{base: minilm, adapter: {{r: 8, alpha: 8, targets: [query, value]}}}}
data: {{dataset: tweets, partition: {{kind: iid}}, max_length: 64}}
clients: {{total: {CLIENTS}, use: {"dp_sgd" if told.private else "sgd"}, local_steps: 4, batch_size: 16, lr: 0.1}}
privacy: {"{noise_multiplier: 1.0, delta: 1.0e-5}" if told.private else "null"}
strategy: {{use: fedavg_lora, measure_error: false}}
rounds: {told.rounds + 2}
eval_every: 1000
engine: {{kind: ray, {engine}}}
""")
    seen: list[Any] = []
    run = simulate(made, out=folder, watch=lambda inner: seen.append(inner) or inner)  # type: ignore[func-returns-value]
    assert not run.summary["failures"] and run.summary["device"] == "cuda"
    seconds = [line["seconds"] for line in run.rounds[1:-1]]  # the first warms up, and the last evaluates
    return statistics.median(seconds), seen[0].pool.gpus_per_worker, run.summary["precision"]


if __name__ == "__main__":
    sys.exit(main())
