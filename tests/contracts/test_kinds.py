"""What every kind of adapter promises; the package is listed, so a new file is tested automatically."""

from dataclasses import replace
from itertools import chain, combinations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedlora import plugins, simulate
from fedlora.adapter import Update, weighted_mean
from fedlora.errors import SettingError
from fedlora.kinds import contract
from fedlora.kinds.averages import aggregation_error
from fedlora.kinds.peft import LINEAR, Peft
from fedlora.passes import gradients
from fedlora.tasks import loading

NAMES = plugins.names("kinds")
OPTIONS = {
    "FourierFTConfig": {"n_frequency": 40},
    "WaveFTConfig": {"n_frequency": 40},
    "C3AConfig": {"block_size": 8},
}
R, ALPHA = 4, 8.0
LABELS = ("bad", "good")


class Tried:
    """A kind in a tiny BERT, and an adapter of it away from the first."""

    def __init__(self, name, base, rslora=False, options=None):
        self.kind = contract.load(name, R, ALPHA, ("query", "value"), None, (), rslora, options)
        self.base = base
        self.task = self.load()
        self.layout = self.task.layout
        self.roles = sorted({slot.role for slot in self.layout.values()} - {"head"})
        self.moving = [role for role in self.roles if self.kind.trains(role)]
        self.adapter = self.moved(0)

    def load(self, seed=3, private=True):
        return loading.load(
            "classification", self.base, self.kind, labels=LABELS, seed=seed, max_length=16, private=private
        )

    def moved(self, seed, roles=None):
        rng = np.random.default_rng(seed)
        roles = self.moving if roles is None else roles
        return {
            name: tensor + (0.1 * rng.standard_normal(tensor.shape)).astype(np.float32)
            if self.layout[name].role in roles
            else tensor
            for name, tensor in self.task.initial.items()
        }


OF_PEFT = [("peft", False, {"config": name, **OPTIONS.get(name, {})}) for name in LINEAR]


@pytest.fixture(
    scope="module",
    params=[*((name, False) for name in NAMES if name != "peft"), ("lora", True), *OF_PEFT],
    ids=str,
)
def tried(request, tiny_base):
    return Tried(request.param[0], tiny_base, *request.param[1:])


def test_every_tensor_is_of_a_part_and_has_its_shape(tried):
    kind = tried.kind
    assert set(tried.roles) == set(kind.parts)
    for name, slot in tried.layout.items():
        assert kind.role(name) == slot.role and kind.trains(slot.role) == slot.trainable
        assert kind.shape(slot, R) == slot.shape
        smaller = kind.shape(slot, R // 2)
        assert len(smaller) == len(slot.shape) and all(a <= b for a, b in zip(smaller, slot.shape, strict=True))


def test_first_values_come_from_where_it_says(tried):
    other = tried.load(seed=4).initial
    for name, slot in tried.layout.items():
        if slot.role == "head":
            continue
        one, two = tried.task.initial[name], other[name]
        origin = tried.kind.parts[slot.role].origin
        assert np.array_equal(one, two) == (origin != "seeded")
        assert (not one.any()) == (origin == "zero")
    assert all(not (b @ a).any() for b, a in tried.kind.change(tried.layout, tried.task.initial).values())


def test_the_change_is_what_the_model_adds(tried):
    task = tried.task
    task.begin(tried.adapter, ())
    for name, (left, right) in tried.kind.change(tried.layout, tried.adapter).items():
        layer = task.kind.held(task.model)[name]
        rows = torch.eye(right.shape[1])
        with torch.no_grad():
            added = (layer(rows) - layer.get_base_layer()(rows)).T.numpy()  # (out, in)
        np.testing.assert_allclose(added, tried.kind.scaling() * left @ right, atol=1e-5)


def test_it_is_exact_where_it_says_and_nowhere_else(tried):
    """Averaged tensors stand for the averaged change, to rounding; where they do not, they are far off."""
    parts = tried.moving
    for moving in chain.from_iterable(combinations(parts, n) for n in range(1, len(parts) + 1)):
        start = tried.moved(9)  # so that no product is with zeros
        held = {n: t for n, t in start.items() if tried.layout[n].role not in moving}
        updates = [
            Update(
                adapter={n: t for n, t in tried.moved(k, moving).items() if tried.layout[n].role in moving},
                weight=float(k),
                clients=(k,),
                scaling=tried.kind.scaling(),
            )
            for k in (1, 2, 3)
        ]
        after = {**held, **weighted_mean(updates)}
        error = aggregation_error(tried.layout, start, updates, after, kind=tried.kind)
        assert (error < 1e-5) == tried.kind.exact(moving), (moving, error)
        assert error < 1e-5 or error > 0.1


def test_noise_grows_as_it_says(tried):
    """Many draws of noise on the tensors that move, against the root of the expected square of the change."""
    small = 1e-3
    for moving in [{role} for role in tried.moving]:
        told = tried.kind.noise_gain(tried.layout, tried.adapter, moving)
        before = tried.kind.change(tried.layout, tried.adapter)
        squares, rng = dict.fromkeys(told, 0.0), np.random.default_rng(1)
        for _ in range(200):
            noised = {
                n: t + small * rng.standard_normal(t.shape) if tried.layout[n].role in moving else t
                for n, t in tried.adapter.items()
            }
            for name, (left, right) in tried.kind.change(tried.layout, noised).items():
                moved = left.astype(float) @ right - before[name][0].astype(float) @ before[name][1]
                squares[name] += float(np.square(tried.kind.scaling() * moved / small).sum()) / 200
        for name, gain in told.items():
            assert gain == pytest.approx(squares[name] ** 0.5, rel=0.1)


def test_the_noise_at_first_is_told_by_the_shape(tried):
    """To what drawn numbers differ from their variance."""
    told = tried.kind.noise_gain(tried.layout, tried.task.initial, tried.moving)
    for name, (out, into) in tried.task.weights.items():
        assert told[name] == pytest.approx(tried.kind.gain(out, into), rel=0.15)
        trained = [s for s in tried.layout.values() if s.module == name and s.trainable]
        assert tried.kind.numbers(out, into) == sum(np.prod(s.shape) for s in trained)


def test_a_client_of_a_lower_rank_holds_the_first_of_what_there_is(tried):
    """Whatever is cut from the adapter, the model adds the change that the kind says."""
    task, kind, rank = tried.task, tried.kind, R // 2
    cut = {
        name: tensor[tuple(slice(size) for size in kind.shape(tried.layout[name], rank))]
        for name, tensor in tried.adapter.items()
    }
    try:
        task.become(rank)
        task.begin(cut, ())
        for name, (left, right) in kind.change(tried.layout, cut).items():
            layer, rows = kind.held(task.model)[name], torch.eye(right.shape[1])
            with torch.no_grad():
                added = (layer(rows) - layer.get_base_layer()(rows)).T.numpy()
            np.testing.assert_allclose(added, kind.scaling(rank) * left @ right, atol=1e-5)
    finally:
        task.become()


def test_a_rank_that_no_layer_has_is_refused_by_its_shape(tried):
    out, into = next(iter(tried.task.weights.values()))
    most = tried.kind.most(out, into)
    replace(tried.kind, r=most or 999).check_rank("query", out, into)
    if most is not None:
        with pytest.raises(SettingError, match=rf"query is {out} x {into}, and \w+ has r of at most {most} there"):
            replace(tried.kind, r=most + 1).check_rank("query", out, into)


def test_it_begins_from_what_it_exported(tried):
    """Whatever its tensors are, the change is that of before."""
    tensors, rank = tried.kind.export(tried.layout, tried.adapter)
    saved = contract.Saved(tensors, tried.kind.scaling() if rank is None else 1.0)
    taken = tried.kind.adopt(tried.layout, tried.task.initial, saved)
    again = tried.kind.change(tried.layout, {**tried.adapter, **taken})
    for name, (left, right) in tried.kind.change(tried.layout, tried.adapter).items():
        np.testing.assert_allclose(again[name][0] @ again[name][1], left @ right, atol=1e-5)


def test_gradients_of_single_examples_are_had_as_it_says(tried):
    """They equal those of each alone, which a private task checks as it loads; and come the way that it names."""
    task = tried.task
    own = {id(layer) for layer in task.low_rank.layers}
    for layer in task.kind.held(task.model).values():
        assert (id(layer) in own) == (tried.kind.gradients == "product")
    names = tuple(n for n, slot in tried.layout.items() if slot.trainable)
    batch = task.batch(task.trial, np.arange(len(task.trial)))
    made = gradients.apart(task, tried.adapter, names, batch)
    assert [g.shape for g in made] == [(len(task.trial), *tried.layout[n].shape) for n in names]


def test_an_export_is_an_ordinary_adapter_with_the_same_answers(tried, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    task = tried.task
    change = {
        m: (0.1 * left, right) for m, (left, right) in tried.kind.change(tried.layout, tried.moved(5)).items()
    }
    ids = torch.tensor([[101, 2204, 2143, 102]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for merged in (None, change):
        folder = tmp_path / ("plain" if merged is None else "merged")
        task.export(tried.adapter, folder, merged)
        names = load_file(folder / "adapter_model.safetensors")
        lora = merged or not isinstance(tried.kind, Peft)
        assert all((".lora_" in n) == bool(lora) or "classifier" in n for n in names)
        told = {"attn_implementation": "eager", "num_labels": 2}
        there = PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(tried.base, **told), str(folder)
        ).eval()
        here = tried.load(private=False)
        if merged:
            here.merge(merged)
        here.begin(tried.adapter, ())
        batch = {**given, "targets": torch.zeros(1, dtype=torch.long)}
        with torch.no_grad():
            expected = there(**given).logits
            torch.testing.assert_close(here.logits(batch), expected, atol=1e-4, rtol=1e-4)


OWN = '''
"""A kind of somebody's own: LoRA whose change shrinks with the root of its rank (rsLoRA)."""
from dataclasses import dataclass
from fedlora.kinds.lora import Lora


@dataclass(frozen=True)
class RsLora(Lora):
    def scaling(self, rank=None):
        return self.alpha / (rank or self.r) ** 0.5


class Nothing:
    pass
'''


def test_a_kind_of_ones_own_runs(tiny, tmp_path, monkeypatch):
    (tmp_path / "my_kinds.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = simulate(tiny("model.adapter.kind=my_kinds:RsLora", "rounds=1"), out=tmp_path / "run")
    assert run.state == "finished" and (run.folder / "adapter" / "adapter_model.safetensors").exists()
    with pytest.raises(SettingError, match=r"my_kinds:Nothing is no fedlora\.Kind"):
        contract.load("my_kinds:Nothing", R, ALPHA, ("query",), None)
    tried = Tried("my_kinds:RsLora", tiny().model.base)
    test_the_change_is_what_the_model_adds(tried)
    test_an_export_is_an_ordinary_adapter_with_the_same_answers(tried, tmp_path / "own")
