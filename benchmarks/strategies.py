"""All strategies on one scenario, with and without privacy: the table of docs/strategies.md.

    python benchmarks/strategies.py [STRATEGY ...] [--out DIR] [--rounds N] [--flower]

Each strategy runs `scenarios/strategies.yaml` once with DP-SGD and once with plain SGD, everything else
equal, the learning rate too; a run that is already in the folder is not run again. Accuracy is on the
held-out set; for `fedsa_lora`, whose clients end with models of their own, it is the mean over clients on the
examples that each holds out. Bytes are per client and round. The aggregation error is of the last round.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from fedlora import plugins

FLOWER = {
    "FedAvgM": {"server_momentum": 0.9},
    "FedAdagrad": {"eta": 0.01},
    "FedAdam": {"eta": 0.01},
    "FedYogi": {"eta": 0.01},
    "FedProx": {"proximal_mu": 0.1},
    "QFedAvg": {"client_learning_rate": 1.0, "q": 0.1, "train_loss_key": "train_loss"},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.1},
    "Krum": {"num_malicious_nodes": 2},
    "MultiKrum": {"num_malicious_nodes": 2, "num_nodes_to_select": 10},
    "Bulyan": {"num_malicious_nodes": 2},
}
PLAIN = ["privacy=null", "clients.use=sgd"]


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="STRATEGY", help="these alone")
    parser.add_argument("--out", type=Path, default=Path("runs/strategies"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flower", action="store_true", help="Flower's own strategies too")
    told = parser.parse_args()
    uses = {name: (name, {}) for name in plugins.names("strategies")}
    if told.flower:
        uses |= {name: (f"flwr.serverapp.strategy:{name}", options) for name, options in FLOWER.items()}
    uses = {name: how for name, how in uses.items() if not told.names or name in told.names}
    rows = []
    for name, (use, options) in uses.items():
        settings = [f"strategy.use={use}", *(f"strategy.{k}={v}" for k, v in options.items())]
        settings += [f"rounds={told.rounds}", f"eval_every={told.rounds}"]
        if ":" not in use:
            settings.append("strategy.measure_error=true")
        private = [*settings, "privacy.share_metrics=true"] if name == "QFedAvg" else settings
        runs = [run(told.out / f"{name}-dp", private), run(told.out / f"{name}-plain", [*settings, *PLAIN])]
        rows.append(row(name, *runs))
    head = [
        "strategy",
        "accuracy, DP",
        "accuracy, plain",
        "KB up",
        "KB down",
        "error, DP",
        "error, plain",
        "agg. s",
    ]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for cells in rows:
        print(f"| {' | '.join(cells)} |")


def run(folder: Path, settings: list[str]) -> Path:
    """A finished run in `folder`."""
    if not (folder / "summary.json").exists():
        command = [sys.executable, "-m", "fedlora", "simulate", "strategies", "--out", str(folder)]
        command += [part for setting in settings for part in ("--set", setting)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{folder.name}: {done.stderr or done.stdout}")
        print(f"{folder.name} done", file=sys.stderr)
    return folder


def row(name: str, private: Path, plain: Path) -> list[str]:
    """The cells of a strategy."""
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (private, plain)]
    lines = [json.loads(x) for x in (private / "metrics.jsonl").read_text().splitlines()]
    last = [json.loads((f / "metrics.jsonl").read_text().splitlines()[-1]) for f in (private, plain)]
    clients = sum(line["clients"] for line in lines)
    kilobytes = [summaries[0][f"bytes_{way}_total"] / clients / 1000 for way in ("up", "down")]
    errors = [line.get("aggregation_error") for line in last]
    return [
        f"`{name}`",
        *(f"{summary['accuracy']:.3f}" for summary in summaries),
        *(f"{kb:.0f}" for kb in kilobytes),
        *("" if error is None else "0" if error < 1e-5 else f"{error:.2g}" for error in errors),
        f"{sorted(line['phases']['aggregate'] for line in lines)[len(lines) // 2]:.2f}",
    ]


if __name__ == "__main__":
    main()
