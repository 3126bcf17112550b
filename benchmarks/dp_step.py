"""A private step against a plain one: CPU time and peak memory, on the same batches.

`ours` are fedlora's clients on rows without padding; `padded` is the plain loop by hand, and Opacus's hooks and
its ghost clipping as its documentation has them, on batches padded to the longest. Each runs in a process of
its own, one step in turn; the ratio to the plain step of its own group is printed, and the memory that steps
take on top of the loaded model.

    python benchmarks/dp_step.py [--steps 12] [--batch-size 32]
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

WAYS = {"ours": ("plain", "dp_sgd"), "padded": ("plain", "Opacus hooks", "Opacus ghost clipping")}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32)
    told = parser.parse_args()
    print(f"MiniLM, r = 8, batches of {told.batch_size} tweets, one thread, {told.steps} steps in turn")
    print(f"{'trained':>9} {'group':>7} {'step':>22} {'ms':>7} {'ratio':>6} {'step MB':>8} {'ratio':>6}")
    for trained in ("LoRA", "FFA-LoRA"):
        _compare(told, trained)


def _compare(told: argparse.Namespace, trained: str) -> None:
    context = multiprocessing.get_context("spawn")
    keys = [(group, way) for group, ways in WAYS.items() for way in ways]
    pipes, seconds, memory = {}, {key: [] for key in keys}, dict.fromkeys(keys, 0.0)  # type: ignore[var-annotated]
    for key in keys:
        here, there = context.Pipe()
        context.Process(target=_serve, args=(there, told.batch_size, trained, *key), daemon=True).start()
        pipes[key] = here
        here.recv()
    for turn in range(-2, told.steps):
        for key in keys:
            pipes[key].send(True)
            took, memory[key] = pipes[key].recv()
            if turn >= 0:
                seconds[key].append(took)
    for group, way in keys:
        pipes[group, way].send(False)
        took, plain = seconds[group, way], seconds[group, "plain"]
        ratio = statistics.median(a / b for a, b in zip(took, plain, strict=True))
        more = memory[group, way] / memory[group, "plain"]
        print(f"{trained:>9} {group:>7} {way:>22} {1000 * statistics.median(took):>7.1f} {ratio:>6.2f} ", end="")
        print(f"{memory[group, way]:>8.0f} {more:>6.2f}", flush=True)


def _serve(pipe: Connection, size: int, trained: str, group: str, way: str) -> None:
    """Take a step whenever told; answer with its CPU seconds and the peak MB on top of the loaded model."""
    step = (_ours if group == "ours" else _padded)(size, trained, way)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send(True)
    while pipe.recv():
        began = time.process_time()
        step()
        took = time.process_time() - began
        pipe.send((took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def load_task(size: int, use: str = "lora", r: int = 8) -> tuple[Any, Any]:
    """The task, with the adapter in the model, and as many tweets as a step takes."""
    import numpy as np
    import torch

    from fedlora import scenario
    from fedlora.data.store import Partition
    from fedlora.kinds import contract
    from fedlora.prepare import prepare
    from fedlora.tasks import loading

    torch.set_num_threads(1)
    data = prepare(
        scenario.parse("""
name: dp-step
model: {base: minilm}
data: {dataset: tweets, partition: {kind: iid}, max_length: 64}
clients: {total: 10, use: sgd}
strategy: {use: fedavg_lora}
rounds: 1
""")
    ).data
    kind = contract.load(use, r, float(r), ("query", "value"), None)
    made = loading.load("classification", "minilm", kind, labels=data.labels, seed=0)
    return made, Partition(0, data.train, np.arange(size))


def _ours(size: int, trained: str, way: str) -> Callable[[], object]:
    from fedlora.client import Rng, Settings, load

    task, partition = load_task(size)
    names = tuple(n for n, slot in sorted(task.layout.items()) if slot.role != "A" or trained == "LoRA")
    told = Settings(
        round=1,
        train=names,
        send=names,
        local_steps=1,
        batch_size=size,
        lr=0.1,
        micro_batch_size=size,
        noise_multiplier=1.0,
        clip_norm=1.0,
    )
    client = load("sgd" if way == "plain" else way, {})
    return lambda: client.fit(task, {}, partition, told, Rng(0, 1, 0))


def _padded(size: int, trained: str, way: str) -> Callable[[], object]:
    import torch
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    task, partition = load_task(size)
    if task.packing is not None:
        task.packing.remove()
    for module in task.model.modules():
        vars(module).pop("forward", None)  # layers with factors run as peft wrote them
    batch = task.batch(partition.examples, partition.rows)
    targets = batch.pop("targets")
    model: Any = task.model.train()
    for name, parameter in model.named_parameters():
        parts = ("lora_B", "modules_to_save") if trained == "FFA-LoRA" else ("lora_", "modules_to_save")
        parameter.requires_grad_(any(part in name for part in parts))
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    criterion: Any = torch.nn.CrossEntropyLoss()
    private = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": size}
    if way == "Opacus hooks":
        model = GradSampleModule(model, strict=False)
        optimizer = DPOptimizer(optimizer, **private)
    elif way == "Opacus ghost clipping":
        model = GradSampleModuleFastGradientClipping(
            model, strict=False, max_grad_norm=1.0, use_ghost_clipping=True
        )
        optimizer = DPOptimizerFastGradientClipping(optimizer, **private)
        criterion = DPLossFastGradientClipping(model, optimizer, criterion)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(**batch).logits, targets).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
