"""What the comparisons with other simulators share: the workload, a plain client, and taking turns.

100 clients hold 64 tweets each; 20 of them a round take 4 steps of 16, which is once through what they hold. All
train LoRA (r 8, queries and values) and the classifier of MiniLM by SGD. Each contender is a process tree of its
own that does a round whenever it is told to, so that they can take turns and stay as they are in between. A
round is timed from outside, from the word to its answer, and memory is the most that the tree held at once.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from fedlora.data.store import Dataset, Examples

CLIENTS, EXAMPLES, COHORT, STEPS, BATCH = 100, 64, 20, 4, 16
MARK = "@turn "


def scenario(rounds: int, seed: int, lr: float, precision: str = "fp32", **more: str) -> Any:
    """The workload as fedlora's own scenario."""
    from fedlora import scenario

    return scenario.parse(
        f"""
name: contest
seed: {seed}
model: {{base: minilm, adapter: {{r: 8, alpha: 8, targets: [query, value]}}}}
data: {{dataset: tweets, partition: {{kind: sampled, examples: {EXAMPLES}}}, max_length: 64}}
clients: {{total: {CLIENTS}, per_round: {COHORT}, use: sgd, local_steps: {STEPS}, batch_size: {BATCH}, lr: {lr}}}
strategy: {{use: fedavg_lora, measure_error: false}}
rounds: {rounds}
eval_every: 100000
engine: {{kind: ray, workers: 2, precision: {precision}}}
""",
        overrides=[f"{key}={value}" for key, value in more.items()],
    )


def data(seed: int) -> "Dataset":
    """The examples, tokenised once, and who holds which."""
    from fedlora.prepare import prepare

    return prepare(scenario(1, seed, 0.1)).data


def net(labels: int, seed: int) -> Any:
    """MiniLM with LoRA, as peft builds it, from the first adapter of fedlora's scenario, and without dropout."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from fedlora.adapter import Slot
    from fedlora.kinds.contract import initial
    from fedlora.kinds.lora import Lora
    from fedlora.tasks.located import find_base

    base = AutoModelForSequenceClassification.from_pretrained(find_base("minilm"), num_labels=labels)
    told = LoraConfig(r=8, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(base, told)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    kind = Lora(8, 8, ("query", "value"))
    named = ((n.replace(".modules_to_save", "").replace(".default", ""), p) for n, p in model.named_parameters())
    trained = {n: p for n, p in named if p.requires_grad}
    layout = {n: Slot(n, tuple(p.shape), kind.role(n), "") for n, p in trained.items()}
    with torch.no_grad():
        for name, value in initial(kind, layout, seed).items():
            trained[name].copy_(torch.from_numpy(value))
    return model


def padded(examples: "Examples", rows: "NDArray[np.int64]") -> dict[str, "torch.Tensor"]:
    """A batch, padded to its longest."""
    import torch

    texts = [torch.tensor(examples.row(i), dtype=torch.long) for i in rows]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(examples.targets[rows])}


def train(model: Any, examples: "Examples", rows: "NDArray[np.int64]", lr: float) -> int:
    """A client's steps; gives the real tokens of them."""
    import torch

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for part in np.array_split(np.random.permutation(rows), STEPS):
        optimizer.zero_grad()
        model(**padded(examples, part)).loss.backward()
        optimizer.step()
    return int(examples.lengths(rows).sum())


def accuracy(model: Any, examples: "Examples") -> float:
    """On the test set."""
    import torch

    model.eval()
    right = 0
    with torch.inference_mode():
        for rows in np.array_split(np.arange(len(examples)), -(-len(examples) // 64)):
            batch = padded(examples, rows)
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(examples)


def turn(tokens: float, **told: float) -> None:
    """Say that a round is done, and wait for the word; where nobody is left to give it, end."""
    print(MARK + json.dumps({"tokens": tokens, **told}), flush=True)
    if not sys.stdin.readline():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


class Contender:
    """A process tree that does a round at a time."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        """Start it, and wait for its first round."""
        self.name, self.seconds, self.tokens, self.peak = name, list[float](), list[float](), 0.0
        began = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(Path(__file__).parent)},
        )
        threading.Thread(target=self._watch, daemon=True).start()
        self._answer()
        self.first = time.perf_counter() - began

    def round(self, counts: bool = True) -> Mapping[str, float]:
        """Its next round; what it told of it."""
        assert self.process.stdin is not None
        began = time.perf_counter()
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        told = self._answer()
        if counts:
            self.seconds.append(time.perf_counter() - began)
            self.tokens.append(told["tokens"])
        return told

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _answer(self) -> Mapping[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                told: Mapping[str, float] = json.loads(line.removeprefix(MARK))
                return told
        raise SystemExit(f"{self.name} ended with {self.process.wait()}")

    def _watch(self) -> None:
        while self.process.poll() is None:
            self.peak = max(self.peak, tree_mib(self.process.pid))
            time.sleep(5.0)  # the kernel takes its time to count


def tree_mib(root: int) -> float:
    """MiB that a process and all it has started hold now; what several share counts once."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    held, found = 0, {root}
    for pid in sorted(parents):  # children have the higher numbers, but for a wrap
        if pid == root or parents[pid] in found:
            found.add(pid)
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                held += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
            except (OSError, StopIteration):
                continue
    return held / 1024


def compete(commands: Mapping[str, Sequence[str]], pairs: int) -> None:
    """Start the contenders one after another, let them take turns, and print the table.

    Ratios are to the first contender, and medians over the pairs.
    """
    made = [Contender(name, command) for name, command in commands.items()]
    for pair in range(-1, pairs):  # the first warms up
        for contender in made if pair % 2 else reversed(made):
            contender.round(counts=pair >= 0)
    for contender in made:
        contender.close()
    head = f"{'':>14} {'first s':>8} {'ratio':>6} {'round s':>8} {'ratio':>6}"
    print(f"{head} {'us a token':>10} {'ratio':>6} {'peak MiB':>8}")
    ours = made[0]
    for one in made:
        each, mine = ([s / t for s, t in zip(c.seconds, c.tokens, strict=True)] for c in (one, ours))
        rounds, words = (
            statistics.median(a / b for a, b in zip(*both, strict=True))
            for both in ((one.seconds, ours.seconds), (each, mine))
        )
        line = f"{one.name:>14} {one.first:>8.1f} {one.first / ours.first:>6.2f}"
        line += f" {statistics.median(one.seconds):>8.2f} {rounds:>6.2f}"
        print(f"{line} {1e6 * statistics.median(each):>10.1f} {words:>6.2f} {one.peak:>8.0f}", flush=True)


def learn(commands: Mapping[str, Sequence[str]], rounds: int) -> None:
    """Print the accuracy of each contender after so many rounds."""
    for name, command in commands.items():
        contender = Contender(name, command)
        for _ in range(rounds - 1):
            told = contender.round()
        print(f"{name:>16} accuracy {told['accuracy']:.4f}", flush=True)
        contender.close()


def fedlora(rounds: int, seed: int, lr: float, precision: str) -> None:
    """The contender that is fedlora: a simulation whose every round is a turn."""
    import tempfile

    from fedlora import simulate
    from fedlora.privacy.ledger import read
    from fedlora.reports.console import Silent

    held = data(seed)
    tokens = {c: float(held.train.lengths(held.partition(c).rows).sum()) for c in range(CLIENTS)}

    class Turns(Silent):
        def round(self, line: Mapping[str, Any]) -> None:
            lines = read(folder / "clients.jsonl")[-COHORT:]
            turn(sum(tokens[told["client"]] for told in lines), accuracy=line["accuracy"] or 0.0)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        simulate(scenario(rounds, seed, lr, precision), out=folder, display=Turns())


def arguments(*contenders: str) -> Any:
    """The options of a comparison."""
    import argparse

    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8, help="rounds that each contender is timed for")
    parser.add_argument(
        "--accuracy", type=int, nargs="*", metavar="SEED", help="the final accuracy of these seeds instead"
    )
    parser.add_argument("--rounds", type=int, default=30, help="with --accuracy")
    parser.add_argument("--only", nargs="+", choices=contenders, default=contenders, help="these contenders")
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--run", choices=contenders, help="be that contender")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(file: str, told: Any, others: Mapping[str, Sequence[str]]) -> None:
    """Run the comparison.

    Args:
        file: the script.
        told: its options.
        others: the command that runs each of the other contenders, without options.
    """
    rounds = told.rounds if told.accuracy else 10**6
    for seed in told.accuracy or [told.seed]:
        options = ["--rounds", str(rounds), "--seed", str(seed), "--lr", str(told.lr), "--run"]
        ours = {name: [sys.executable, file, *options, name] for name in ("fedlora auto", "fedlora fp32")}
        commands = {**ours, **{name: [*command, *options, name] for name, command in others.items()}}
        commands = {name: command for name, command in commands.items() if name in told.only}
        if told.accuracy:
            print(f"seed {seed}, {rounds} rounds")
            learn(commands, rounds)
        else:
            compete(commands, told.pairs)
