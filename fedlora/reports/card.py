"""The card beside a run's adapter: what it is, what it was promised, how to load it."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora import plugins
from fedlora.passes import pooled
from fedlora.prepare import Prepared
from fedlora.scenario import Scenario
from fedlora.suitability import name_of_kind
from fedlora.tasks.contract import Task, find
from fedlora.tasks.located import is_factored, named_elsewhere

MEAN = """

def mean(body, args, told, out):  # the head reads the mean over tokens; without this its answers are wrong
    mask = told["attention_mask"].unsqueeze(-1)
    out.last_hidden_state = (out.last_hidden_state * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    if "pooler_output" in out:
        out.pooler_output = out.last_hidden_state[:, 0]


base.base_model.register_forward_hook(mean, with_kwargs=True)
"""


def write(folder: Path, ready: Prepared, summary: Mapping[str, Any]) -> None:
    """The README beside the adapter: what it is and how to load it."""
    scenario, labels = ready.scenario, ready.data.labels
    held = str(ready.setup.base or scenario.model.base)
    task, base, metric = find(scenario.task), named_elsewhere(held), summary["metric"]
    value = summary[metric]
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    what = f"An adapter of peft's kind {config['peft_type']}"
    if "lora_alpha" in config:
        what = f"A LoRA adapter (r = {config['r']}, alpha = {config['lora_alpha']:g})"
    who = "sites" if ready.setup.secret else "simulated clients"
    sent = f"{summary['bytes_up_total']:,} bytes; to clients: {summary['bytes_down_total']:,} bytes"
    if scenario.client_privacy is not None:
        sent = "not reported: it would show how many were drawn"
    judged = f"{summary['test_examples']} held-out examples"
    if ready.strategy.tested:
        judged += ", the mean of clients' own models; this adapter is what all of them began with, untrained"
    elif ready.strategy.personal:
        judged = "the examples that clients hold out, by clients' own models; this adapter is what they share"
    kept = f"; it is of round {summary['best_round']}, the best" if "best_round" in summary else ""
    local = Path(base).is_dir()
    named = "" if local else f"base_model: {base}\n"  # on the Hub it links there, and a folder is of one machine
    whose = "a model of a folder where it was trained" if local else f"`{base}`"
    config_file = folder / "adapter" / "config.json"
    by_hand = scenario.model.pooling == "mean" and not pooled.known(json.loads(config_file.read_bytes()))
    (folder / "adapter" / "README.md").write_text(
        f"""---
{named}library_name: peft
tags: [lora, federated-learning, differential-privacy, fedlora]
---
# {scenario.name}

{what} for {whose}, fine-tuned
by {scenario.clients.total} {who} with `{scenario.strategy.use}` over {summary["rounds"]} rounds{kept}.

- for: task `{scenario.task}`, {_aim(scenario)}
- kind of adapter: {_kind(name_of_kind(ready.strategy, scenario.model.adapter.named))}
- reads: {_reads(task, scenario)}
- {metric} on {judged}: {"not measured" if value is None else f"{value:.4f}"}
- labels: {", ".join(labels) or "none"}{_read_as(scenario, summary)}
- sent by clients: {sent}
- base: {_base(scenario, summary)}
- privacy: {summary["privacy"]}
- scenario hash {summary["hash"]}, seed {summary["seed"]}

```python
{_in_peft(task, base, labels, MEAN if by_hand else "")}
```

With fedlora, the {_reader(task)} too: `model, reader = fedlora.load_adapter("adapter")`.

Without a network: {_offline(held, base)}
""",
        encoding="utf-8",
    )


def _aim(scenario: Scenario) -> str:
    """What is learnt, in the words of its task."""
    if ":" in scenario.task:
        return "which is code of its own"
    said = re.split("[:;]", plugins.summary("tasks", scenario.task))[0]
    return f"{said[0].lower()}{said[1:]}"


def _kind(kind: str) -> str:
    """How the change of the weights was trained, and how it is written here."""
    return "`lora`" if kind == "lora" else f"`{kind}`, written here as a LoRA that changes the weights alike"


def _reads(task: type[Task], scenario: Scenario) -> str:
    if not task.tokens:
        return "images, by the base's own image processor"
    return f"texts, by the base's own tokenizer, of {scenario.data.max_length} tokens at most"


def _reader(task: type[Task]) -> str:
    return "tokenizer" if task.tokens else "image processor"


def _offline(base: str, elsewhere: str) -> str:
    """How to load it where nothing can be fetched."""
    if Path(base).is_dir():
        return "copy the folder of the base beside it, and write its path above."
    if base == elsewhere:
        return f'`hf download {base} --local-dir base` fetches the base before; then write "base" above.'
    return (
        f"fedlora finds the base where `pip install 'fedlora[demo]'` has put it (`{base}`). In plain peft write "
        f"the path of a copy above; `hf download {elsewhere} --local-dir base` fetches one before."
    )


def _read_as(scenario: Scenario, summary: Mapping[str, Any]) -> str:
    """From which probability on a label is given, or what the units of scores are."""
    if (scale := scenario.data.score) is not None:
        return f" (scores: 0 stands for {scale.low:g}, and 1 for {scale.high:g})"
    threshold = summary["metrics"].get("threshold")
    return f" (each given from a probability of {threshold:g} on)" if threshold is not None else ""


def _base(scenario: Scenario, summary: Mapping[str, Any]) -> str:
    """What the base is, and what it lost before training."""
    if (cut := summary.get("compress")) is None:
        return "as it was"
    numbers, by = cut["parameters"], "its weights alone"
    if (told := cut["statistic"]) is not None:
        by = f"a statistic of clients' rows ({told['kind']})"
    return (
        f"`{named_elsewhere(scenario.model.base)}` cut by `{cut['use']}` from {numbers['before']:,} numbers to "
        f"{numbers['after']:,} before training, by {by}; {cut['layers']} {cut['became']}, relative error "
        f"{cut['error']:.3f} in the mean"
    )


def _in_peft(task: type[Task], base: str, labels: Sequence[str], pooling: str) -> str:
    """How to load it without fedlora, where the base can be; the model gives labels by their names.

    Args:
        task: of the run.
        base: as it is called elsewhere.
        labels: in order.
        pooling: code that has the head of `base` read what it was trained on; empty where transformers does.
    """
    if is_factored(base):
        return """# Its base is of factors, which transformers cannot load: see fedlora export --merge
import fedlora

model, reader = fedlora.load_adapter("adapter")"""
    told = task.auto
    more, config = "", ""
    if labels or task.problem is not None:
        told, config = (
            f"AutoConfig, {task.auto}",
            'config = AutoConfig.from_pretrained("adapter")  # with the labels\n',
        )
        more = ", config=config, ignore_mismatched_sizes=True"
    where = ""
    if Path(base).is_dir():
        where = "# a folder where it was trained: name your copy of this base, or its Hub id\n"
    return f"""from peft import PeftModel
from transformers import {told}

{config}{where}base = {task.auto}.from_pretrained("{base}"{more})
{pooling}model = PeftModel.from_pretrained(base, "adapter")"""
