"""Entities in texts, with numbers by hand and those of seqeval; a tiny BERT with MiniLM's tokenizer."""

import dataclasses
import json
import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

from fedlora import export, load_adapter, predict, simulate
from fedlora.cli import main
from fedlora.data import tagged
from fedlora.data.cells import Taught
from fedlora.data.reading import Rows, read_site
from fedlora.data.store import Examples
from fedlora.engine import Worker
from fedlora.errors import SettingError
from fedlora.kinds.lora import Lora
from fedlora.prepare import calibrate, prepare, prepare_server, prepare_site
from fedlora.reports.console import Silent
from fedlora.scenario import Files
from fedlora.tasks import base_model, loading
from fedlora.tasks.token_classification import TokenClassification, count

LABELS = ("O", "B-Illness", "B-Name", "I-Illness", "I-Name")
NONE = -100


def load(base, targets=("query", "value"), **more):
    told = {"labels": LABELS, "seed": 3, "max_length": 32}
    return loading.load("token_classification", base, Lora(4, 8, targets), **{**told, **more})


def encode(base, rows, max_length=32):
    return TokenClassification.encode(base_model.load_tokenizer(base), rows, LABELS, max_length)


def examples(encoded):
    offsets = np.cumsum([0, *map(len, encoded.tokens)])
    tokens, marks = (np.concatenate(each).astype(np.int32) for each in (encoded.tokens, encoded.marks))
    return Examples(tokens, offsets, np.array(encoded.targets), marks=marks)


ROWS = Rows(
    [("Angelman", "syndrome", "of", "Bob"), ("nothing",), "angioedema of Bob.", ()],
    [("B-Illness", "I-Illness", "O", "B-Name"), ("O",), ("B-Illness", "O", "B-Name", "O"), ()],
)


@pytest.fixture(scope="module")
def tiny_task(tiny_base):
    return load(tiny_base, private=True)


@pytest.fixture(scope="module")
def some(tiny_base):
    return examples(encode(tiny_base, ROWS))


def test_the_first_piece_of_a_word_has_its_tag_and_no_other_has_one(tiny_base):
    made = encode(tiny_base, ROWS)
    tokenizer = base_model.load_tokenizer(tiny_base)
    pieces = [tokenizer.convert_ids_to_tokens(row) for row in made.tokens]
    assert pieces[0] == ["[CLS]", "angel", "##man", "syndrome", "of", "bob", "[SEP]"]
    assert made.marks[0] == [NONE, 1, NONE, 3, 0, 2, NONE]
    assert pieces[2] == ["[CLS]", "ang", "##io", "##ede", "##ma", "of", "bob", ".", "[SEP]"]
    assert made.marks[2] == [NONE, 1, NONE, NONE, NONE, 0, 2, 0, NONE]
    assert (made.marks[3], made.targets, made.cut) == ([NONE, NONE], [1, 0, 1, 0], 0)


def test_words_are_aligned_as_transformers_aligns_them(tiny_base, sentences):
    rows = [json.loads(line) for line in sentences.read_text().splitlines()]
    made = encode(tiny_base, Rows([tuple(r["tokens"]) for r in rows], [tuple(r["tags"]) for r in rows]))
    tokenizer = base_model.load_tokenizer(tiny_base)
    for row, tokens, marks in zip(rows, made.tokens, made.marks, strict=True):
        cut = tokenizer(row["tokens"], is_split_into_words=True)
        expected = []
        for before, word in pairwise([None, *cut.word_ids()]):
            expected.append(NONE if word in (None, before) else LABELS.index(row["tags"][word]))
        assert (tokens, marks) == (cut["input_ids"], expected)


def test_a_tokenizer_that_does_not_say_where_its_pieces_lie_is_refused(tiny_base, monkeypatch):
    tokenizer = base_model.load_tokenizer(tiny_base)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(SettingError, match=r"model\.base: its tokenizer does not say where its pieces lie"):
        TokenClassification.encode(tokenizer, ROWS, LABELS, 16)


def test_the_loss_of_an_example_is_the_mean_over_its_words(tiny_task, tiny_base, some):
    from transformers import AutoModelForTokenClassification

    plain = AutoModelForTokenClassification.from_pretrained(tiny_base, num_labels=5).eval()
    head = {
        n.split("classifier.")[1]: torch.from_numpy(t) for n, t in tiny_task.initial.items() if "classifier" in n
    }
    plain.classifier.load_state_dict(head)
    tiny_task.begin({}, ())
    assert tiny_task.packing is not None
    with torch.no_grad():
        found = tiny_task.losses(tiny_task.batch(some, np.arange(4))).tolist()
        log = [plain(input_ids=torch.tensor(some.row(i))[None].long()).logits.log_softmax(-1)[0] for i in (0, 2)]
    first = -np.mean([float(log[0][at, tag]) for at, tag in ((1, 1), (3, 3), (4, 0), (5, 2))])
    third = -np.mean([float(log[1][at, tag]) for at, tag in ((1, 1), (5, 0), (6, 2), (7, 0))])
    assert found[0] == pytest.approx(first, rel=1e-5) and found[2] == pytest.approx(third, rel=1e-5)
    assert found[3] == 0.0


def test_an_example_without_words_moves_nothing(tiny_task, some):
    names = tuple(n for n, s in tiny_task.layout.items() if s.trainable)
    parameters = tiny_task.begin({}, names)
    tiny_task.losses(tiny_task.batch(some, np.array([3, 3]))).sum().backward()
    assert all(not p.grad.any() for p in parameters)


def test_joined_batches_keep_their_marks(tiny_task, some):
    tiny_task.begin({}, ())
    apart = [tiny_task.batch(some, np.array(rows)) for rows in ([1, 3], [0, 2])]
    joined = tiny_task.join(apart)
    assert joined["marks"].shape == joined["input_ids"].shape == (4, 9)
    with torch.no_grad():
        whole = tiny_task.losses(tiny_task.batch(some, np.array([1, 3, 0, 2])))
        torch.testing.assert_close(tiny_task.losses(joined), whole)


def test_figures_by_hand(tiny_task):
    """Four entities, of which one is found, one has another type, one another end, and one is missed."""
    there = [["B-Illness", "I-Illness", "O", "B-Name"], ["B-Name", "I-Name"], ["B-Illness", "O"]]
    said = [["B-Illness", "O", "O", "B-Illness"], ["I-Name", "I-Name"], ["O", "O"]]
    made = count(LABELS, zip(there, said, strict=True))
    assert made == {
        "held/Illness": 2,
        "said/Illness": 2,
        "found/Illness": 0,
        "held_strict/Illness": 2,
        "said_strict/Illness": 2,
        "found_strict/Illness": 0,
        "held/Name": 2,
        "said/Name": 1,
        "found/Name": 1,
        "held_strict/Name": 2,
        "said_strict/Name": 0,
        "found_strict/Name": 0,
    }
    told = tiny_task.figures({"loss": 3.0, "examples": 4, "tokens": 8, "right": 6, **made})
    assert told == {
        "loss": 0.75,
        "f1": 2 * 1 / (4 + 3),
        "precision": 1 / 3,
        "recall": 1 / 4,
        "f1_strict": 0.0,
        "token_accuracy": 0.75,
        "f1/Illness": 0.0,
        "f1/Name": 2 * 1 / (2 + 1),
    }
    nothing = dict.fromkeys([*made, "loss", "tokens", "right"], 0.0) | {"examples": 1.0}
    assert set(tiny_task.figures(nothing).values()) == {0.0}


def test_a_score_is_of_what_the_model_says(tiny_task, some, monkeypatch):
    right = some.marks[some.marks >= 0]  # of the four examples 4, 1, 4 and 0
    said = right.copy()
    said[3] = 0  # Bob
    sharp = torch.nn.functional.one_hot(torch.tensor(said).long(), 5) * 9.0
    monkeypatch.setattr(tiny_task, "logits", lambda batch: sharp)
    sums = tiny_task.score(tiny_task.batch(some, np.arange(4)))
    assert (sums["tokens"], sums["right"], sums["examples"]) == (9, 8, 4)
    assert (sums["held/Name"], sums["said/Name"], sums["found/Name"]) == (2, 1, 1)
    assert (sums["held/Illness"], sums["said/Illness"], sums["found/Illness"]) == (2, 2, 2)
    sure = math.log(1 + 4 * math.exp(-9))
    assert sums["loss"] == pytest.approx(sure + sure + (9 + 4 * sure) / 4, rel=1e-4)


def test_entity_figures_are_those_of_seqeval(tiny_task):
    """On a thousand random cases, lenient and strict, of sequences that are not even IOB2."""
    from seqeval import metrics
    from seqeval.scheme import IOB2

    rng = np.random.default_rng(0)
    for _ in range(1000):
        there, said = ([], [])
        for length in rng.integers(0, 9, rng.integers(1, 5)):
            right = rng.integers(0, 5, length)
            there.append([LABELS[i] for i in right])
            said.append([LABELS[i] for i in np.where(rng.random(length) < 0.3, rng.integers(0, 5, length), right)])
        sums = {"loss": 0.0, "examples": 1.0, "tokens": 1.0, "right": 0.0}
        told = tiny_task.figures(sums | count(LABELS, zip(there, said, strict=True)))
        if not any(map(len, there)):
            assert told["f1"] == told["f1_strict"] == 0.0
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing said, or nothing there
            plain = {"zero_division": 0}
            assert told["f1"] == pytest.approx(metrics.f1_score(there, said, **plain))
            assert told["precision"] == pytest.approx(metrics.precision_score(there, said, **plain))
            assert told["recall"] == pytest.approx(metrics.recall_score(there, said, **plain))
            strict = metrics.f1_score(there, said, mode="strict", scheme=IOB2, **plain)
            assert told["f1_strict"] == pytest.approx(strict)
            report = metrics.classification_report(there, said, output_dict=True, **plain)
        for kind in ("Illness", "Name"):
            assert told[f"f1/{kind}"] == pytest.approx(report.get(kind, {"f1-score": 0.0})["f1-score"])


@pytest.mark.parametrize("quantize", [None, "4bit"])
def test_a_decoder_judges_tokens_too(tiny_lm, some, quantize):
    if quantize:
        pytest.importorskip("bitsandbytes", reason="pip install -e '.[quantize]'")
    made = load(tiny_lm, ("q_proj", "v_proj"), private=True, quantize=quantize)
    made.begin({}, ())
    with torch.no_grad():
        alone = torch.cat([made.losses(made.batch(some, np.array([i]))) for i in range(4)])
        torch.testing.assert_close(made.losses(made.batch(some, np.arange(4))), alone, rtol=1e-4, atol=1e-5)
    assert made.packing is not None


def test_what_is_known_below_changes_nothing(tiny_base, some):
    made = loading.load(
        "token_classification", tiny_base, Lora(4, 8, ("query",), (1,)), labels=LABELS, seed=3, max_length=32
    )
    made.begin({}, ())
    with torch.no_grad():
        before = made.losses(made.batch(some, np.arange(4)))
    row = made.below(some, np.arange(4), half=False)[0].numpy()
    made.prefix.kept = lambda examples: row
    batch = made.batch(some, np.array([2, 0]))
    assert "prefix" in batch
    with torch.no_grad():
        torch.testing.assert_close(made.losses(batch), before[[2, 0]])


@pytest.fixture
def told(tiny, sentences):
    """Makes scenarios on the sentences, which a tiny model learns in some rounds."""

    def make(*more, private=True):
        base = (
            "task=token_classification",
            f"data.files={{train: {sentences}}}",
            "clients.lr=2.0",
            "model.adapter.targets=[query,key,value,dense]",
            "rounds=2",
        )
        return tiny(*base, *more, private=private)

    return make


def test_the_columns_are_tokens_and_tags_where_nobody_says(told, sentences):
    scenario = told()
    assert (scenario.data.files.text, scenario.data.files.label) == ("tokens", "tags")
    named = told(f"data.files={{train: {sentences}, text: words, label: marks}}").data.files
    assert (named.text, named.label) == ("words", "marks")


def test_rows_are_partitioned_by_their_first_entity(told, tmp_path):
    ready = prepare(told("data.partition={kind: pathological, labels_per_client: 1}", "clients.total=3"))
    counts = np.array([ready.data.histogram(client) for client in range(3)])
    assert ready.data.labels == LABELS and ((counts > 0).sum(1) == 1).all() and not counts[:, 3:].any()
    share = ready.data.majority
    marks = ready.data.test.marks[ready.data.test.marks >= 0]
    assert share == np.mean(marks == 0) and 0.5 < share < 1
    owned = prepare(told("data.partition={kind: natural, column: ward}"))
    assert sorted(owned.data.sizes()) and owned.data.num_clients == 4


def test_the_sentences_are_learnt(told, tmp_path):
    adam = "strategy={use: fedavg_lora, server: {kind: adam, lr: 0.02, schedule: {kind: linear}}}"
    more = ("rounds=40", "eval_every=40", "clients.local_steps=1", "clients.batch_size=16", "clients.lr=0.5")
    run = simulate(told(*more, adam, private=False), out=tmp_path / "run")
    assert run.metric == "f1" and run.summary["f1"] > 0.9 and run.majority is None
    (line,) = [line for line in run.rounds if line["f1"] is not None]
    assert {"f1/Illness", "f1/Name", "precision", "recall", "f1_strict", "token_accuracy"} <= set(line)

    texts = ["Report 8 on Ann Li with kidney failure and so", "Report"]
    first, second = predict(run.folder, texts)
    assert "Illness 24-38: kidney failure" in first.answer and first.probability is None
    assert second.answer == "no entity"

    from transformers import pipeline

    whole = export(run.folder, tmp_path / "whole", merge=True)
    found = pipeline("token-classification", model=str(whole), aggregation_strategy="first")(texts[0])
    as_told = [f"{e['entity_group']} {e['start']}-{e['end']}: {texts[0][e['start'] : e['end']]}" for e in found]
    assert "; ".join(as_told) == first.answer
    model, _ = load_adapter(run.folder)
    assert type(model).__name__ == "PeftModelForTokenClassification"
    assert "AutoModelForTokenClassification" in (whole / "README.md").read_text()


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


def test_fused_clients_come_to_the_same_run(told, tmp_path):
    from safetensors.numpy import load_file

    runs = [simulate(told(f"engine.fused={n}"), out=tmp_path / str(n)) for n in (1, 4)]
    one, other = (load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in runs)
    moved = max(float(np.abs(t).max()) for n, t in one.items() if "lora_B" in n)
    assert moved > 1e-3 and all(np.abs(one[n] - other[n]).max() <= 1e-5 * max(moved, 1.0) for n in one)


def test_other_tags_are_other_noise(told, sentences, tmp_path):
    """What a client trains on is in the digest that its noise belongs to."""
    lines = [json.loads(line) for line in sentences.read_text().splitlines()]
    lines = [{**line, "tags": [tag.replace("I-Illness", "B-Illness") for tag in line["tags"]]} for line in lines]
    (other := tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = []
    for file in (sentences, other):
        ready = prepare(told(f"data.files={{train: {file}}}"))
        worker = Worker(dataclasses.replace(ready.setup, noise=calibrate(ready.scenario, ready.data), kept=None))
        found.append([worker.digests.examples(worker.dataset.partition(c)) for c in range(4)])
    assert not set(found[0]) & set(found[1])


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("data.labels=[]", "the list is empty: name O, and B-TYPE and I-TYPE of each type, or leave it out"),
        ("data.labels=[O, B-x, I-y]", "'I-y' has no 'B-y' beside it"),
        ("data.files.label=null", "token_classification needs the name of the column of tags or spans"),
        ("data.files.text=[a, b]", "pairs of columns are for classification"),
        ("model.pooler=trained", "a model that judges each token has no pooler"),
        ("exact_match={}", "a classifier writes no answers"),
        ("data.labels=[O, B-Name, I-Name]", "row 2, column 'tags': 'B-Illness' is none of data.labels"),
    ],
)
def test_what_does_not_fit_is_a_line_and_nothing_is_written(more, line, tiny_yaml, sentences, tmp_path, capsys):
    (file := tmp_path / "a.yaml").write_text(tiny_yaml)
    data = f"data.files={{train: {sentences}}}"
    told = [part for one in ("task=token_classification", data, more) for part in ("--set", one)]
    assert main(["simulate", str(file), *told, "--out", str(tmp_path / "run")]) == 2
    assert line in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_site_and_its_server_hold_the_same_marks_as_a_simulation(told, sentences, tmp_path):
    (own := tmp_path / "own.conll").write_text("Report O\n3 O\non O\nAnn B-Name\n\nfever B-Illness\n")
    scenario = told(f"data.files={{train: {sentences}, test: {sentences}}}", private=False)
    server = prepare_server(scenario)
    assert server.data.labels == LABELS and (server.data.test.marks[:6] == [NONE, 0, 0, 0, 2, 4]).all()
    rows, _ = read_site(Files(train=str(own)), LABELS, Taught.of(scenario.data, scenario.task))
    worker = Worker(prepare_site(scenario, LABELS, rows, 1, bytes(32)))
    part = worker.dataset.partition(1)
    assert [part.examples.marks_of(int(row)).tolist() for row in part.rows] == [
        [NONE, 0, 0, 0, 2, NONE],
        [NONE, 1, NONE],
    ]
    losses = worker.task.losses(worker.task.batch(part.examples, part.rows))
    assert losses.shape == (2,) and bool((losses > 0).all())


def test_no_row_is_cut(told, sentences, caplog):
    """However few tokens a sequence may have: each word of the file is judged."""
    data = prepare(told("data.max_length=8")).data
    words = sum(len(json.loads(line)["tokens"]) for line in sentences.read_text().splitlines())
    assert (
        sum(int((part.marks >= 0).sum()) for part in (data.train, data.test)) == words - 48
    )  # `more[:0]` has none
    assert data.cut == 0 and "max_length" not in caplog.text


def test_words_of_a_text_and_its_spans_are_one(tiny_base):
    """What a site holds as spans trains as what another holds as tags."""
    _, words = tagged.places("Bob has fever.")
    spelt = Rows([("Bob", "has", "fever", ".")], [("B-Name", "O", "B-Illness", "O")])
    one, other = encode(tiny_base, spelt), encode(tiny_base, Rows(["Bob has fever."], spelt.labels))
    assert len(words) == 4 and (one.tokens, one.marks) == (other.tokens, other.marks)
