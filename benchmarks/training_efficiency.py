"""Samples per second of a simulated round over those of a plain peft training loop.

The plain loop is what one writes by hand: one model, a shuffled DataLoader that pads to the longest of the
batch, forward, backward, SGD in float32. A simulated round trains as many steps of as many examples, by clients
one after another, with everything a round does besides: swapping adapters, checks, counting bytes, averaging,
and for the private ones clipping and noise. All use the same base, adapter, data, batch size and threads, in
one process, and take turns. Rates are per second of the process's CPU time, so that other work on the machine
counts as little as it can; the median of the ratios of the pairs is printed.

    python benchmarks/training_efficiency.py [--pairs 8] [--clients 20] [--steps 4 10] [--batch-size 16 64]
        [--data FILE --text NAME --label NAME] [--max-length 64] [--threads 1] [--even] [--layers 4 5]

With --even each text is many joined, all cut to the same number of tokens: there is no padding to save. With
--layers both loops have factors in those layers alone, and what lies below is computed once for each example,
if a client trains on at least as many examples in a round as it holds: see --examples.
"""

import argparse
import csv
import functools
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--data", help="a csv, tsv, json or parquet file; by default the tweets of the demo")
    parser.add_argument("--text", default="text")
    parser.add_argument("--label", default="label")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--even", action="store_true", help="texts of one length")
    parser.add_argument("--layers", type=int, nargs="+", help="that have factors, from 0; by default all")
    parser.add_argument("--examples", type=int, help="that a client holds; by default its share of all")
    parser.set_defaults(test=None)
    told = parser.parse_args()
    shape = f"{' of one length' if told.even else ''}, layers {told.layers or 'all'}"
    print(f"{told.data or 'tweets'}{shape}, {told.clients} clients, {told.threads} thread(s), {told.pairs} pairs")
    with tempfile.TemporaryDirectory() as folder:
        if told.even or told.examples:
            _write(told, Path(folder))
        _tables(told)


def _write(told: argparse.Namespace, folder: Path) -> None:
    """As many texts as asked for, each joined with those after it where all should be of one length."""
    from fedlora import scenario
    from fedlora.data.reading import read

    count = told.clients * told.examples if told.examples else 4000
    joined = told.max_length if told.even else 1
    for split, rows in zip(
        ("train", "test"),
        read(scenario.parse(_scenario(told, 1, 1, False, "fp32")).data, "classification"),
        strict=True,
    ):
        order = random.Random(0).sample(range(len(rows.texts)), min(count, len(rows.texts)))
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            lines = csv.writer(stream)
            lines.writerow(["text", "label"])
            for i in order:
                text = " ".join(itertools.islice(itertools.cycle(rows.texts), i, i + joined))
                lines.writerow([text, (rows.labels or [])[i]])
    told.data, told.test, told.text, told.label = str(folder / "train.csv"), folder / "test.csv", "text", "label"


def _tables(told: argparse.Namespace) -> None:
    print(
        f"{'steps x batch':>14} {'private':>8} {'precision':>10} {'plain/s':>8} {'simulated/s':>12} {'ratio':>6}",
        end="",
    )
    print(f" {'from':>5} {'to':>5} {'real tokens':>12}")
    for steps, size in zip(told.steps, told.batch_size, strict=True):
        _compare(told, steps, size)


def _compare(told: argparse.Namespace, steps: int, size: int) -> None:
    samples = told.clients * steps * size
    plain, real = _plain(told, steps, size)
    cases = list(itertools.product((False, True), ("fp32", "auto")))
    runs = {case: _simulated(told, steps, size, *case) for case in cases}
    seconds: dict[object, list[float]] = {key: [] for key in (None, *runs)}
    for pair in range(-1, told.pairs):  # the first warms up
        order = [(None, plain), *runs.items()]
        for key, run in order if pair % 2 else reversed(order):
            began = time.process_time()
            run()
            if pair >= 0:
                seconds[key].append(time.process_time() - began)
    for private, precision in cases:
        took = seconds[private, precision]
        ratios = [p / s for p, s in zip(seconds[None], took, strict=True)]
        rates = [samples / statistics.median(s) for s in (seconds[None], took)]
        print(
            f"{f'{steps} x {size}':>14} {'yes' if private else 'no':>8} {precision:>10} {rates[0]:>8.1f} ", end=""
        )
        print(
            f"{rates[1]:>12.1f} {statistics.median(ratios):>6.2f} {min(ratios):>5.2f} {max(ratios):>5.2f} ", end=""
        )
        print(f"{real:>12.0%}", flush=True)


def _scenario(told: argparse.Namespace, steps: int, size: int, private: bool, precision: str) -> str:
    client, data = "dp_sgd" if private else "sgd", "dataset: tweets"
    if told.data:
        test = f'"{told.test}"' if told.test else "null"
        data = f'files: {{train: "{told.data}", test: {test}, text: {told.text}, label: {told.label}}}'
    return f"""
name: training-efficiency
model: {{base: minilm, adapter: {{r: 8, alpha: 8, targets: [query, value], layers: {told.layers or "null"}}}}}
data: {{{data}, partition: {{kind: iid}}, max_length: {told.max_length}}}
clients: {{total: {told.clients}, use: {client}, local_steps: {steps}, batch_size: {size}, lr: 0.1}}
privacy: {"{noise_multiplier: 1.0, delta: 1.0e-5}" if private else "null"}
strategy: {{use: fedavg_lora, measure_error: false}}
rounds: 1
engine: {{kind: inline, precision: {precision}, threads: {told.threads}}}
"""


def _simulated(
    told: argparse.Namespace, steps: int, size: int, private: bool, precision: str
) -> Callable[[], None]:
    from dataclasses import replace

    from fedlora import engine, scenario
    from fedlora.prepare import calibrate, prepare

    ready = prepare(scenario.parse(_scenario(told, steps, size, private, precision)))
    made = engine.make(ready.scenario)
    found = made.start(replace(ready.setup, noise=calibrate(ready.scenario, ready.data)))
    ready.strategy.bind(found.layout, found.kind, found.initial, private)
    state = {"adapter": dict(found.initial), "round": 0}

    def run() -> None:
        state["round"] += 1
        instruction = ready.strategy.instruct(state["round"], state["adapter"])
        replies = made.train(instruction, range(told.clients), ready.strategy.partial_sums)
        assert not any(report.error for report in replies.reports)
        state["adapter"].update(ready.strategy.aggregate(instruction.adapter, replies.updates))

    return run


def _plain(told: argparse.Namespace, steps: int, size: int) -> tuple[Callable[[], None], float]:
    """The loop, and the share of real tokens in its padded batches."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import DataLoader
    from transformers import AutoModelForSequenceClassification

    from fedlora import scenario
    from fedlora.prepare import prepare
    from fedlora.tasks.located import find_base

    torch.set_num_threads(told.threads)
    data = prepare(scenario.parse(_scenario(told, steps, size, False, "fp32"))).data
    base = AutoModelForSequenceClassification.from_pretrained(find_base("minilm"), num_labels=len(data.labels))
    config = LoraConfig(
        r=8, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS", layers_to_transform=told.layers
    )
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    examples = data.train

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        texts = [torch.tensor(examples.row(i), dtype=torch.long) for i in rows]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths = torch.tensor([len(t) for t in texts])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(examples.targets[rows])}

    make = functools.partial(DataLoader, range(len(examples)), size, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    masks = [batch["attention_mask"] for batch, _ in zip(make(), range(20), strict=False)]

    def run() -> None:
        batches = itertools.cycle(make())
        for _ in range(told.clients * steps):
            optimizer.zero_grad()
            model(**next(batches)).loss.backward()
            optimizer.step()

    return run, sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


if __name__ == "__main__":
    main()
