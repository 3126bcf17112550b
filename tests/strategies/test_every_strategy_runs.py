"""Every strategy in a whole run: what a run folder holds, and what plain peft makes of its adapter."""

import json

import numpy as np
import pytest

from fedlora import plugins
from fedlora.simulation import simulate
from fedlora.strategies.fedsa_lora import FedSALoRA

NAMES = plugins.names("strategies")
UNEQUAL = [n for n in NAMES if (s := plugins.find("strategies", n)).unequal_ranks and not s.personal]
HELD = "data.client_test_share=0.2"


def score(run, tiny_base):
    """Loss and accuracy of the exported adapter on the held-out set, by transformers and peft alone."""
    import torch
    from peft import PeftModel
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForSequenceClassification

    from fedlora.data.store import Dataset

    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
    model = PeftModel.from_pretrained(base, run.folder / "adapter").eval()
    data = Dataset.open(*data_folders(run))
    loss = correct = 0.0
    with torch.inference_mode():
        for row in range(len(data.test)):
            ids = torch.from_numpy(data.test.row(row).astype(np.int64))[None]
            target = torch.tensor([int(data.test.targets[row])])
            logits = model(input_ids=ids).logits
            loss += float(cross_entropy(logits, target))
            correct += float((logits.argmax(-1) == target).sum())
    return loss / len(data.test), correct / len(data.test)


def data_folders(run):
    from fedlora.prepare import prepare
    from fedlora.scenario import load

    ready = prepare(load(run.folder / "scenario.yaml"))
    return ready.data.folder, ready.data.partition_folder


@pytest.mark.parametrize("name", NAMES)
def test_runs_privately_and_exports_what_it_scored(name, tiny, tiny_base, tmp_path):
    run = simulate(tiny(f"strategy.use={name}", "model.adapter.kind=auto", HELD), out=tmp_path / "run")
    assert run.summary["rounds"] == 2 and run.summary["failures"] == 0 and run.summary["epsilon"] <= 8
    assert plugins.find("strategies", name).merges == any((run.folder / "merges").glob("*.safetensors"))
    for line in run.rounds:
        assert line["bytes_up"] > 0 and line["bytes_down"] > 0 and np.isfinite(line["local_loss"])
    if plugins.find("strategies", name).personal:
        by = "" if plugins.find("strategies", name).tested else "local_"
        assert run.summary["accuracy"] == run.rounds[-1][f"{by}accuracy"]
        assert len(list((run.folder / "personal").glob("0.*.safetensors"))) == 2
    else:
        loss, accuracy = score(run, tiny_base)
        assert loss == pytest.approx(run.summary["loss"], rel=1e-4)
        assert accuracy == run.summary["accuracy"]


@pytest.mark.parametrize("name", UNEQUAL)
def test_clients_of_unequal_ranks_send_unequal_bytes(name, tiny, tiny_base, tmp_path):
    ranks = ("clients.ranks={kind: list, values: [1, 4]}", "clients.lr=0.1")
    run = simulate(tiny(f"strategy.use={name}", *ranks, private=False), out=tmp_path / "run")
    up = {line["client"]: line["bytes_up"] for line in run.clients if line["round"] == 1}
    assert up[0] == up[2] < up[1] == up[3] and run.summary["failures"] == 0
    # Of each of 4 layers a rank more is 32 + 32 numbers; 3 ranks more are 3072 bytes.
    assert up[1] - up[0] == pytest.approx(4 * 3 * 64 * 4, abs=40)
    assert score(run, tiny_base)[0] == pytest.approx(run.summary["loss"], rel=1e-4)


def test_personal_tensors_stay_with_their_client(tiny, tmp_path):
    from safetensors.numpy import load_file

    run = simulate(tiny("strategy.use=fedsa_lora", HELD, "clients.per_round=2", "rounds=4"), out=tmp_path / "run")
    rounds = {}
    for line in run.clients:
        rounds.setdefault(line["client"], []).append(line["round"])
    assert len({tuple(r) for r in rounds.values()}) > 1  # they were not all in the same rounds
    for client, took_part in rounds.items():
        kept = sorted(int(f.name.split(".")[1]) for f in (run.folder / "personal").glob(f"{client}.*.safetensors"))
        assert kept == took_part[-3:]
        held = load_file(run.folder / "personal" / f"{client}.{kept[-1]}.safetensors")
        assert held and all(".lora_A." not in name for name in held)


def test_merges_are_sent_to_a_client_that_missed_them(tiny, tmp_path):
    run = simulate(tiny("strategy.use=flora", "clients.per_round=2", "rounds=5"), out=tmp_path / "run")
    # A merge of 2 clients of rank 4 has 8 columns of 32 and 8 rows of 32 for each of 4 layers, and some words.
    # More than one of them is as much as the layers themselves: then these are sent.
    merge, dense = 4 * (2 * 8 * 32 * 4 + 400), 4 * 32 * 32 * 4
    seen, counts = {}, set()
    for line in run.clients:
        missed = line["round"] - 1 - seen.get(line["client"], 0)
        extra = line["bytes_down"] - run.clients[0]["bytes_down"]
        assert extra == pytest.approx(min(missed * merge, dense), rel=0.05, abs=40)
        seen[line["client"]] = line["round"] - 1
        counts.add(missed)
    assert counts >= {0, 1, 2}


@pytest.mark.parametrize("name", ["ffa_lora", "flexlora", "fedsa_lora", "flora", "fedask"])
def test_a_resumed_run_is_the_same_bit_for_bit(name, tiny, tmp_path):
    from safetensors.numpy import load_file

    asked = (f"strategy.use={name}", HELD)
    whole = simulate(tiny(*asked, "rounds=3"), out=tmp_path / "whole")
    # The noise is calibrated over all rounds, so the first part is stopped, not short.
    stopper = Stopper(after=1)
    stopped = simulate(tiny(*asked, "rounds=3"), out=tmp_path / "parts", display=stopper)
    assert stopped.summary["rounds"] == 1
    resumed = simulate(tiny(*asked, "rounds=3"), out=tmp_path / "parts", resume=True)
    one, other = (load_file(r.folder / "adapter" / "adapter_model.safetensors") for r in (whole, resumed))
    assert one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)
    for key in ("accuracy", "loss", "epsilon", "bytes_up_total", "bytes_down_total"):
        assert whole.summary[key] == resumed.summary[key]
    lines = [json.loads(x) for x in (resumed.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]


class Stopper:
    """A display that interrupts after a round."""

    def __init__(self, after):
        self.after = after

    def stage(self, what):
        pass

    def note(self, what):
        pass

    def begin(self, scenario, metric, done):
        pass

    def round(self, line):
        if line["round"] == self.after:
            raise KeyboardInterrupt


def test_what_is_not_finite_is_not_kept(tiny, tmp_path):
    """A client whose B has blown up fails, and goes on from what it kept before."""
    asked = ("strategy.use=fedsa_lora", HELD, "rounds=3", "clients.use=tests.engine.faulty:Faulty")
    scenario = tiny(*asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedSALoRA, "config", lambda self, round: {"fail": 1 if round == 2 else -1, "fault": "nan"})
        run = simulate(scenario, out=tmp_path / "run")
    errors = {(line["round"], line["client"]): line["error"] for line in run.clients if line["error"]}
    assert errors.keys() == {(2, 1)} and "not finite" in errors[2, 1]
    kept = sorted(int(f.name.split(".")[1]) for f in (run.folder / "personal").glob("1.*.safetensors"))
    assert kept == [1, 3]
