"""Many rounds of a tiny real run: memory, open files, the run folder and the time of a round, as they go on.

    python benchmarks/soak.py [--rounds 2000] [--every 100]

A BERT of two layers, two private clients of one step, FFA-LoRA, evaluation every hundredth round. What should stay
flat is the memory and the number of open files; the run folder grows by the lines of its records, and a round's
time is the CPU time of the process, which others on the machine change least.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

import fedlora
from fedlora.reports.console import Silent
from fedlora.scenario import parse
from fedlora.tasks.located import find_base

PAGE = os.sysconf("SC_PAGE_SIZE")


class Watch(Silent):
    """Prints a line for every so many rounds."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every, self.since = folder, every, time.process_time()

    def round(self, line):
        """Measure, where it is time to."""
        if line["round"] % self.every:
            return
        took, self.since = time.process_time() - self.since, time.process_time()
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20
        files = len(os.listdir("/proc/self/fd"))
        size = sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file()) / 1024
        each = 1000 * took / self.every
        print(f"| {line['round']} | {memory:.1f} | {files} | {size:.0f} | {each:.1f} |", flush=True)


def base(folder: Path) -> Path:
    """A small model with a real tokenizer."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(Path(find_base("minilm")) / name, folder / name)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(**small, max_position_embeddings=64)).save_pretrained(folder)
    return folder


def main() -> None:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = "\n".join(f"note {i} was {('fine', 'poor')[i % 2]},{('good', 'bad')[i % 2]}" for i in range(100))
        (folder / "data.csv").write_text(f"text,label\n{rows}\n")
        scenario = parse(
            f"""
name: soak
model: {{base: "{base(folder / "base")}", adapter: {{r: 2, alpha: 2, targets: [query]}}}}
data: {{files: {{train: "{folder / "data.csv"}"}}, max_length: 16, test_share: 0.2}}
clients: {{total: 2, use: dp_sgd, local_steps: 1, batch_size: 4, lr: 0.1}}
privacy: {{noise_multiplier: 20, delta: 1.0e-3}}
strategy: {{use: ffa_lora}}
rounds: {told.rounds}
eval_every: 100
engine: {{kind: inline, precision: fp32}}
""",
            "soak.yaml",
        )
        print("| round | resident MiB | open files | run folder KiB | CPU ms a round |")
        print("|---|---|---|---|---|")
        fedlora.simulate(scenario, out=folder / "run", display=Watch(folder / "run", told.every))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
