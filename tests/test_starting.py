"""Warm starts: what a run takes over of another, and what it refuses."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedlora import simulate, starting
from fedlora.adapter import fingerprint
from fedlora.cli import main
from fedlora.engine import Worker
from fedlora.errors import ContractError, UserError
from fedlora.kinds.lora import Lora
from fedlora.prepare import calibrate, prepare
from fedlora.run import Run
from fedlora.strategy import load as load_strategy
from fedlora.suitability import check
from fedlora.tasks import loading

LEARN = ("clients.optimizer=adamw", "clients.lr=0.02", "clients.local_steps=10")
HEAD = ("base_model.model.classifier.bias", "base_model.model.classifier.weight")


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory):
    """A run that learns both factors and the head."""
    told = tiny(*LEARN, "strategy.use=fedavg_lora", private=False)
    return simulate(told, out=tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture
def adapter(first, tmp_path):
    """Its adapter, in a folder of its own to be changed."""
    return shutil.copytree(first.folder / "adapter", tmp_path / "adapter")


@pytest.fixture
def reports(first, reviews, tmp_path):
    """A csv with the same texts under other labels."""
    file = tmp_path / "others.csv"
    file.write_text(reviews.read_text().replace(",good,", ",a,").replace(",bad,", ",b,"))
    return file


def worker(scenario):
    ready = prepare(scenario)
    return Worker(replace(ready.setup, noise=calibrate(scenario, ready.data)))


def rewrite(folder, **told):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **told}))


@pytest.mark.parametrize("where", ["", "adapter"])
def test_it_begins_where_the_other_ended(tiny, first, where):
    made = worker(tiny(f"model.start={first.folder / where}", "seed=99", private=False))
    saved = load_file(first.folder / "adapter" / "adapter_model.safetensors")
    assert made.task.initial.keys() == saved.keys()
    assert all(np.array_equal(made.task.initial[name], saved[name]) for name in saved)
    figures = made.figures({"test": made.evaluate(made.task.initial, "test", 0, first.summary["test_examples"])})[
        "test"
    ]
    same_rows = worker(tiny(private=False))
    expected = same_rows.figures({"test": same_rows.evaluate(saved, "test", 0, first.summary["test_examples"])})[
        "test"
    ]
    assert figures == expected and figures["accuracy"] == first.summary["accuracy"]
    made.task.become(draw=3)  # a further draw of the seed moves nothing that was taken over
    made.task.begin({}, ())
    assert all(np.array_equal(tensor, saved[name]) for name, tensor in made.task.read(list(saved)).items())


def test_the_run_says_what_it_began_from_and_is_gone_on_with_from_that_alone(
    tiny, first, adapter, tmp_path, monkeypatch
):
    private = simulate(tiny(f"model.start={first.folder}"), out=tmp_path / "private")
    assert private.summary["start"] == {
        "folder": str(first.folder), "epsilon": None, "delta": None, "privacy_unit": None,
    }  # fmt: skip
    assert "the adapter that it began from is taken as given" in private.summary["privacy"]
    assert any("for rows that are in both, that adds" in said for said in private.remarks())
    assert private.rounds[0]["accuracy"] > 0.9 > 0.75 > 35 / 60  # from where the other ended
    again = simulate(tiny(f"model.start={private.folder}"), out=tmp_path / "again")
    assert again.summary["start"]["epsilon"] == private.summary["epsilon"] > 0
    assert any("which spent epsilon" in said for said in again.remarks())

    monkeypatch.chdir(tmp_path)
    run = simulate(tiny("model.start=adapter", "rounds=1", private=False), out="run")
    assert run.scenario["model"]["start"] == str(adapter) and "start" not in first.summary
    save_file({n: t * 2 for n, t in load_file(adapter / "adapter_model.safetensors").items()},
              adapter / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(UserError, match=r"it began with another adapter \(model.start\): put back what it had"):
        simulate(tiny("model.start=adapter", private=False), out="run", resume=True)


def test_what_does_not_travel_is_checked_and_digested(tiny, first, tmp_path):
    """FFA-LoRA's A is the start's; another start, or none, is another run's."""
    begun, plain = worker(tiny(f"model.start={first.folder}")), worker(tiny())
    told = begun.strategy.instruct(1, dict(begun.task.initial))
    kept = {n: t for n, t in begun.task.initial.items() if n not in told.adapter}
    assert kept and all(".lora_A." in name for name in kept)
    told = replace(told, frozen=fingerprint(kept))
    begun._agree(told)
    with pytest.raises(ContractError, match="the tensors that stay frozen are not the server's"):
        plain._agree(told)
    assert begun.describe().fingerprint != plain.describe().fingerprint
    assert begun.digests._base() != plain.digests._base()


def test_a_head_for_other_labels_is_drawn_and_a_line_says_so(tiny, first, reports, caplog):
    other = (f"model.start={first.folder}", f"data.files.train={reports}")
    with caplog.at_level(logging.WARNING):
        made = worker(tiny(*other, private=False))
    said = [r.getMessage() for r in caplog.records if "model.start" in r.getMessage()]
    assert said == [
        f"model.start: its head is not taken over: {first.folder} is for the labels bad, good and not for a, b in "
        "this order"
    ]
    fresh = worker(tiny(f"data.files.train={reports}", private=False)).task.initial
    saved = load_file(first.folder / "adapter" / "adapter_model.safetensors")
    for name, tensor in made.task.initial.items():
        assert np.array_equal(tensor, (fresh if name in HEAD else saved)[name])
    kept = worker(tiny(*other, "model.head=kept", private=False)).task
    assert all(np.array_equal(kept.initial[name], saved[name]) for name in HEAD)
    assert all(kept.layout[name].trainable for name in HEAD)


def test_a_head_that_read_something_else_is_drawn_again(tiny, first, caplog):
    with caplog.at_level(logging.WARNING):
        made = worker(tiny(f"model.start={first.folder}", "model.pooling=mean", private=False))
    (said,) = [r.getMessage() for r in caplog.records if "model.start" in r.getMessage()]
    assert said.endswith("has a head of model.pooling: null, and this run is of model.pooling: mean")
    saved = load_file(first.folder / "adapter" / "adapter_model.safetensors")
    assert not any(np.array_equal(made.task.initial[name], saved[name]) for name in HEAD if "weight" in name)


def test_what_peft_saved_begins_a_run(tiny, tiny_base, tmp_path, caplog):
    """Its scaling is 4 / sqrt(4) = 2, and the run's 8 / 4 = 2; at alpha 16 its B counts for half as much."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
    told = LoraConfig(r=4, lora_alpha=4, use_rslora=True, target_modules=["query", "value"], task_type="SEQ_CLS")
    wrapped = get_peft_model(model, told)
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_()
    wrapped.save_pretrained(tmp_path / "peft")
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    made = worker(tiny(f"model.start={tmp_path / 'peft'}", "model.adapter.alpha=16", private=False)).task
    assert "does not say for which labels it is" in caplog.text
    for name, slot in made.layout.items():
        if slot.role != "head":
            assert np.array_equal(made.initial[name], saved[name] * (0.5 if slot.role == "B" else 1))


def test_the_core_between_singular_vectors_is_found_again(tiny, first, tmp_path):
    told = ("strategy.use=fed_sb", "model.adapter.kind=auto", "model.adapter.r=8")
    run = simulate(tiny(*told, *LEARN, private=False), out=tmp_path / "sb")
    made = worker(tiny(*told, f"model.start={run.folder}", private=False))
    figures = made.figures({"test": made.evaluate(made.task.initial, "test", 0, run.summary["test_examples"])})[
        "test"
    ]
    assert figures["loss"] == pytest.approx(run.summary["loss"], abs=1e-4)
    assert any(t.any() for n, t in made.task.initial.items() if made.task.layout[n].role == "core")
    with pytest.raises(UserError, match="is not between the first 8 singular vectors"):
        simulate(tiny(*told, f"model.start={first.folder}", private=False), out=tmp_path / "no")


@pytest.mark.parametrize(
    "labels, head, kept",
    [(("Bad", "Good"), "trained", True), (("good", "bad"), "trained", False), (("good", "bad"), "kept", True)],
)
def test_a_base_that_is_a_classifier_keeps_its_head_for_the_same_labels(
    tiny, tiny_base, tmp_path, caplog, labels, head, kept
):
    from transformers import AutoModelForSequenceClassification

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, id2label=dict(enumerate(labels)))
    model.save_pretrained(base)
    weight = model.classifier.weight.detach().numpy()
    made = worker(tiny(f"model.base={base}", f"model.head={head}", private=False)).task
    assert np.array_equal(made.initial[HEAD[1]], weight) == kept
    assert ("the head is drawn again" in caplog.text) != kept
    if kept and head == "trained":
        three = loading.load(
            "classification", str(base), Lora(4, 8, ("query",)), labels=("a", "b", "c"), seed=3, max_length=32
        )
        assert three.initial[HEAD[1]].shape == (3, 32)


def broken(folder, what):
    match what:
        case "another base":
            about = json.loads((folder / "fedlora.json").read_text())
            (folder / "fedlora.json").write_text(json.dumps({**about, "base": "bert-base-uncased"}))
        case "no tensors":
            (folder / "adapter_model.safetensors").unlink()
        case "another adapter":
            rewrite(folder, peft_type="PREFIX_TUNING")
        case "dora":
            rewrite(folder, use_dora=True)
        case "not json":
            (folder / "adapter_config.json").write_text("{")
        case "not finite" | "another pooler" | "another width":
            file = folder / "adapter_model.safetensors"
            tensors = dict(load_file(file))
            name = next(n for n in tensors if ".lora_A." in n)
            if what == "not finite":
                tensors[name] = tensors[name] * np.float32("nan")
            elif what == "another width":
                tensors[name] = np.zeros((4, 33), np.float32)
            else:
                tensors["base_model.model.bert.pooler.dense.weight"] = np.zeros((32, 32), np.float32)
            save_file(tensors, file)


@pytest.mark.parametrize(
    "damage, overrides, words",
    [
        ("", ["model.start=./nowhere"], "no such folder: "),
        ("", ["model.start=no/such"], "no/such is no folder here, and cannot be had from the Hub: "),
        (
            "",
            ["model.start=what is this"],
            "no such folder: what is this; name a run's, an adapter's, or a Hub id",
        ),
        ("", ["model.adapter.r=2"], "has rank 4, and model.adapter.r is 2: set it to 4"),
        ("", ["model.adapter.r=8"], "it has rank 4, and model.adapter.r is 8: set it to 4"),
        (
            "",
            ["model.adapter.targets=[query]"],
            "it has factors for bert.encoder.layer.0.attention.self.value too",
        ),
        (
            "",
            ["model.adapter.targets=[query, key]"],
            "it has no factors for bert.encoder.layer.0.attention.self.key",
        ),
        ("", ["strategy.use=flora"], "flora begins each round from new factors; take one of "),
        ("", ["model.revision=v2"], "is of the base's revision None, and this is v2"),
        ("another base", [], "is of the base bert-base-uncased, and model.base is "),
        ("another width", [], "it is of another base"),
        ("no tensors", [], "has no adapter_model.safetensors that can be read"),
        ("another adapter", [], "holds no LoRA that can be read"),
        ("dora", [], "is no plain LoRA: its adapter_config.json has use_dora"),
        ("not json", [], "holds no LoRA that can be read (adapter_config.json)"),
        ("not finite", [], "is not finite"),
        ("another pooler", [], "it trained bert.pooler.dense.weight, which this run does not"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_written(
    tiny, adapter, tmp_path, capsys, damage, overrides, words
):
    broken(adapter, damage)
    (file := tmp_path / "s.yaml").write_text(tiny(f"model.start={adapter}", private=False).to_yaml())
    sets = [part for one in overrides for part in ("--set", one)]
    assert main(["simulate", str(file), "--out", str(tmp_path / "out"), *sets]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert words in told[-1] and "model.start: " in told[-1] and len(told) == 1, told
    assert not (tmp_path / "out").exists()


def test_a_head_to_keep_has_to_be_there(tiny, adapter, tmp_path):
    with pytest.raises(UserError, match=r"model.head: .* has no head for 2 labels to keep: take trained"):
        simulate(tiny("model.head=kept", private=False), out=tmp_path / "out")
    file = adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n not in HEAD}, file)
    with pytest.raises(UserError, match=r"model.head: .* has no head to keep: take trained"):
        simulate(tiny("model.head=kept", f"model.start={adapter}", private=False), out=tmp_path / "out")


def test_a_run_that_merged_says_why_its_rank_is_another(tiny, tmp_path):
    run = simulate(tiny(*LEARN, "strategy.use=fedex_lora", private=False), out=tmp_path / "merged")
    rank = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())["r"]
    assert rank > 4
    with pytest.raises(UserError, match=rf"has rank {rank} \(its run merged into its base, .*set it to {rank}"):
        simulate(tiny(f"model.start={run.folder}", private=False), out=tmp_path / "next")
    made = worker(tiny(f"model.start={run.folder}", f"model.adapter.r={rank}", private=False))
    figures = made.figures({"test": made.evaluate(made.task.initial, "test", 0, run.summary["test_examples"])})[
        "test"
    ]
    assert figures["loss"] == pytest.approx(run.summary["loss"], abs=1e-4)


def test_personal_strategies_and_unequal_ranks_begin_from_it_too(tiny, first):
    own = ("strategy.use=fedsa_lora", "data.client_test_share=0.2")
    check(load_strategy("fedsa_lora", {}), tiny(*own, f"model.start={first.folder}", private=False))
    ranks = ("strategy.use=hetlora", "clients.ranks={kind: list, values: [2, 4]}")
    made = worker(tiny(*ranks, f"model.start={first.folder}", private=False))
    made.task.become(2)
    made.task.begin({}, ())
    name = next(n for n, s in made.task.layout.items() if s.role == "A")
    assert np.array_equal(made.task.read([name])[name], made.task.initial[name][:2])


def test_a_start_that_is_gone_by_the_end_says_nothing_of_its_epsilon(tiny, tmp_path):
    gone = tiny(f"model.start={tmp_path / 'gone'}")
    assert starting.said(gone) == {
        "folder": str(tmp_path / "gone"), "epsilon": None, "delta": None, "privacy_unit": None,
    }  # fmt: skip
    assert starting.said(tiny()) is None and Run(tmp_path).summary == {}
