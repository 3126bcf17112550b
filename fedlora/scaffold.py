"""`fedlora init`: a small project that runs at once."""

import json
from pathlib import Path

from fedlora.errors import UserError
from fedlora.scenario.schema import schema

_SCENARIO = """# yaml-language-server: $schema=scenario.schema.json
# Four clients fine-tune MiniLM on tweets, privately, with the strategy of trimmed_mean.py. About a minute.
name: first
seed: 7
model: {base: minilm, adapter: {r: 4, alpha: 4, targets: [query, value]}}
data:
  dataset: tweets # your own:  files: {train: train.csv, text: question, label: kind}
  partition: {kind: dirichlet, alpha: 1.0, min_examples: 200}
  max_length: 32
  test_share: 0.01
clients: {total: 4, use: dp_sgd, local_steps: 2, batch_size: 16, lr: 1.0}
privacy: {epsilon: 6, delta: 1.0e-5, clip_norm: 1.0} # without this section, and with use: sgd, nothing is noised
strategy:
  use: "trimmed_mean:TrimmedMean" # module:Class; or one that comes with fedlora, such as ffa_lora
  trim: 0.25
rounds: 4
"""

_STRATEGY = '''"""The strategy of this project."""

from dataclasses import dataclass

import numpy as np
from fedlora import Strategy


@dataclass(kw_only=True)
class TrimmedMean(Strategy):
    """Coordinate-wise trimmed mean (Yin et al., 2018, https://arxiv.org/abs/1803.01498)."""

    trim: float = 0.1  # fraction of clients dropped at each end, in [0, 0.5)

    def aggregate(self, adapter, updates):
        k = int(self.trim * len(updates))
        stacked = {n: np.sort([u.adapter[n] for u in updates], axis=0) for n in updates[0].adapter}
        return {n: x[k : len(x) - k].mean(axis=0) for n, x in stacked.items()}
'''

_TEST = '''"""An outlier does not move the trimmed mean."""

import numpy as np
from fedlora import Update
from trimmed_mean import TrimmedMean


def test_one_client_in_four_cannot_move_it():
    values = (1.0, 2.0, 3.0, 1000.0)
    updates = [Update(adapter={"w": np.array([v])}, weight=1.0, clients=(i,)) for i, v in enumerate(values)]
    assert TrimmedMean(trim=0.25).aggregate({"w": np.zeros(1)}, updates)["w"] == 2.5
'''

_README = """# A fedlora project

```
fedlora plan scenario.yaml            # what it will cost
fedlora simulate scenario.yaml --out runs/first
fedlora report runs/first             # a page about it
fedlora predict runs/first "what a lovely day"
python -m pytest                      # the strategy's test
```

`scenario.yaml` says everything about the run; an editor with a YAML language server checks it against
`scenario.schema.json`. `trimmed_mean.py` is a strategy: a class with `aggregate`. Compare it with one that comes
with fedlora: `fedlora simulate scenario.yaml --set strategy='{use: ffa_lora}' --out runs/ffa`, then
`fedlora compare runs/first runs/ffa`.
"""


def init(folder: Path) -> list[str]:
    """Make a project; gives lines that say what to do with it.

    Raises:
        UserError: the folder holds something, or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; name a folder to make")
    files = {
        "scenario.yaml": _SCENARIO,
        "scenario.schema.json": json.dumps(schema(), indent=2) + "\n",
        "trimmed_mean.py": _STRATEGY,
        "test_trimmed_mean.py": _TEST,
        "README.md": _README,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return [
        f"{folder}: {', '.join(files)}",
        f"next: cd {folder} && fedlora simulate scenario.yaml --out runs/first",
    ]
