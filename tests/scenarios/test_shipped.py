"""The shipped scenarios, on the real MiniLM and real tweets."""

import json
import re

import numpy as np
import pytest

from fedlora import scenario
from fedlora.simulation import simulate

FOLDER = scenario.SHIPPED


@pytest.mark.parametrize(
    "file", sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("paper/*.yaml")]), ids=lambda p: p.stem
)
def test_every_scenario_teaches_its_time_and_result(file):
    made = scenario.load(file)
    comment = "\n".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    assert made.name == file.stem
    assert re.search(r"(second|minute|hour)", comment.lower()) and re.search(
        r"accuracy|perplexity|F1|Pearson|works", comment
    )


def test_smoke_runs_for_real_and_its_adapter_loads_in_plain_peft(tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from fedlora.prepare import prepare
    from fedlora.tasks.located import find_base

    run = simulate("smoke", out=tmp_path / "run", overrides=["engine.kind=inline"])
    assert run.summary["rounds"] == 2 and run.summary["failures"] == 0 and run.summary["epsilon"] <= 6
    test = prepare(scenario.load("smoke")).data.test
    base = AutoModelForSequenceClassification.from_pretrained(find_base("minilm"), num_labels=3)
    model = PeftModel.from_pretrained(base, str(run.folder / "adapter")).eval()
    with torch.no_grad():
        right = [
            int(model(input_ids=torch.tensor(test.row(i))[None].long()).logits.argmax()) == test.targets[i]
            for i in range(len(test))
        ]
    assert np.mean(right) == run.summary["accuracy"]
    card = (run.folder / "adapter" / "README.md").read_text()
    assert f"{run.summary['accuracy']:.4f}" in card and "differential privacy" in card
    config = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
