"""What a client costs beyond its training: rounds of clients that do nothing but reply.

A whole round is timed, from drawing the cohort to the checkpoint, and divided by its clients. `linear`
strategies get one weighted sum for each chunk of clients; `every update` is the same mean by a strategy that is
not known to be linear, so that each client's update must reach the server. The median over rounds is printed.

    python benchmarks/engine_overhead.py [--clients 1000] [--rounds 8] [--engines inline ray] [--private]
"""

import argparse
import itertools
import resource
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora import Adapter, Client, Event, Rng, Settings, Strategy, Update, weighted_mean
from fedlora.data.store import Partition
from fedlora.tasks.contract import Task

SIZES = {"0.1 MB": 3, "3 MB": 80}  # ranks; MiniLM's queries and values take 36,864 bytes for each


class Idle(Client):
    """Sends back what it received, as arrays of its own: nothing that serialises may send one for many."""

    def fit(self, task: Task, adapter: Adapter, partition: Partition, settings: Settings, rng: Rng) -> Update:
        """Nothing is trained."""
        return Update(
            adapter={name: adapter[name][...] for name in settings.send},
            weight=float(len(partition)),
            clients=(partition.client,),
        )


class PrivateIdle(Idle):
    """The same, at the price of a private client."""

    private = True

    def spends(self, num_examples: int, settings: Settings) -> Event | None:
        """One step."""
        assert settings.noise_multiplier is not None and settings.clip_norm is not None
        return Event(
            noise_multiplier=settings.noise_multiplier,
            sample_rate=settings.batch_size / num_examples,
            steps=1,
            clip_norm=settings.clip_norm,
        )


@dataclass(kw_only=True)
class EveryUpdate(Strategy):
    """The mean, as a strategy that needs each update computes it."""

    def aggregate(self, adapter: Adapter, updates: Sequence[Update]) -> Adapter:
        """The weighted mean."""
        return weighted_mean(updates)

    def diagnose(self, *_: object) -> dict[str, float]:
        """Nothing: how far the mean is from exact costs more than all the rest."""
        return {}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=["inline", "ray"])
    parser.add_argument("--private", action="store_true")
    told = parser.parse_args()
    print(f"{told.clients} idle clients a round, {told.rounds} rounds")
    print(f"{'engine':>8} {'adapter':>8} {'updates':>13} {'ms a client':>12} {'slowest':>8} {'peak MB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        _table(told, Path(folder))


def _table(told: argparse.Namespace, folder: Path) -> None:
    for engine, size, every in itertools.product(told.engines, SIZES, (False, True)):
        seconds = _rounds(told, engine, SIZES[size], every, folder)
        cost = [1000 * s / told.clients for s in seconds]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        what = "every update" if every else "linear"
        print(f"{engine:>8} {size:>8} {what:>13} {statistics.median(cost):>12.2f} ", end="")
        print(f"{max(cost):>8.2f} {peak:>8.0f}", flush=True)


def _rounds(told: argparse.Namespace, engine: str, rank: int, every: bool, folder: Path) -> list[float]:
    """Seconds of each steady round: the first warms up, and the last evaluates."""
    from fedlora import scenario, simulate

    train, test = (folder / f"{split}.csv" for split in ("train", "test"))
    for file, rows in ((train, 2 * told.clients), (test, 2)):
        file.write_text("text,label\n" + "".join(f"note {i},{i % 2}\n" for i in range(rows)))
    client = "PrivateIdle" if told.private else "Idle"
    made = scenario.parse(f"""
name: engine-overhead
model: {{base: minilm, adapter: {{r: {rank}, alpha: {rank}, targets: [query, value]}}}}
data:
  files: {{train: "{train}", test: "{test}", text: text, label: label}}
  partition: {{kind: iid}}
clients: {{total: {told.clients}, use: "engine_overhead:{client}", batch_size: 1}}
privacy: {"{epsilon: 8, delta: 1.0e-3}" if told.private else "null"}
strategy: {"{use: engine_overhead:EveryUpdate}" if every else "{use: fedavg_lora, measure_error: false}"}
rounds: {told.rounds + 2}
eval_every: 1000
engine: {{kind: {engine}, workers: {told.workers if engine == "ray" else 1}, precision: fp32}}
""")
    run = simulate(made, out=folder / f"run-{engine}-{rank}-{every}")
    assert not run.summary["failures"] and run.summary["rounds"] == told.rounds + 2
    return [line["seconds"] for line in run.rounds[1:-1]]


if __name__ == "__main__":
    main()
