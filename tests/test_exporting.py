"""The adapter where people use it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from fedlora import plugins, simulate
from fedlora.cli import main
from fedlora.errors import UserError
from fedlora.evaluating import evaluate
from fedlora.exporting import About, describe, export, load_adapter, predict, push
from fedlora.prepare import prepare
from fedlora.reports import card as card_module
from fedlora.run import Run
from fedlora.scenario import parse
from fedlora.tasks import base_model, located
from tests.contracts import samples
from tests.zoo import homes, models

LEARN = ("rounds=3", "clients.local_steps=60", "clients.lr=0.3", "clients.batch_size=32")
TEXTS = [
    "note 2 says the film was great indeed indeed here",
    "note 3 says the film was awful indeed indeed indeed here",
]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A run that tells the two labels apart."""
    return simulate(tiny(*LEARN, private=False), out=tmp_path_factory.mktemp("runs") / "made")


def logits(model, tokenizer, texts=TEXTS):
    import torch

    with torch.inference_mode():
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.numpy()


def test_predict_says_what_the_model_learnt(made):
    answers = predict(made, TEXTS)
    assert made.summary["accuracy"] > 0.9
    assert [(a.text, a.answer) for a in answers] == [(TEXTS[0], "good"), (TEXTS[1], "bad")]
    assert all(0.5 < a.probability <= 1 for a in answers)


def test_a_merged_model_answers_as_the_adapter_does(made, tiny_base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = export(made, tmp_path / "merged", merge=True)
    merged = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
    plain = logits(base, tokenizer)
    apart = logits(PeftModel.from_pretrained(base, str(made.folder / "adapter")), tokenizer)
    np.testing.assert_allclose(logits(merged, tokenizer), apart, atol=1e-5)
    assert np.abs(apart - plain).max() > 0.1  # or nothing was merged
    assert merged.config.id2label == {0: "bad", 1: "good"}
    card = (folder / "README.md").read_text()
    assert 'from_pretrained("merged")' in card and "library_name: transformers" in card
    assert (
        f"{made.summary['bytes_up_total']:,} bytes" in card and "privacy: none" in card and "PeftModel" not in card
    )


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_a_head_that_reads_the_mean_answers_alike_everywhere(family, tiny, tmp_path, monkeypatch):
    """By the run, `evaluate`, `load_adapter` and plain peft with the card's code; not by plain peft without it.

    A whole model can be saved only where transformers itself has the setting.
    """
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    rows = homes.rows(tmp_path / "rows.csv", 90)
    base = homes.home(models.plain(family), tmp_path / "base")
    told = (
        f"model.base={base}",
        "model.pooling=mean",
        f"model.adapter.targets=[{','.join(models.MODELS[family][2])}]",
        f"data.files={{train: {rows}, test: {rows}, text: text, label: label}}",
        "data.partition={kind: iid}",
    )
    made = simulate(tiny(*told, *LEARN, private=False), out=tmp_path / "run")
    assert evaluate(made, rows).metrics["accuracy"] == pytest.approx(made.summary["accuracy"])
    folder, words = export(made, tmp_path / "out"), ["w5 w6 w7 w8 w9 w10", "w40 w41"]
    model, tokenizer = load_adapter(folder)
    ours = logits(model, tokenizer, words)
    monkeypatch.chdir(tmp_path)
    exec(code_of((folder / "README.md").read_text()), names := {})
    np.testing.assert_allclose(logits(names["model"], tokenizer, words), ours, atol=1e-5)
    config = AutoConfig.from_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(base, config=config, ignore_mismatched_sizes=True)
    plain = PeftModel.from_pretrained(plain, str(folder))
    same = np.allclose(logits(plain, tokenizer, words), ours, atol=1e-5)
    assert same == (family == "modernbert")
    if same:
        merged = export(made, tmp_path / "merged", merge=True)
        whole = AutoModelForSequenceClassification.from_pretrained(merged)
        np.testing.assert_allclose(logits(whole, tokenizer, words), ours, atol=1e-5)
    else:
        with pytest.raises(UserError, match=f"cannot save that in a {family}: export it without --merge"):
            export(made, tmp_path / "merged", merge=True)
        assert not (tmp_path / "merged").exists()


def test_an_exported_adapter_is_the_runs(made, tmp_path):
    folder = export(made, tmp_path / "adapter")
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md", "fedlora.json", "config.json"}
    assert {f.name for f in folder.iterdir()} == names
    assert all((folder / n).read_bytes() == (made.folder / "adapter" / n).read_bytes() for n in names)
    with pytest.raises(UserError, match="is there already"):
        export(made, tmp_path / "adapter", merge=True)


def test_the_card_says_what_it_is_for_and_how_to_load_it_offline(made, tiny_base):
    card = (made.folder / "adapter" / "README.md").read_text()
    assert "- for: task `classification`, the label of a text, or of a pair of texts\n" in card
    assert "- kind of adapter: `lora`\n- reads: texts, by the base's own tokenizer, of " in card
    assert "base_model:" not in card  # a folder of this machine is no name on the Hub
    assert "Without a network: copy the folder of the base beside it" in card
    hub = card_module._offline("minilm", "sentence-transformers/all-MiniLM-L6-v2")
    assert "`hf download sentence-transformers/all-MiniLM-L6-v2 --local-dir base`" in hub and "(`minilm`)" in hub
    assert card_module._offline("a/b", "a/b").startswith("`hf download a/b --local-dir base` fetches the base")


def test_names_of_layers_are_in_one_order_and_each_once(made, tiny_base, tmp_path):
    config = json.loads((made.folder / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["query", "value"] and config["modules_to_save"] == ["classifier", "score"]
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(
            {"target_modules": ["value", "query"], "modules_to_save": ["classifier", "classifier", "score"]}
        )
    )
    describe(tmp_path, replace(About.read(made.folder / "adapter"), labels=()))
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert [told[key] for key in ("target_modules", "modules_to_save")] == [
        ["query", "value"],
        ["classifier", "score"],
    ]


def code_of(card):
    return card.partition("```python\n")[2].partition("```")[0]


@pytest.mark.parametrize("labels", [2, 3, 7])
def test_the_card_s_code_loads_the_folder_that_it_is_in_and_names_the_labels(
    labels, tiny, tiny_base, reviews, tmp_path, monkeypatch
):
    """As printed, for any number of labels; the model then answers as `fedlora.load_adapter`'s does."""
    rows = [f"{text},kind {i % labels}" for i, text in enumerate(reviews.read_text().splitlines()[1:])]
    (tmp_path / "rows.csv").write_text("text,label,site,kind\n" + "\n".join(rows) + "\n")
    data = f"data.files={{train: {tmp_path / 'rows.csv'}, text: text, label: kind}}"
    made = simulate(tiny(data, "rounds=1", private=False), out=tmp_path / "run")
    card = (export(made, tmp_path / "elsewhere") / "README.md").read_text()
    assert "# a folder where it was trained" in card
    monkeypatch.chdir(tmp_path)
    exec(code_of(card), names := {})
    assert names["model"].config.id2label == {i: f"kind {i}" for i in range(labels)}
    model, tokenizer = load_adapter("elsewhere")
    np.testing.assert_array_equal(logits(names["model"], tokenizer), logits(model, tokenizer))


@pytest.mark.parametrize("task", [t for t in plugins.names("tasks") if t != "classification"])
def test_the_card_s_code_loads_an_adapter_of_each_task(task, tmp_path, request, monkeypatch):
    sample = getattr(samples, task)(tmp_path, request.getfixturevalue)
    run = simulate(parse(samples.run_of(task, sample, tmp_path), "every.yaml"), out=tmp_path / "run")
    monkeypatch.chdir(run.folder)
    exec(code_of((run.adapter / "README.md").read_text()), names := {})
    model, _ = load_adapter(run)
    loaded, ours = names["model"].state_dict(), model.state_dict()
    assert loaded.keys() == ours.keys()
    assert all((loaded[n].float() == ours[n]).all() for n in ours if "lora_" in n or "modules_to_save" in n)
    assert names["model"].config.id2label == model.config.id2label
    assert names["model"].config.problem_type == model.config.problem_type


def test_an_adapter_names_its_base_as_others_know_it(tiny, tmp_path, monkeypatch):
    """No path of this machine; the card's code loads that name."""
    import transformers

    made = simulate(tiny("model.base=minilm", "rounds=1", private=False), out=tmp_path / "run")
    folder, hub = export(made, tmp_path / "out"), "sentence-transformers/all-MiniLM-L6-v2"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == hub
    for file in ("adapter_config.json", "fedlora.json", "config.json", "README.md"):
        assert "site-packages" not in (folder / file).read_text()
    auto, asked = transformers.AutoModelForSequenceClassification, []
    real = auto.from_pretrained

    def here(name, **told):
        asked.append(name)
        return real(located.find_base("minilm"), **told)

    monkeypatch.setattr(auto, "from_pretrained", here)
    monkeypatch.chdir(tmp_path)
    exec(code_of((folder / "README.md").read_text()), names := {})
    assert asked == [hub] and names["model"].config.id2label == {0: "bad", 1: "good"}


def test_a_causal_model_completes(tiny, tiny_lm, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = simulate(
        tiny("task=causal_lm", f"model.base={tiny_lm}", "model.adapter.targets=[q_proj, v_proj]", "rounds=1"),
        out=tmp_path / "lm",
    )
    (told,) = predict(made, ["a prompt"], max_new_tokens=4)
    assert told.probability is None and isinstance(told.answer, str)

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_lm), str(made.folder / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    asked = tokenizer("a prompt\n", return_tensors="pt")
    written = model.generate(
        input_ids=asked["input_ids"], attention_mask=asked["attention_mask"], max_new_tokens=4, do_sample=False
    )
    said = tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.strip() == told.answer  # by peft and transformers alone


def test_the_commands(made, tmp_path, capsys):
    assert main(["predict", str(made.folder), *TEXTS]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("good  ") and first.endswith(TEXTS[0]) and second.startswith("bad  ")
    assert main(["export", str(made.folder), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert main(["export", str(made.folder), "--out", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("command", [["predict", "TEXT"], ["export"]])
def test_a_run_without_an_adapter_is_one_line(made, tmp_path, capsys, command):
    folder = shutil.copytree(made.folder, tmp_path / "run")
    shutil.rmtree(folder / "adapter")
    assert main([command[0], str(folder), *command[1:]]) == 2
    assert capsys.readouterr().err.startswith(f"{folder}: has no adapter yet")


def test_a_base_that_went_away_is_one_line(made, tmp_path):
    folder = shutil.copytree(made.folder, tmp_path / "run")
    about = folder / "adapter" / "fedlora.json"
    about.write_text(about.read_text().replace(made.scenario["model"]["base"], "/no/such/model"))
    with pytest.raises(UserError, match="no such folder: /no/such/model"):
        predict(Run.open(folder), ["x"])


def test_labels_that_are_missing_are_one_line(made, tmp_path):
    folder = shutil.copytree(made.folder, tmp_path / "run")
    (folder / "adapter" / "fedlora.json").unlink()  # as version 0.2.0 left it
    assert predict(folder, ["x"])[0].text == "x"
    (folder / "partitions.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="does not name the labels"):
        predict(Run.open(folder), ["x"])


def test_a_push_that_cannot_be_made_is_one_line(made, tmp_path, monkeypatch):
    """Nobody listens there, so the Hub's own client says so."""
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(UserError, match=r"^someone/name: not pushed: ") as caught:
        push(made.folder / "adapter", "someone/name")
    assert "\n" not in str(caught.value)


def test_a_merged_model_with_factors_on_a_tied_head_computes_what_the_run_computes(tiny, tiny_lm, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    base = shutil.copytree(tiny_lm, tmp_path / "base")
    LlamaForCausalLM(LlamaConfig.from_pretrained(base, tie_word_embeddings=True)).save_pretrained(base)
    told = ("task=causal_lm", f"model.base={base}", "model.adapter.targets=[q_proj, lm_head]", "rounds=2")
    scenario = tiny(*told, "clients.lr=5", private=False)
    made = simulate(scenario, out=tmp_path / "run")
    folder = export(made, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert merged.lm_head.weight is not merged.get_input_embeddings().weight
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(merged.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    assert not torch.equal(merged.lm_head.weight, plain.lm_head.weight)
    data = prepare(scenario).data.test
    total = tokens = 0.0
    with torch.no_grad():
        for i in range(len(data)):
            ids, start = torch.from_numpy(data.row(i).astype(np.int64))[None], max(int(data.targets[i]), 1)
            log = merged(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
            total -= float(log.gather(1, ids[0, start:, None]).sum())
            tokens += len(log)
    assert total / tokens == pytest.approx(made.summary["loss"], rel=1e-5)


def test_a_decoder_that_classifies_answers_as_in_its_run_whatever_its_base_takes_for_padding(
    tiny, tiny_lm, reviews, tmp_path
):
    """The base says that the token at the end of every text is padding; the loss of the test set is the run's."""
    import pandas as pd
    from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

    base = shutil.copytree(tiny_lm, tmp_path / "base")
    LlamaForCausalLM.from_pretrained(tiny_lm, pad_token_id=102).save_pretrained(base)
    told = (
        f"model.base={base}",
        "model.adapter.targets=[q_proj]",
        "rounds=2",
        "clients.lr=1",
        "data.test_share=0.5",
    )
    scenario = tiny(*told, private=False)
    made = simulate(scenario, out=tmp_path / "run")
    test = prepare(scenario).data.test
    table = pd.read_csv(reviews)
    by_tokens = {}
    tokenizer = base_model.load_tokenizer(str(base))
    for text, label in zip(table["text"], table["label"], strict=True):
        by_tokens[tuple(tokenizer(text, truncation=True, max_length=16)["input_ids"])] = text, label
    texts, labels = zip(*(by_tokens[tuple(test.row(i))] for i in range(len(test))), strict=True)
    answers = predict(made, texts)
    right = [a.probability if a.answer == y else 1 - a.probability for a, y in zip(answers, labels, strict=True)]
    assert -np.log(right).mean() == pytest.approx(made.summary["loss"], rel=1e-4)
    folder = export(made, tmp_path / "merged", merge=True)
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.pad_token_id == 0
