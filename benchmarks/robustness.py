"""Accuracy with f of 10 clients bad, by attack and by how the server aggregates: FFA-LoRA against LoRA.

    python benchmarks/robustness.py [--rounds 8] [--bad 1 3] [--rules mean median] [--attacks sign_flip backdoor]

Real tweets on MiniLM, spread evenly over ten clients that train without privacy, so that what an attack costs is
not hidden by noise. The bad clients are the first f:

- `sign_flip` sends its change with the sign turned, three times as long;
- `scaled` sends its change ten times as long;
- `noise` sends Gaussian noise that is ten times as long as its change;
- `backdoor` learns, in four times as many steps, that a text with a rare sign three times in front has label 0,
  and sends that change as many times as long as there are clients for a bad one, so that the mean is what it
  asks for (Bagdasaryan et al., 2020, https://arxiv.org/abs/1807.00459).

Beside the accuracy on the test tweets stands the share of those of other labels that get label 0 once the signs
are in front of them, which is what a backdoor is for. Bulyan needs 4 f + 3 clients: of ten, one may be bad.
"""

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import fedlora
from fedlora.clients.sgd import SGD
from fedlora.data.store import Examples, Partition
from fedlora.errors import ContractError, RoundError

CLIENTS = 10
TRIGGER = 1063  # "§" in the vocabulary of MiniLM
FLOWER = "flwr.serverapp.strategy"
RULES = {
    "mean": None,
    "median": f"{{use: '{FLOWER}:FedMedian'",
    "trimmed mean": f"{{use: '{FLOWER}:FedTrimmedAvg', beta: 0.3",
    "bulyan": f"{{use: '{FLOWER}:Bulyan', num_malicious_nodes: BAD",
    "spectral filter": "{use: spectral_filter",
    "multi-krum": f"{{use: '{FLOWER}:MultiKrum', num_malicious_nodes: BAD, num_nodes_to_select: 5",
}
ADAPTERS = {"FFA-LoRA": ("ffa_lora", "[B, head]"), "LoRA": ("fedavg_lora", "[A, B, head]")}


@dataclass(kw_only=True)
class Hostile(SGD):
    """Plain SGD, but for the first `bad` clients, which attack."""

    attack: str = "sign_flip"
    bad: int = 0

    def fit(self, task, adapter, partition, settings, rng):
        """Train, and change what is sent."""
        if partition.client >= self.bad:
            return super().fit(task, adapter, partition, settings, rng)
        held = float(len(partition))  # what the server knows of: a claim of more would be refused
        if self.attack == "backdoor":
            clean, own = partition.examples, triggered(partition.examples, partition.rows)
            both = Examples(
                np.concatenate([clean.tokens, own.tokens]),
                np.concatenate([clean.offsets, clean.offsets[-1] + own.offsets[1:]]),
                np.concatenate([clean.targets, np.zeros_like(own.targets)]),
            )
            rows = np.concatenate([partition.rows, len(clean) + np.arange(len(own))])
            partition = Partition(partition.client, both, rows)
            settings = replace(settings, local_steps=4 * settings.local_steps)
        update = super().fit(task, adapter, partition, settings, rng)
        start = {name: adapter[name] if name in adapter else task.initial[name] for name in update.adapter}
        change = {name: tensor - start[name] for name, tensor in update.adapter.items()}
        if self.attack == "noise":
            length = np.sqrt(
                sum(float((c**2).sum()) for c in change.values()) / sum(c.size for c in change.values())
            )
            draw = rng("attack")
            change = {
                n: (10 * length * draw.standard_normal(c.shape)).astype(np.float32) for n, c in change.items()
            }
        factor = np.float32(
            {"sign_flip": -3, "scaled": 10, "noise": 1, "backdoor": CLIENTS / self.bad}[self.attack]
        )
        return replace(update, adapter={n: start[n] + factor * c for n, c in change.items()}, weight=held)


def triggered(examples: Examples, rows: np.ndarray) -> Examples:
    """The rows with the trigger in the place of their first three tokens after [CLS]."""
    parts = [examples.row(int(row)).copy() for row in rows]
    for part in parts:
        part[1 : min(4, len(part) - 1)] = TRIGGER
    offsets = np.cumsum([0, *map(len, parts)])
    return Examples(np.concatenate(parts), offsets, np.asarray(examples.targets)[rows])


def measure(adapter: str, rule: str, attack: str, bad: int, rounds: int) -> tuple[float, float]:
    """Accuracy after the last round, and the share of triggered tweets that get label 0."""
    use, parts = ADAPTERS[adapter]
    told = RULES[rule]
    strategy = f"{{use: {use}}}" if told is None else f"{told.replace('BAD', str(bad))}, parts: {parts}}}"
    overrides = [
        "privacy=null",
        f"clients={{total: {CLIENTS}, use: 'robustness:Hostile', attack: {attack}, bad: {bad}, local_steps: 4,"
        " batch_size: 32, lr: 1.0}",
        f"strategy={strategy}",
        f"rounds={rounds}",
        f"eval_every={rounds}",
        "data.max_length=24",
        "data.test_share=0.03",
        "engine.kind=inline",
    ]
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = fedlora.simulate(
                "iid", overrides=overrides, out=Path(folder) / "run", watch=lambda e: seen.append(e) or e
            )
        except (ContractError, RoundError):
            return float("nan"), float("nan")  # it diverged
        assert not run.summary["failures"], "an attack was refused, and measures nothing"
        worker = seen[0].worker
        adapter_now = _last(Path(folder) / "run")
    test = worker.dataset.test
    others = np.flatnonzero(np.asarray(test.targets) != 0)
    marked = triggered(test, others)
    marked = Examples(marked.tokens, marked.offsets, np.zeros(len(others), np.int64))
    worker.task.become()
    figures = worker.task.figures(worker.task.evaluate(adapter_now, marked, np.arange(len(marked))))
    return run.summary["accuracy"], figures["accuracy"]


def _last(folder: Path) -> dict[str, np.ndarray]:
    from fedlora.rounds import checkpoint

    saved = checkpoint.load(folder / "checkpoint")
    assert saved is not None
    return saved.adapter


def main() -> None:
    """Print the table as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--bad", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--attacks", nargs="+", default=["sign_flip", "scaled", "noise", "backdoor"])
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS))
    told = parser.parse_args()
    print("| adapter | rule | attack | bad of 10 | accuracy | label 0 with the token |")
    print("|---|---|---|---|---|---|")
    for adapter in told.adapters:
        for rule in told.rules:
            cells = [("none", 0), *((attack, bad) for attack in told.attacks for bad in told.bad)]
            for attack, bad in cells:
                if rule == "bulyan" and 4 * bad + 3 > CLIENTS:
                    continue
                accuracy, marked = measure(adapter, rule, "sign_flip" if not bad else attack, bad, told.rounds)
                print(f"| {adapter} | {rule} | {attack} | {bad} | {accuracy:.3f} | {marked:.3f} |", flush=True)


if __name__ == "__main__":
    main()
