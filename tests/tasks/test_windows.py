"""Texts of several windows: where words are looked up, and one loss and one gradient for the whole text."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora import evaluate, predict, simulate
from fedlora.data import tagged
from fedlora.data.reading import Rows
from fedlora.data.store import Examples
from fedlora.kinds.lora import Lora
from fedlora.passes import gradients
from fedlora.passes.fused import Fused
from fedlora.tasks import base_model, loading, token_classification, windows
from fedlora.tasks.token_classification import TokenClassification

LABELS = ("O", "B-X", "I-X")
NONE = -100
WORDS = "one two three four five six seven eight nine ten".split()  # of one piece each


def encode(base, lengths, max_length):
    reader = base_model.load_tokenizer(base)
    rows = [tuple((WORDS * 9)[:n]) for n in lengths]
    tags = [tuple(LABELS[1] if i % 3 == 1 else "O" for i in range(n)) for n in lengths]
    return TokenClassification.encode(reader, Rows(rows, tags), LABELS, max_length)


def examples(made):
    flat = [np.concatenate([np.asarray(row, np.int32) for row in part]) for part in (made.tokens, made.marks)]
    types = made.types and np.concatenate([np.asarray(row, np.uint8) for row in made.types])
    return Examples(flat[0], np.cumsum([0, *map(len, made.tokens)]), made.held, types, flat[1])


def load(base, max_length=10, targets=("query", "value"), layers=None, **more):
    kind = Lora(4, 8, targets, layers)
    return loading.load(
        "token_classification", base, kind, labels=LABELS, seed=3, max_length=max_length, private=True, **more
    )


@pytest.fixture(scope="module")
def task(tiny_base):
    return load(tiny_base)


@pytest.fixture(scope="module")
def some(tiny_base):
    """Of one, three, two and one windows."""
    return examples(encode(tiny_base, (3, 20, 10, 8), 10))


def test_windows_overlap_by_a_quarter_and_a_word_is_looked_up_once(tiny_base):
    """With eight places between the ends ten words lie in 0 to 7 and 6 to 9: the first of two shared stays."""
    made = encode(tiny_base, (10,), 10)
    reader = base_model.load_tokenizer(tiny_base)
    pieces = reader.convert_ids_to_tokens(made.tokens[0])
    assert pieces == ["[CLS]", *WORDS[:8], "[SEP]", "[CLS]", *WORDS[6:], "[SEP]"]
    assert made.marks[0] == [NONE, 0, 1, 0, 0, 1, 0, 0, NONE, NONE, NONE, NONE, 1, 0, 0, NONE]
    assert made.types[0] == [0] * 10 + [1] * 6 and made.cut == 0
    assert encode(tiny_base, (8, 8), 10).types is None  # nothing is longer than a sequence


@pytest.mark.parametrize("max_length", [2, 3, 4, 5, 7, 12])
def test_every_word_has_its_first_piece_and_none_has_two(tiny_base, max_length):
    """Words of up to nine pieces, also where a window begins within one; the text is read to its end."""
    reader = base_model.load_tokenizer(tiny_base)
    rng = np.random.default_rng(max_length)
    for _ in range(20):
        words = ["".join(rng.choice(list("abcdefgz"), rng.integers(1, 14))) for _ in range(rng.integers(0, 15))]
        text, places = tagged.places(words)
        (held,) = windows.cut(reader, [text], max_length)
        assert all(len(one.ids) <= max_length for one in held)
        found = windows.first_pieces(text, places, held)
        if max_length == 2:  # nothing lies between the ends
            assert len(held) == 1 and not any(found)
            continue
        assert found == sorted(found)
        assert [held[number].lie[at][0] for number, at in found] == [start for start, _ in places]


def test_the_loss_of_a_text_is_the_mean_over_the_words_of_all_its_windows(task, tiny_base, some):
    from transformers import AutoModelForTokenClassification

    plain = AutoModelForTokenClassification.from_pretrained(tiny_base, num_labels=3).eval()
    head = {n.split("classifier.")[1]: torch.from_numpy(t) for n, t in task.initial.items() if "classifier" in n}
    plain.classifier.load_state_dict(head)
    expected = []
    for row in range(4):
        losses = []
        parts = zip(
            *(windows.parted(p, some.types_of(row)) for p in (some.row(row), some.marks_of(row))), strict=True
        )
        for ids, marks in parts:
            with torch.no_grad():
                logits = plain(input_ids=torch.from_numpy(ids)[None].long()).logits[0]
            each = torch.nn.functional.cross_entropy(
                logits, torch.from_numpy(marks).long(), reduction="none", ignore_index=NONE
            )
            losses += each[torch.from_numpy(marks >= 0)].tolist()
        expected.append(np.mean(losses))
    task.begin({}, ())
    assert task.packing is not None
    with torch.no_grad():
        packed = task.losses(batch := task.batch(some, np.arange(4)))
        with task.packing.away():
            held, task.packing = task.packing, None
            padded = task.losses(batch)
            task.packing = held
    assert len(batch["input_ids"]) == 4 * 3 and packed.tolist() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)
    sums = task.evaluate({}, some, np.arange(4))
    assert (sums["examples"], sums["tokens"]) == (4, 3 + 20 + 10 + 8)  # of whole texts
    assert sums["held/X"] == 1 + 7 + 3 + 3 and sums["loss"] == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize("packs", [True, False])
def test_the_gradient_of_a_text_is_one_whoever_is_beside_it(task, some, packs):
    names = tuple(n for n, s in task.layout.items() if s.trainable)
    rng = np.random.default_rng(0)
    adapter = {n: t + 0.1 * rng.standard_normal(t.shape).astype(np.float32) for n, t in task.initial.items()}
    held = task.packing
    if not packs:
        held.remove()
        task.packing = None
    try:
        together = gradients.apart(task, adapter, names, task.batch(some, np.arange(4)))
        assert all(len(g) == 4 for g in together)  # a text of three windows is one example
        for row in range(4):
            parameters = task.begin(adapter, names)
            task.losses(task.batch(some, np.array([row]))).sum().backward()
            for mine, parameter in zip(together, parameters, strict=True):
                torch.testing.assert_close(mine[row], parameter.grad, rtol=1e-4, atol=1e-5)
    finally:
        if not packs:
            task.packing = held
            held._set()


@given(st.lists(st.sampled_from([1, 1, 1, 2, 3, 50]), max_size=60), st.integers(1, 9))
def test_a_long_text_is_passed_with_few_others(counts, size):
    counts = np.sort(np.array(counts, np.int64))
    parts = windows.pieces(counts, size)
    assert [i for part in parts for i in part] == [*range(len(counts))] and all(map(len, parts))
    assert all(len(part) == 1 or len(part) * counts[part].max() <= 1.5 * size for part in parts)
    if counts.max(initial=1) == 1:
        assert len(parts) == (max(1, round(len(counts) / size)) if len(counts) else 0)


def test_micro_batches_hold_about_as_many_sequences_as_asked_for(task, some):
    rows = np.array([0, 3, 0, 3, 0, 3, 0, 2, 1])  # of 1, 1, ..., 2 and 3 windows
    assert task.sequences(some, np.arange(4)).tolist() == [1, 3, 2, 1]
    made = [(len(batch["input_ids"]), [*part]) for batch, part in task.micro_batches(some, rows, 3)]
    assert made == [(3, [0, 0, 0]), (3, [0, 3, 3]), (4, [3, 2]), (3, [1])]


def test_joined_batches_of_fused_clients_have_as_many_windows(task, some):
    task.begin({}, ())
    apart = [task.batch(some, np.array(rows)) for rows in ([0, 3], [1], [2])]
    assert [len(batch["input_ids"]) for batch in apart] == [2, 3, 2]
    joined = task.join(apart)
    with torch.no_grad():
        whole = task.losses(task.batch(some, np.array([0, 3, 1, 2])))
        torch.testing.assert_close(task.losses(joined), whole, rtol=1e-5, atol=1e-6)
    Fused(task)


def test_what_frozen_layers_make_of_windows_is_kept_for_each_text(tiny_base, some):
    """As much as it has tokens, whatever others were filled up with; what is kept gives the same losses."""
    task = load(tiny_base, layers=(1,))
    rows = np.arange(4)
    task.begin({}, ())
    with torch.no_grad():
        plain = [task.losses(task.batch(some, np.array(these))) for these in ([1], [0, 3], [0, 1])]
        out = task.below(some, rows, False)
        assert out.shape[1] == len(some.tokens)
        task.prefix.kept = lambda examples: out[0].numpy()
        batches = [task.batch(some, np.array(these)) for these in ([1], [0, 3], [0, 1])]
        assert ["prefix" in batch for batch in batches] == [True, True, False]
        for batch, right in zip(batches, plain, strict=True):
            torch.testing.assert_close(task.losses(batch), right, rtol=1e-5, atol=1e-6)


def test_a_run_learns_and_judges_whole_texts(tiny, sentences, tmp_path):
    told = ("task=token_classification", f"data.files={{train: '{sentences}'}}", "data.partition={kind: iid}")
    more = ("data.max_length=8", "clients.micro_batch_size=16", "data.test_share=0.3", "rounds=2")
    run = simulate(tiny(*told, *more), out=tmp_path / "run")
    fused = simulate(tiny(*told, *more, "engine.fused=2"), out=tmp_path / "fused")
    assert run.summary["failures"] == fused.summary["failures"] == 0
    assert run.summary["loss"] == pytest.approx(fused.summary["loss"], rel=1e-3)
    assert evaluate(run, sentences).rows == 240
    assert predict(run, ["with fever and"])[0].answer


def test_entities_are_found_to_the_end_of_a_text(tiny_base, monkeypatch):
    monkeypatch.setattr(token_classification, "_best", lambda model, ids: [1] * len(ids))
    reader, text = base_model.load_tokenizer(tiny_base), " ".join(["fever and"] * 20)
    found = TokenClassification.entities(None, reader, text, LABELS, 8)
    assert [(e.start, e.end) for e in found] == tagged.places(text)[1]  # each word is one
