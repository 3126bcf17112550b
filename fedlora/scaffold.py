"""`fedlora init`: a small project that runs at once."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora import scenario as scenarios
from fedlora.data import overview, reading, suggested
from fedlora.errors import SettingError, UserError
from fedlora.guessing import Guess, guess, of_both
from fedlora.privacy import affordable
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

    trim: float = 0.1  # fraction of clients dropped at each end, in [0, 0.5): one at least, of three or more

    def aggregate(self, adapter, updates):
        k = min(max(1, int(self.trim * len(updates))), (len(updates) - 1) // 2)
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


_OF_DATA = """# yaml-language-server: $schema=scenario.schema.json
# Five simulated clients fine-tune a model privately, to learn {aim}. Some minutes on two cores with MiniLM.
name: {name}
seed: 7
task: {task}
model:
{model}
data:
  files: {files}
{more}  partition: {{kind: iid}} # or {{kind: dirichlet, alpha: 0.5}}, or {{kind: natural, column: site}}
  max_length: {length} # tokens; {longer}
  test_share: 0.2 # held out to judge the model
# A step takes this share of a client's rows: {why}.
clients: {{total: 5, use: dp_sgd, local_steps: 1, sample_rate: {rate}, micro_batch_size: {micro}}}
privacy: {{epsilon: 8, delta: {delta}, clip_norm: 4.0}} # for each row; a smaller epsilon is more private
{persons}strategy: {{use: ffa_lora, server: {{kind: adam, lr: {lr}, schedule: {{kind: linear}}}}}}
rounds: {rounds}
eval_every: {every}
"""

_README_OF_DATA = """# A fedlora project

```
fedlora check scenario.yaml
fedlora plan scenario.yaml            # what it will cost
fedlora simulate scenario.yaml --out runs/first
fedlora simulate scenario.yaml --baseline pooled --out runs/pooled    # how good it could be, without privacy
fedlora compare runs/first runs/pooled
fedlora report runs/first             # a page about it
fedlora predict runs/first "a text"
```

`scenario.yaml` says everything about the run; an editor with a YAML language server checks it against
`scenario.schema.json`. `trimmed_mean.py` is a strategy of your own: a class with `aggregate`. Try it in the place
of the scenario's, and its test:

```
fedlora simulate scenario.yaml --set strategy='{use: "trimmed_mean:TrimmedMean"}' --out runs/trimmed
python -m pytest
```
"""

_PERSON = """# Rows of one {0} may be of one person. To protect persons and not rows, add to privacy:  person: {0}
"""
_OWN = {"trimmed_mean.py": _STRATEGY, "test_trimmed_mean.py": _TEST}  # the project's own strategy
_ENCODER = """\
  base: minilm # any Hub id or path of an encoder works too, with the names of its layers as targets
  adapter: {r: 8, alpha: 64, targets: [query, key, value, dense], layers: [4, 5]} # upper two of six"""
_SENTENCES = """\
  base: minilm # any Hub id or path of an encoder works too, with the names of its layers as targets
  pooling: mean # over the tokens of a text, as MiniLM was trained; leave it out for a base that was not
  adapter: {r: 8, alpha: 8, targets: [query, key, value, dense], layers: [5]} # the uppermost of six"""
_WRITER = """\
  base: HuggingFaceTB/SmolLM2-135M-Instruct # any Hub id or path of a language model works too
  adapter: {r: 8, alpha: 16, targets: [q_proj, k_proj, v_proj, o_proj]}"""
_MOST_LABELS = 200
_PER_TOKEN = 4.0  # characters of English; of other scripts fewer
_STEPS = {
    "rounds": 60,
    "rate": 0.06,
    "every": 10,
    "lr": 0.01,
    "why": "more of them take more time, and have less noise",
}
_LARGE = {"rounds": 20, "every": 5, "lr": 0.03, "why": "with 1.0 it has the least noise, which rare labels need"}
_ROWS = 20_000  # of all clients, in a large step at most


def of_data(
    folder: Path,
    data: Path,
    text: str | None,
    label: str | None,
    task: str | None = None,
    encoding: str | None = None,
) -> list[str]:
    """Make a project of a table of one's own; gives lines that say what to do with it.

    Args:
        folder: to make.
        data: a csv, tsv, json, jsonl or parquet file with a header, or a conll file.
        text: the column of texts; None: that of the longest values.
        label: the column of labels; None: by the task, of classification that of the fewest values, two at least.
        task: to learn; None: by what the columns hold.
        encoding: of the table; None: UTF-8, or as its mark says.

    Raises:
        UserError: the folder holds something, the table has no such columns, they may be for two tasks, or
            `fedlora check` would refuse the rows.
    """
    try:
        "".encode(encoding or "utf-8")
    except (LookupError, ValueError) as error:
        known = "such as utf-8, cp1252, latin-1 or gb18030"
        raise UserError(f"--encoding {encoding}: no encoding is called so: {known}") from error
    try:
        columns = reading.columns_of(data, encoding)
    except SettingError as error:
        said = error.message.replace("data.encoding:", "--encoding").replace("data.encoding", "--encoding")
        raise UserError(said) from error
    if not columns or not next(iter(columns.values())):
        raise UserError(f"{data}: holds no rows")
    found = guess(data, columns, task, text, label) or _classes(data, columns, text, label)
    found = found if text is not None else of_both(found, columns)
    lengths = sorted(map(len, found.texts))
    typical = lengths[int(0.95 * (len(lengths) - 1))] / _PER_TOKEN
    rows, writes = len(lengths), found.task in ("causal_lm", "preference")
    files = {"train": str(data.absolute())} | found.files
    persons = suggested.persons(columns, _named(found))[:1]
    written = () if encoding is None else (f"encoding: {json.dumps(encoding)}",)
    labels = found.task in ("classification", "multi_label")
    steps = _LARGE | {"rate": float(f"{min(_ROWS / rows, 1.0):.2g}")} if labels else _STEPS
    told = {
        "name": json.dumps(_word(data.stem)),
        "task": found.task,
        "aim": found.aim,
        "model": _WRITER if writes else _SENTENCES if labels else _ENCODER,
        "files": f"{{{', '.join(f'{key}: {json.dumps(value)}' for key, value in files.items())}}}",
        "more": "".join(f"  {line}\n" for line in (*found.more, *written)),
        "persons": "".join(_PERSON.format(json.dumps(name)) for name in persons),
        "micro": 8 if writes else 64,
        "longer": f"longer texts {'have windows' if found.task == 'token_classification' else 'are cut'}",
        "length": next((n for n in (32, 64, 128) if typical <= n), 256),
        "delta": f"{min(1e-5, 0.1 / max(rows, 1)):.0e}".replace("e", ".0e"),
    }
    made = {
        "scenario.yaml": _OF_DATA.format(**told, **steps),
        "scenario.schema.json": json.dumps(schema(), indent=2) + "\n",
        **_OWN,
        "README.md": _README_OF_DATA,
    }
    _check(data, made["scenario.yaml"])
    _write(folder, made)
    return [
        f"{folder}: {', '.join(made)}",
        f"{rows} rows, {_learnt(found, columns)}",
        *(suggested.said(name, columns[name]) for name in persons),
        f"next: cd {folder} && fedlora simulate scenario.yaml --out runs/first",
    ]


def _check(data: Path, text: str) -> None:
    """Make sure that a scenario's rows are such as `fedlora check` takes.

    Raises:
        UserError: they are not.
    """
    made = scenarios.parse(text)
    try:
        seen = overview.overview(made.data, made.task, made.clients.total, made.seed)
        affordable.check(made, seen.sizes or ())
    except SettingError as error:
        of_file = str(data.absolute()) in error.message
        raise UserError(error.message if of_file else f"{data}: {error.message}") from error


def _named(found: Guess) -> list[str]:
    """The columns that are learnt."""
    return [n for told in found.files.values() for n in ([told] if isinstance(told, str) else told)]


def _learnt(found: Guess, columns: Mapping[str, list[Any]]) -> str:
    """What is learnt from what, in words."""
    told = found.files.get("text", "")
    text = " and ".join(map(repr, [told] if isinstance(told, str) else told))
    if found.task != "classification":
        return f"task: {found.task}{f', of {text}' if told else ''}"
    label = found.files["label"]
    return f"{len(set(map(str, columns[label])))} values of {label!r} to be learnt from {text}"


def _classes(data: Path, columns: Mapping[str, list[Any]], text: str | None, label: str | None) -> Guess:
    """Classification, by a column of texts and one of labels."""
    written = {name: [str(cell) for cell in cells] for name, cells in columns.items()}
    text, label = _chosen(data, written, text, label)
    aim = f"{json.dumps(label)} of {json.dumps(text)}"
    return Guess("classification", {"text": text, "label": label}, (), written[text], aim)


def _chosen(data: Path, columns: Mapping[str, list[str]], text: str | None, label: str | None) -> tuple[str, str]:
    """The columns of texts and labels, as named or by what they hold.

    Raises:
        UserError: none looks like it.
    """
    mean = {name: sum(map(len, values)) / len(values) for name, values in columns.items() if name != label}
    text = text or max(mean, key=lambda name: mean[name], default=None)
    counts = {name: len(set(values)) for name, values in columns.items() if name != text}
    if label is None:
        few = {name: n for name, n in counts.items() if 2 <= n <= min(_MOST_LABELS, len(columns[name]) // 2)}
        label = min(few, key=lambda name: few[name], default=None)
        if label is None and (same := next((name for name, n in counts.items() if n == 1), None)):
            raise UserError(
                f"{data}: {same!r} has one value, and no other column looks like labels: there is "
                "nothing to tell apart"
            )
    if text is None or label is None:
        raise UserError(f"{data}: no column looks like labels beside one of texts: name them, --text and --label")
    if text == label:
        raise UserError(f"{data}: {text!r} cannot be both text and label: name another, --text or --label")
    if len(set(columns[label])) < 2:
        raise UserError(f"{data}: {label!r} has one value, and nothing to tell apart: name another, --label")
    if "" in columns[label]:
        at = columns[label].index("") + 1
        raise UserError(f"{data}: row {at} has no {label!r}: fill it in, or leave the row out")
    return text, label


def _word(stem: str) -> str:
    """A file's name as a scenario's."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "-" for c in stem).lstrip("_.-")
    return kept[:64] or "mine"


def init(folder: Path) -> list[str]:
    """Make a project; gives lines that say what to do with it.

    Raises:
        UserError: the folder holds something, or cannot be made.
    """
    files = {
        "scenario.yaml": _SCENARIO,
        "scenario.schema.json": json.dumps(schema(), indent=2) + "\n",
        **_OWN,
        "README.md": _README,
    }
    _write(folder, files)
    return [
        f"{folder}: {', '.join(files)}",
        f"next: cd {folder} && fedlora simulate scenario.yaml --out runs/first",
    ]


def _write(folder: Path, files: Mapping[str, str]) -> None:
    """Make a folder of files.

    Raises:
        UserError: it holds something, or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; name a folder to make")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
