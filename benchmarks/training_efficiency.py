"""Samples per second of a simulated round over those of a plain peft training loop.

The plain loop is what one writes by hand: one model, a shuffled DataLoader that pads to the longest of the
batch, forward, backward, SGD. The simulated round trains as many steps of as many examples, by clients
one after another, with everything a round does besides: swapping adapters, checks, counting bytes,
averaging. Both use the same base, adapter, data, batch size, precision and threads, in one process, and
take turns; the ratio of each pair is printed, and their median.

    python benchmarks/training_efficiency.py [--pairs 8] [--batch-size 16] [--steps 4] [--clients 20]
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    told = parser.parse_args()
    samples = told.clients * told.steps * told.batch_size
    simulated, plain = _simulated(told), _plain(told)
    simulated(), plain()  # once each, to warm up
    print(f"{told.clients} clients x {told.steps} steps x {told.batch_size} tweets, {told.precision}, ", end="")
    print(f"{told.threads} thread(s), one process\n{'pair':>4} {'plain/s':>9} {'simulated/s':>12} {'ratio':>6}")
    ratios = []
    for pair in range(told.pairs):
        order = [plain, simulated] if pair % 2 == 0 else [simulated, plain]
        rate = {}
        for run in order:
            began = time.perf_counter()
            run()
            rate[run] = samples / (time.perf_counter() - began)
        ratios.append(rate[simulated] / rate[plain])
        print(f"{pair + 1:>4} {rate[plain]:>9.1f} {rate[simulated]:>12.1f} {ratios[-1]:>6.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}")


def _scenario(told: argparse.Namespace) -> str:
    return f"""
name: training-efficiency
model: {{base: minilm, adapter: {{r: 8, alpha: 8, targets: [query, value]}}}}
data: {{dataset: tweets, partition: {{kind: iid}}, max_length: 64}}
clients: {{total: {told.clients}, use: sgd, local_steps: {told.steps}, batch_size: {told.batch_size}, lr: 0.1}}
strategy: {{use: fedavg_lora, measure_error: false}}
rounds: 1
engine: {{kind: inline, precision: {told.precision}, threads: {told.threads}}}
"""


def _simulated(told: argparse.Namespace) -> Callable[[], None]:
    from fedlora import engine, scenario
    from fedlora.simulation import prepare

    ready = prepare(scenario.parse(_scenario(told)))
    made = engine.make(ready.scenario)
    found = made.start(ready.setup)
    ready.strategy.layout = found.layout
    state = {"adapter": dict(found.initial), "round": 0}

    def run() -> None:
        state["round"] += 1
        instruction = ready.strategy.instruct(state["round"], state["adapter"])
        replies = made.train(instruction, range(told.clients), ready.strategy.partial_sums)
        assert not any(report.error for report in replies.reports)
        state["adapter"].update(ready.strategy.aggregate(instruction.adapter, replies.updates))

    return run


def _plain(told: argparse.Namespace) -> Callable[[], None]:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import DataLoader
    from transformers import AutoModelForSequenceClassification

    from fedlora import scenario
    from fedlora.simulation import prepare
    from fedlora.task import find_base

    torch.set_num_threads(told.threads)
    data = prepare(scenario.parse(_scenario(told))).data
    base = AutoModelForSequenceClassification.from_pretrained(find_base("minilm"), num_labels=len(data.labels))
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    examples = data.train

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        texts = [torch.tensor(examples.row(i), dtype=torch.long) for i in rows]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths = torch.tensor([len(t) for t in texts])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(examples.targets[rows])}

    loader = DataLoader(range(len(examples)), told.batch_size, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]

    def run() -> None:
        batches = iter(loader)
        for _ in range(told.clients * told.steps):
            batch = next(batches)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=told.precision == "bf16"):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()

    return run


if __name__ == "__main__":
    main()
