"""Pairs of completions: DPO's loss by hand, gradients of pairs, the reference, runs, bad rows."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedlora import evaluate, predict, simulate
from fedlora.cli import main
from fedlora.data.reading import Rows
from fedlora.data.store import Examples
from fedlora.deploy.split import split
from fedlora.engine import Worker
from fedlora.errors import SettingError
from fedlora.kinds.lora import Lora
from fedlora.kinds.lora_xs import LoraXS
from fedlora.passes import gradients
from fedlora.prepare import calibrate, prepare
from fedlora.reports.console import Silent
from fedlora.tasks import base_model, loading
from fedlora.tasks.preference import Preference

ROWS = Rows(
    ["two and two", "three and four more", "so", "six"],
    [("four", "five or so"), ("it is seven", "eight"), ("yes", "no no no no"), ("a word or two", "another")],
)
BETA = 0.7


def build(base, kind=None, **more):
    told = {"labels": (), "seed": 3, "max_length": 32, "beta": BETA, "private": True}
    return loading.load("preference", base, kind or Lora(4, 8, ("q_proj", "up_proj")), **{**told, **more})


def encoded(base, rows=ROWS, max_length=32):
    made = Preference.encode(base_model.load_tokenizer(base), rows, (), max_length)
    ends = np.cumsum([0, *map(len, made.tokens)])
    return Examples(np.concatenate(made.tokens).astype(np.int32), ends, made.held), made


def away(task):
    """An adapter in which every factor has a gradient."""
    rng = np.random.default_rng(0)
    return {n: (0.3 * rng.normal(size=s.shape)).astype(np.float32) for n, s in sorted(task.layout.items())}


def sequences(examples, row):
    """The two sequences of a pair, and where the completion begins in each."""
    start, second, again = examples.targets[row]
    tokens = examples.row(row).astype(int).tolist()
    return (tokens[:second], start), (tokens[second:], again)


def log_probability(model, tokens, start):
    """Of a completion, by a plain model and one sequence alone."""
    with torch.no_grad():
        shares = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(float(shares[i - 1, tokens[i]]) for i in range(start, len(tokens)))


@pytest.fixture(scope="module")
def task(tiny_lm):
    return build(tiny_lm)


@pytest.fixture(scope="module")
def examples(tiny_lm):
    return encoded(tiny_lm)[0]


@pytest.fixture
def padded(task):
    """Has a task pass padded batches for a while."""
    with task.packing.away(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "packing", None)
        yield task


def test_the_loss_is_dpos_formula_by_hand(task, examples, tiny_lm):
    """From log probabilities of plain models of transformers, of each sequence alone."""
    base, tuned = (AutoModelForCausalLM.from_pretrained(tiny_lm).eval() for _ in range(2))
    adapter = away(task)
    for name, module in tuned.named_modules():
        if (a := adapter.get(f"base_model.model.{name}.lora_A.weight")) is not None:
            b = adapter[f"base_model.model.{name}.lora_B.weight"]
            module.weight.data += torch.from_numpy(8 / 4 * b @ a)  # alpha / r
    expected = []
    for row in range(len(examples)):
        chosen, rejected = (
            BETA * (log_probability(tuned, *one) - log_probability(base, *one)) for one in sequences(examples, row)
        )
        expected.append((chosen, rejected, -math.log(1 / (1 + math.exp(-(chosen - rejected))))))
    task.begin(adapter, ())
    batch = task.batch(examples, np.arange(len(examples)))
    with torch.no_grad():
        made = torch.cat([task.rewards(batch), task.losses(batch)[:, None]], 1)
    torch.testing.assert_close(made.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    assert np.ptp([loss for *_, loss in expected]) > 0.1


@pytest.mark.parametrize("cut", ["packed", "padded"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_the_gradient_of_a_pair_is_that_of_its_loss_alone(cut, task, examples, request):
    """To 1e-5, over both of its sequences."""
    if cut == "padded":
        request.getfixturevalue("padded")
    names, adapter = tuple(sorted(task.layout)), away(task)
    rows = np.arange(len(examples))
    alone = []
    for row in rows:
        parameters = task.begin(adapter, names)
        task.losses(task.batch(examples, rows[row : row + 1])).sum().backward()
        alone.append([p.grad.clone() for p in parameters])
    for some in (rows, rows[2:3]):
        together = gradients.apart(task, adapter, names, task.batch(examples, some))
        for right, mine in zip(zip(*(alone[i] for i in some), strict=True), together, strict=True):
            right = torch.stack(right)
            assert float((mine - right).abs().max()) <= 1e-5 * float(right.abs().max())


def test_packing_is_padding_to_the_fifth_digit(task, examples, request):
    names, adapter = tuple(sorted(task.layout)), away(task)

    def passed():
        parameters = task.begin(adapter, names)
        losses = task.losses(task.batch(examples, np.arange(len(examples))))
        losses.sum().backward()
        return [losses.detach(), *(p.grad.clone() for p in parameters)]

    packed = passed()
    request.getfixturevalue("padded")
    for one, other in zip(packed, passed(), strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


@pytest.mark.parametrize("kind", [Lora(4, 8, ("q_proj",)), LoraXS(4, 8, ("q_proj",))], ids=["lora", "lora_xs"])
def test_the_reference_is_the_base_whatever_the_adapter(kind, tiny_lm, examples):
    made, base = build(tiny_lm, kind), AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    batch = made.batch(examples, np.arange(len(examples)))
    expected = [[log_probability(base, *one) for one in sequences(examples, row)] for row in range(len(examples))]
    for adapter in (made.initial, away(made)):
        made.begin(adapter, ())
        torch.testing.assert_close(made.reference(batch), torch.tensor(expected), rtol=1e-5, atol=1e-4)
    assert not made.reference(batch).requires_grad
    before = made.initial
    made.begin(before, ())
    told = made.figures(made.evaluate(before, examples, np.arange(len(examples))))
    assert told == {"loss": pytest.approx(math.log(2)), "accuracy": 0.5, "margin": 0.0}  # all tie


def test_what_is_known_below_changes_nothing(tiny_lm, examples):
    made = build(tiny_lm, Lora(4, 8, ("q_proj",), (1,)))
    made.begin(away(made), ())
    with torch.no_grad():
        before = made.losses(made.batch(examples, np.arange(4)))
    row = made.below(examples, np.arange(4), half=False)[0].numpy()
    made.prefix.kept = lambda _: row
    made.begin(away(made), ())
    batch = made.batch(examples, np.array([2, 0]))
    assert "prefix" in batch
    with torch.no_grad():
        torch.testing.assert_close(made.losses(batch), before[[2, 0]])


def test_figures_by_hand(task, examples, monkeypatch):
    rewards = torch.tensor([[2.0, 1.0], [0.0, 3.0], [0.5, 0.5], [1.0, 0.0]])
    monkeypatch.setattr(task, "rewards", lambda batch: rewards)
    told = task.figures(task.score({}))
    assert told["accuracy"] == (1 + 0 + 0.5 + 1) / 4 and told["margin"] == (1 - 3 + 0 + 1) / 4
    right = [math.log(1 + math.exp(-m)) for m in (1, -3, 0, 1)]
    assert told["loss"] == pytest.approx(sum(right) / 4)
    torch.testing.assert_close(task.losses({}), torch.tensor(right))


def test_both_sequences_have_the_prompt_and_the_longer_completion_cuts_it(tiny_lm):
    some, made = encoded(tiny_lm)
    reader = base_model.load_tokenizer(tiny_lm)
    (one, start), (other, again) = sequences(some, 1)
    assert one[:start] == other[:again] and reader.decode(one[start:]) == "it is seven"
    assert reader.decode(other[again:]) == "eight" and made.cut == 0
    short, made = encoded(tiny_lm, Rows(["a b c d e f", "a"], [("g h", "g h i j"), ("k", "l " * 9)]), 8)
    (one, start), (other, again) = sequences(short, 0)
    assert one[:start] == other[:again] and (len(one), len(other), start) == (6, 8, 4)
    (one, start), (other, again) = sequences(short, 1)
    assert start == again == 1 and len(other) == 8 and made.cut == 1  # of the completions one was cut


@pytest.fixture
def told(tiny, tiny_lm, choices):
    """Makes scenarios on the choices, which a tiny model learns in some rounds."""

    def make(*more, private=True):
        base = (
            "task=preference",
            f"model.base={tiny_lm}",
            f"data.files={{train: {choices}}}",
            "model.adapter.targets=[q_proj,v_proj,up_proj,down_proj]",
            "data.max_length=24",
        )
        return tiny(*base, *more, private=private)

    return make


def test_columns_and_beta_are_the_usual_where_nobody_says(told, choices):
    made = told()
    assert (made.data.files.text, made.data.files.label) == ("prompt", ("chosen", "rejected"))
    assert made.preference.beta == 0.1
    named = told(f"data.files={{train: {choices}, text: q, label: [good, bad]}}", "preference.beta=0.5")
    assert (named.data.files.text, named.data.files.label) == ("q", ("good", "bad"))
    assert named.preference.beta == 0.5


def test_the_choices_are_learnt(told, tmp_path):
    adam = "strategy={use: fedavg_lora, server: {kind: adam, lr: 0.02, schedule: {kind: linear}}}"
    more = ("rounds=20", "eval_every=20", "clients.local_steps=1", "clients.lr=0.5", "preference.beta=0.3")
    run = simulate(told(*more, adam, private=False), out=tmp_path / "run")
    assert run.metric == "accuracy" and run.summary["accuracy"] > 0.9 and run.majority is None
    last = run.rounds[-1]
    assert last["loss"] < 0.5 and last["margin"] > 0.5 and run.verdicts() == []
    (said,) = predict(run.folder, ["note 1: please help"])
    assert isinstance(said.answer, str) and said.probability is None
    names = {json.loads((run.folder / "adapter" / "fedlora.json").read_text())["beta"]}
    assert names == {0.3}


def test_a_finished_run_is_evaluated_with_its_beta(told, choices, tmp_path):
    files = f"data.files={{train: {choices}, test: {choices}}}"
    run = simulate(told("rounds=1", files, "preference.beta=2.0"), out=tmp_path / "run")
    found = evaluate(run, choices)
    for name in ("loss", "accuracy", "margin"):
        assert found.metrics[name] == pytest.approx(run.rounds[-1][name], rel=1e-4)


def test_a_private_run_resumes_bit_for_bit_and_pays(told, tmp_path):
    class Stop(Silent):
        def round(self, line):
            if line["round"] == 1:
                raise KeyboardInterrupt

    whole = simulate(told(), out=tmp_path / "whole")
    assert 0 < whole.summary["epsilon"] <= 8 and whole.summary["failures"] == 0
    simulate(told(), out=tmp_path / "cut", display=Stop())
    done = simulate(told(), out=tmp_path / "cut", resume=True)
    files = [run.folder / "adapter" / "adapter_model.safetensors" for run in (whole, done)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (whole.folder / "privacy.jsonl").read_text() == (done.folder / "privacy.jsonl").read_text()


def test_another_beta_or_another_choice_is_other_noise(told, choices, tmp_path):
    """What a client trains on, and by which loss, is in the digest that its noise belongs to."""
    lines = [json.loads(line) for line in choices.read_text().splitlines()]
    swapped = [{**line, "chosen": line["rejected"], "rejected": line["chosen"]} for line in lines]
    (other := tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, swapped)))
    found = set()
    for more in ((), ("preference.beta=0.2",), (f"data.files={{train: {other}}}",)):
        ready = prepare(told(*more))
        worker = Worker(dataclasses.replace(ready.setup, noise=calibrate(ready.scenario, ready.data), kept=None))
        found.add(worker.digests._base() + worker.digests.examples(worker.dataset.partition(0)))
    assert len(found) == 3


def test_sites_get_both_completions(told, tmp_path):
    files = split(told(), tmp_path / "sites")
    head = (files[0].parent / "train.csv").read_text().splitlines()
    assert head[0] == "text,chosen,rejected" and head[1].count(",") >= 2
    assert 'label: ["chosen", "rejected"]' in files[0].read_text()


@pytest.mark.parametrize(
    "change, what",
    [
        ({"prompt": ""}, "row 3: 'prompt' is empty"),
        ({"chosen": "  "}, "row 3: 'chosen' is empty"),
        ({"rejected": None}, "row 3: 'rejected' is empty"),
        ({"rejected": ["a", "b"]}, "row 3: 'rejected' is no text"),
        ({"chosen": "secret words", "rejected": "secret words"}, "row 3: 'rejected' is the same as 'chosen'"),
    ],
)
def test_a_bad_row_is_told_by_file_row_and_column(change, what, choices, told, tmp_path):
    lines = [json.loads(line) for line in choices.read_text().splitlines()]
    lines[2] |= change
    (file := tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(SettingError) as raised:
        prepare(told(f"data.files={{train: {file}}}"))
    assert f"{file}: {what}" in str(raised.value) and "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "more, line",
    [
        ("data.files.label=chosen", "write [chosen, rejected]"),
        ("data.partition={kind: dirichlet, alpha: 1.0}", "dirichlet splits by label, and preference has none"),
        ("model.start=somewhere", "preference measures beside the base without an adapter"),
        ("exact_match={}", "preference is judged by pairs"),
        ("preference.beta=0", "should be at least 1e-09"),
        ("strategy.use=fedex_lora", "beside which task: preference measures: take one of"),
        ("metrics=[macro_f1]", "this task has none"),
    ],
)
def test_what_does_not_fit_is_a_line_and_nothing_is_written(
    more, line, tiny_yaml, tiny_lm, choices, tmp_path, capsys
):
    (file := tmp_path / "s.yaml").write_text(tiny_yaml)
    base = ("task=preference", f"model.base={tiny_lm}", f"data.files={{train: {choices}}}")
    told = [part for one in (*base, "model.adapter.targets=[q_proj]", more) for part in ("--set", one)]
    assert main(["simulate", str(file), "--out", str(tmp_path / "run"), *told]) == 2
    assert line in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_section_is_for_this_task_alone(tiny):
    with pytest.raises(Exception, match="preference is for task: preference, and the task is classification"):
        tiny("preference={}")
