"""What a base that was cut to 70 % knows, by how it was cut: by weights, or by a statistic with noise.

    python benchmarks/compression.py --train rows.tsv --test other.tsv [--text text] [--rows 3000] [--rounds 12]

Both files are tables with a head, of texts and a column `label`. Five clients hold the rows. Each base, of MiniLM
unless another is named, is judged twice. Its last hidden states on test rows are compared with those of the
whole base, relative to these; and its last block is fine-tuned privately in a few rounds, for the accuracy. Layers
of 384 inputs are cut. All that is private comes to epsilon 8 together, the statistic with it; a statistic without
noise is there to compare, and promises nothing. The statistic is taken once, and noised for each epsilon.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import fedlora
from fedlora import compressing, prepare, public
from fedlora.compressors import contract
from fedlora.compressors.contract import Statistic
from fedlora.engine.statistic import Taker
from fedlora.engine.worker import Worker
from fedlora.privacy import accounting
from fedlora.privacy.mechanisms.statistic import StatisticGaussian
from fedlora.scenario import parse
from fedlora.seeding import stream
from fedlora.tasks import located, smaller

WHOLE, DELTA, CLIENTS = 8.0, 1e-5, 5
SCENARIO = """
name: compression
seed: {seed}
model: {{base: "{base}", adapter: {{r: 8, alpha: 64, targets: [query, key, value, dense], layers: [{block}]}}}}
data:
  files: {{train: "{train}", test: "{test}", text: {text}, label: label}}
  partition: {{kind: iid}}
  max_length: 24
clients: {{total: 5, use: dp_sgd, local_steps: 1, sample_rate: {rate}, micro_batch_size: 64}}
privacy: {{noise_multiplier: {noise}, delta: 1.0e-5, clip_norm: 4.0}}
strategy: {{use: ffa_lora, server: {{kind: adam, lr: 0.03, schedule: {{kind: linear}}}}}}
rounds: {rounds}
eval_every: {rounds}
engine: {{kind: inline, threads: 1, precision: fp32}}
"""
CASES = [  # compressor, statistic, its epsilon: 0 for none, and None where no row is looked at
    ("lord", None, None),
    ("lord", "gram", 0.0),
    ("lord", "gram", 1.0),
    ("lord", "gram", 6.0),
    ("lord", "mean", 0.0),
    ("lord", "mean", 1.0),
    ("lord", "mean", 6.0),
    ("welore", None, None),
    ("afm", "gram", 0.0),
    ("afm", "gram", 6.0),
    ("afm", "gram", 1.0),
]


def first(file: Path, rows: int, out: Path) -> Path:
    """Some rows of a table by chance, the same each time."""
    head, *lines = file.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.split("\t")[0].strip()]
    chosen = np.sort(np.random.default_rng(0).permutation(len(lines))[:rows])
    out.write_text("\n".join([head, *(lines[i] for i in chosen)]) + "\n", encoding="utf-8")
    return out


class Taken:
    """A statistic of each client's rows."""

    def __init__(self, kind: str, told: dict, exclude: list[str]) -> None:
        self.kind = kind
        scenario = parse(
            SCENARIO.format(noise=1.0, **told),
            "x.yaml",
            [
                "compress={use: lord}",
                f"statistics={{kind: {kind}}}",
                "privacy=null",
                "clients.use=sgd",
            ],
        )
        ready = prepare.prepare(scenario)
        self.loaded, _ = compressing.load(told["base"], None, ["all-linear"], exclude)
        taker = Taker(Worker(ready.setup), self.loaded.layers)
        self.sums = [taker.sums(c, stream(0, "benchmark", c)) for c in range(CLIENTS)]
        self.shared = taker.own
        self.count = sum(ready.data.units(c) for c in range(CLIENTS))

    def known(self, epsilon: float) -> tuple[dict[str, Statistic], tuple]:
        """The statistic with the noise of an epsilon, 0 for none; and what each client paid."""
        if not epsilon:
            total = {n: sum(s[n] for s in self.sums) / self.count for n in self.sums[0]}
            return {n: Statistic(self.kind, total[own]) for n, own in self.shared.items()}, ()
        sigma = accounting.calibrate(epsilon, DELTA, 1.0, 1)
        made = StatisticGaussian(noise_multiplier=sigma, sample_rate=1.0, total=self.count)
        noised = [made.noised(s, stream(0, "benchmark", c, str(epsilon))) for c, s in enumerate(self.sums)]
        total = {n: sum(s[n] for s in noised) / self.count for n in self.sums[0]}
        deviation = sigma * CLIENTS**0.5 / self.count
        return {n: Statistic(self.kind, total[own], deviation) for n, own in self.shared.items()}, (made.event(),)


def states(base: str, batches: list) -> list[torch.Tensor]:
    """Last hidden states of real tokens."""
    from transformers import AutoModel

    model = smaller.pretrained(AutoModel, located.find_base(base)).eval()
    with torch.no_grad():
        return [model(input_ids=i, attention_mask=m).last_hidden_state[m.bool()] for i, m in batches]


def main(args: Sequence[str] | None = None) -> None:
    """Print a table of states, then one of accuracies."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--block", type=int, default=5, help="which is fine-tuned")
    parser.add_argument("--text", default="sentence")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--statistics", nargs="+", default=["gram", "mean"])
    parser.add_argument("--public", type=Path, help="a table of texts in a column `sentence`, for one more gram")
    parser.add_argument("--states-alone", action="store_true", help="train nothing")
    parser.add_argument("--exclude", nargs="*", default=["pooler", r".*layer\.[0-9]+\.output\.dense"])
    told = parser.parse_args(args)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        train, test = first(told.train, told.rows, root / "train.tsv"), first(told.test, 500, root / "test.tsv")
        words = {"train": train, "test": test, "rounds": told.rounds, "rate": told.rate}
        words |= {"text": told.text, "block": told.block}
        loaded, reader = compressing.load(told.base, None, ["all-linear"], told.exclude)
        every = {
            kind: Taken(kind, {**words, "base": told.base, "seed": 1}, told.exclude) for kind in told.statistics
        }
        texts = public.read(test, told.text)[:200]
        batches = [*public.batches(reader, texts, 24, loaded.model)]
        right = states(told.base, batches)
        paid = {}
        print("\n| compressor | by | numbers | states off |\n|---|---|---|---|", flush=True)
        for use, kind, epsilon in CASES:
            if kind is not None and kind not in every:
                continue
            by = "weights" if kind is None else f"{kind}, epsilon {epsilon:g}" if epsilon else f"{kind}, no noise"
            folder = root / f"{use}-{by.replace(' ', '')}"
            known, paid[folder] = ({}, ()) if kind is None else every[kind].known(epsilon)
            compressor = contract.load(use, {"keep": told.keep})
            made = compressing.write(folder, loaded, reader, compressor, use, known, {})
            there = states(str(folder), batches)
            off = sum(float((a - b).square().sum()) for a, b in zip(there, right, strict=True))
            off = (off / sum(float(b.square().sum()) for b in right)) ** 0.5
            print(f"| {use} | {by} | {made.manifest['parameters']['after']:,} | {off:.3f} |", flush=True)
        if told.public is not None:
            read = public.read(first(told.public, told.rows, root / "public.tsv"), "sentence")
            known = public.statistic(loaded.model, loaded.layers, reader, "gram", read, 24)
            compressor, folder = contract.load("lord", {"keep": told.keep}), root / "public"
            compressing.write(folder, loaded, reader, compressor, "lord", known, {})
            there = states(str(folder), batches)
            off = sum(float((a - b).square().sum()) for a, b in zip(there, right, strict=True))
            print(f"| lord | public gram | | {(off / sum(float(b.square().sum()) for b in right)) ** 0.5:.3f} |")
        print("\n| base | accuracy |\n|---|---|", flush=True)
        for base in [] if told.states_alone else [told.base, *paid]:
            noise = accounting.calibrate(WHOLE, DELTA, told.rate, told.rounds, "pld", paid.get(base, ()))
            found = []
            for seed in told.seeds:
                scenario = parse(SCENARIO.format(base=base, noise=noise, seed=seed, **words), "x.yaml")
                run = fedlora.simulate(scenario, out=root / f"run-{Path(base).name}-{seed}")
                found.append(run.summary["accuracy"])
            print(f"| {Path(base).name} | {np.mean(found):.3f} |", flush=True)


if __name__ == "__main__":
    main()
