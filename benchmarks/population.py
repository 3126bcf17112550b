"""Many registered clients, of which few train; and very many that train a little, round after round.

    python benchmarks/population.py [--totals 1000 1000000] [--per-round 100] [--rounds 6] [--pairs 3] [--private]
    python benchmarks/population.py --flat [--clients 10000] [--rounds 20] [--private]

The first trains the same cohort size out of populations of each size, each in a process of its own, in turns, and
prints for each the median round in seconds of the process's CPU time, so that other work on the machine counts as
little as it can, the writing of its records counted in, and the most memory that it held.
With `--flat` idle clients reply, and what the process held at most in each round is printed: it should not grow.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.reports.console import Silent


def peak_mib() -> float:
    """The most that this process has held since the last call."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel starts to count anew
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


class Watch(Silent):
    """Notes when rounds end, and what the process held."""

    def __init__(self, show: bool) -> None:
        self.show, self.ends, self.peaks, self.first = show, [time.process_time()], list[float](), 0.0
        peak_mib()

    def round(self, line: Mapping[str, Any]) -> None:
        """Measure."""
        self.first = self.first or time.perf_counter()
        self.ends.append(time.process_time())
        self.peaks.append(peak_mib())
        if self.show:
            print(f"| {line['round']} | {self.ends[-1] - self.ends[-2]:.2f} | {self.peaks[-1]:.1f} |", flush=True)


def run(told: argparse.Namespace, total: int, per_round: int, client: str, show: bool) -> Watch:
    """A run of `rounds` rounds; the last, which is not looked at, evaluates."""
    from fedlora import scenario, simulate

    private = "privacy: {epsilon: 8, delta: 1.0e-6}" if told.private else ""
    made = scenario.parse(f"""
name: population
model: {{base: minilm, adapter: {{r: 8, alpha: 8, targets: [query, value]}}}}
data: {{dataset: tweets, partition: {{kind: sampled, examples: 64}}, max_length: 64}}
clients: {{total: {total}, per_round: {per_round}, use: "{client}", local_steps: 1, batch_size: 8}}
{private}
strategy: {{use: fedavg_lora, measure_error: false}}
rounds: {told.rounds + 1}
eval_every: 100000
engine: {{kind: inline, precision: fp32}}
""")
    watch = Watch(show)

    def stop(line: Mapping[str, Any]) -> None:
        Watch.round(watch, line)
        if line["round"] == told.rounds:
            raise KeyboardInterrupt  # before the round that evaluates

    watch.round = stop  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        simulate(made, out=Path(folder) / "run", display=watch)
    return watch


def population(told: argparse.Namespace) -> None:
    """The table of populations."""
    found: dict[int, list[Mapping[str, float]]] = {total: [] for total in told.totals}
    for pair in range(told.pairs):
        for total in told.totals if pair % 2 else reversed(told.totals):
            command = [sys.executable, __file__, "--one", str(total), *sys.argv[1:]]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[total].append(json.loads(out.splitlines()[-1]))
    print("| clients | of which train | first round after, s | a round, CPU s | ratio | peak MiB | more |")
    print("|---|---|---|---|---|---|---|")
    rows = {t: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for t, runs in found.items()}
    least = rows[told.totals[0]]
    for total, row in rows.items():
        print(
            f"| {total:,} | {told.per_round} | {row['first']:.1f} | {row['round']:.2f} | "
            f"{row['round'] / least['round']:.2f} | {row['peak']:.0f} | {row['peak'] - least['peak']:.0f} |"
        )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--totals", type=int, nargs="+", default=[1000, 1_000_000])
    parser.add_argument("--per-round", type=int, default=100)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--flat", action="store_true", help="very many idle clients, round after round")
    parser.add_argument("--clients", type=int, default=10_000, help="with --flat")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # a population, in this process
    told = parser.parse_args()
    told.rounds = told.rounds or (20 if told.flat else 6)
    if told.one:
        began = time.perf_counter()
        watch = run(told, told.one, told.per_round, "dp_sgd" if told.private else "sgd", show=False)
        each = [b - a for a, b in zip(watch.ends[1:], watch.ends[2:], strict=False)]
        figures = {"first": watch.first - began, "round": statistics.median(each), "peak": max(watch.peaks)}
        print(json.dumps(figures))
    elif told.flat:
        print(f"{told.clients} idle clients a round\n\n| round | CPU s | peak MiB |\n|---|---|---|")
        client = "engine_overhead:" + ("PrivateIdle" if told.private else "Idle")
        watch = run(told, told.clients, told.clients, client, show=True)
        half = len(watch.peaks) // 2
        print(f"\nmost in rounds {half + 1} on over round 5: {max(watch.peaks[half:]) / watch.peaks[4]:.3f}")
    else:
        population(told)


if __name__ == "__main__":
    main()
