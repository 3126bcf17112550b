"""What every task promises; the package is listed, so a new file is tested automatically."""

import gc
import subprocess
import sys

import numpy as np
import pytest
import torch

from fedlora import export, plugins, predict, report, simulate
from fedlora.data.reading import Rows
from fedlora.data.store import Examples
from fedlora.errors import SettingError, UserError
from fedlora.kinds.lora import Lora
from fedlora.metrics import contract as metrics
from fedlora.passes import gradients
from fedlora.reports.console import Silent
from fedlora.scenario import parse, written
from fedlora.tasks import contract, encoding, loading
from tests.contracts import samples

NAMES = plugins.names("tasks")
SAMPLES = [*NAMES, "causal_lm_of_chats"]  # whose tokens have marks
LENGTH = 24


class Tried:
    """A task on the rows of its sample."""

    def __init__(self, name, folder, bases):
        self.name, self.cls = name, contract.find(name.partition("_of_")[0])
        self.sample = getattr(samples, name)(folder, bases)
        sample = self.sample
        self.reader = self.cls.reader(sample.base, None)
        self.encoded = self.cls.encode(self.reader, sample.rows, sample.labels, LENGTH)
        lengths = [len(row) for row in self.encoded.tokens]
        flat = np.concatenate([np.asarray(row) for row in self.encoded.tokens])
        types = self.encoded.types and np.concatenate([np.asarray(row, np.uint8) for row in self.encoded.types])
        self.examples = Examples(
            flat if flat.dtype == np.uint8 else flat.astype(np.int32),
            np.concatenate([[0], np.cumsum(lengths)]),
            self.encoded.held,
            types,
            self.encoded.marks and np.concatenate([np.asarray(row, np.int32) for row in self.encoded.marks]),
        )
        self.rows = np.arange(len(self.examples))
        kind = Lora(4, 8, sample.targets)
        told = {"labels": sample.labels, "seed": 3, "max_length": LENGTH}
        self.task = loading.load(name.partition("_of_")[0], sample.base, kind, private=True, **told)


@pytest.fixture(scope="module", params=SAMPLES)
def tried(request, tmp_path_factory):
    return Tried(request.param, tmp_path_factory.mktemp(request.param), request.getfixturevalue)


NOTHING = "\u200b"  # a character that the tokenizer leaves out
EMPTY = {"start": NOTHING, "pair": (NOTHING, "fine"), "marks": ("O",)}  # labels, by what examples are judged by


def test_a_text_that_makes_no_token_is_one_and_harms_no_other(tried, request):
    """Tokenizers that add nothing make a sequence of no tokens of it, by which a model has nothing to compute."""
    if not tried.cls.tokens or tried.name == "causal_lm_of_chats":
        pytest.skip("its inputs have tokens always")
    sample, reader = tried.sample, tried.cls.reader(tried.sample.base, None)
    reader._tokenizer.post_processor = None  # adds none
    pair = isinstance(sample.rows.texts[0], tuple) and tried.cls.target != "marks"
    text = (NOTHING,) if tried.cls.target == "marks" else (NOTHING, NOTHING) if pair else NOTHING
    label = EMPTY.get(tried.cls.target, sample.rows.labels[0])
    rows = Rows([*sample.rows.texts[:2], text], [*sample.rows.labels[:2], label])
    made = encoding.encoded(tried.cls, tried.name, reader, rows, sample.labels, LENGTH)
    assert made.tokens[2] and made.empty == (0 if tried.cls.completes else 1)  # what completes asks with a token
    flat = np.array([token for row in made.tokens for token in row], np.int32)
    marks = made.marks and np.array([mark for row in made.marks for mark in row], np.int32)
    some = Examples(flat, np.cumsum([0, *map(len, made.tokens)]), made.held, None, marks)
    task = tried.task
    task.begin({}, ())
    with torch.no_grad():
        alone, others, whole = (
            task.losses(task.batch(some, np.array(these))) for these in ([2], [0, 1], [0, 1, 2])
        )
    assert torch.isfinite(alone).all()
    torch.testing.assert_close(whole, torch.cat([others, alone]), rtol=1e-4, atol=1e-5)
    with torch.inference_mode(), task.packing.away():
        said, share = tried.cls.answer(task.model, reader, NOTHING, sample.labels, LENGTH, 2)
    assert isinstance(said, str) and "nan" not in said and (share is None or 0 <= share <= 1)


def test_a_row_that_cannot_be_encoded_is_told_by_its_number_alone(tried):
    """Not with its label either: at a site all of it is private."""
    texts, labels = ([*part, part[0]] for part in (tried.sample.rows.texts, tried.sample.rows.labels))

    class Broken(tried.cls):
        @classmethod
        def encode(cls, reader, rows, labels, max_length):
            if len(rows.texts) != 2:
                raise KeyError("secret")

    with pytest.raises(SettingError, match=r"mine.encode fails at row 1 of \d+: KeyError$"):
        encoding.encoded(Broken, "mine", tried.reader, Rows(texts, labels), tried.sample.labels, LENGTH)


def test_a_row_is_an_example(tried):
    assert len(tried.encoded.tokens) == len(tried.encoded.targets) == len(tried.sample.rows.texts)
    if tried.cls.target in ("many", "score"):
        assert tried.encoded.held.shape == (len(tried.sample.rows.texts), len(tried.sample.labels))
    if tried.cls.tokens:
        most = LENGTH * (2 if tried.cls.target == "pair" else 1)
        assert all(0 < len(row) <= most for row in tried.encoded.tokens)
    if tried.cls.labelled and tried.cls.target == "class":
        names = [tried.sample.labels[target] for target in tried.encoded.targets]
        assert names == tried.sample.rows.labels


def test_an_examples_loss_and_gradient_are_its_own(tried):
    """Beside others as by itself: clipping an example bounds what it does."""
    task, names = tried.task, tuple(n for n, s in tried.task.layout.items() if s.role != "A")
    parameters = task.begin(task.initial, names)
    alone = []
    for row in tried.rows:
        task.losses(task.batch(tried.examples, tried.rows[row : row + 1])).sum().backward()
        alone.append([p.grad.clone() for p in parameters])
        for p in parameters:
            p.grad = None
    together = gradients.apart(task, task.initial, names, task.batch(tried.examples, tried.rows))
    for i, mine in enumerate(alone):
        for one, all_of_them in zip(mine, together, strict=True):
            torch.testing.assert_close(all_of_them[i], one, rtol=1e-3, atol=1e-6)


def test_figures_are_those_of_all_examples_however_they_were_cut(tried):
    task = tried.task
    whole = task.evaluate(task.initial, tried.examples, tried.rows)
    parts = [task.evaluate(task.initial, tried.examples, tried.rows[i : i + 1]) for i in tried.rows]
    summed = {key: sum(part[key] for part in parts) for key in whole}
    one, other = task.figures(whole), task.figures(summed)
    assert {"loss", tried.cls.metric} <= set(one) == set(other)
    assert all(np.isclose(one[key], other[key], rtol=1e-4) for key in one)


def test_metrics_are_of_each_row_in_its_place(tried):
    """What a row gives is what it gives alone, and each metric for such tasks is None or within its bounds."""
    if tried.cls.target not in metrics.TARGETS:
        assert metrics.known(tried.cls.target) == {}
        return
    task, rows = tried.task, tried.rows[::-1]
    found = task.evaluation(task.initial, tried.examples, rows, rowwise=True)
    assert found.outputs.dtype == np.float32 and len(found.outputs) == len(found.targets)
    parts = [
        task.evaluation(task.initial, tried.examples, rows[i : i + 1], rowwise=True) for i in range(len(rows))
    ]
    if tried.cls.target != "marks":
        joined = metrics.Evaluation.joined(parts)
        np.testing.assert_allclose(found.outputs, joined.outputs, rtol=1e-4, atol=1e-6)
        assert (found.targets == joined.targets).all() and len(found.outputs) == len(rows)
    if tried.cls.target in ("class", "marks"):
        np.testing.assert_allclose(found.outputs.sum(-1), 1, rtol=1e-5)
    for metric in metrics.known(tried.cls.target).values():
        value = metric.of(found.outputs, found.targets, tried.sample.labels)
        assert value is None or metric.bounds[0] <= value <= metric.bounds[1]


def test_a_finished_model_answers(tried):
    model = tried.task.model.eval()
    tried.task.begin(tried.task.initial, ())
    model.eval()
    packing = tried.task.packing
    told = (model, tried.reader, tried.sample.question, tried.sample.labels, LENGTH, 4)
    with torch.inference_mode():
        if packing is None:
            said, sure = tried.cls.answer(*told)
        else:
            with packing.away():
                said, sure = tried.cls.answer(*told)
    assert isinstance(said, str) and (sure is None or 0 <= sure <= 1)
    assert not (tried.cls.labelled and tried.cls.target == "class") or said in tried.sample.labels


def test_packing_is_padding(tried):
    """To 1e-5: the loss of each example, and its gradient."""
    if not tried.cls.tokens:
        return
    task, names = tried.task, tuple(n for n, s in tried.task.layout.items() if s.role != "A")
    assert task.packing is not None

    def passed():
        parameters = task.begin(task.initial, names)
        losses = task.losses(task.batch(tried.examples, tried.rows))
        losses.sum().backward()
        return [losses.detach(), *(p.grad.clone() for p in parameters)]

    packed, packing = passed(), task.packing
    with packing.away(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "packing", None)
        padded = passed()
    for one, other in zip(packed, padded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_scenario_that_does_not_go_with_it_is_told_by_its_key(tried):
    assert [*tried.cls.needs(tried.sample.right)] == []
    problems = [*tried.cls.needs(tried.sample.wrong)]
    assert problems and all(path and isinstance(what, str) for path, what in problems)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_scenario_needs_is_told_without_torch(name):
    code = (
        f"import sys; from fedlora.tasks.contract import find; found = find({name!r}); "
        "print(found.metric, found.higher_is_better, found.auto, *({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    cls = contract.find(name)
    assert done.stdout.split() == [cls.metric, str(cls.higher_is_better), cls.auto]


def tensors(run):
    return (run.folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(tried, tmp_path_factory):
    """A scenario of the task, and its private run."""
    folder = tmp_path_factory.mktemp("trained")
    text = samples.run_of(tried.name, tried.sample, folder)
    return text, simulate(parse(text, "every.yaml"), out=folder / "run")


def test_it_trains_privately_and_is_resumed_bit_for_bit(trained, tmp_path):
    class Stop(Silent):
        def round(self, line):
            raise KeyboardInterrupt

    text, whole = trained
    assert whole.summary["failures"] == 0 and 0 < whole.summary["epsilon"] <= 8
    cut = simulate(parse(text, "every.yaml"), out=tmp_path / "cut", display=Stop())
    assert len(cut.rounds) == 1
    done = simulate(parse(text, "every.yaml"), out=tmp_path / "cut", resume=True)
    assert tensors(done) == tensors(whole) and done.summary["epsilon"] == whole.summary["epsilon"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the processes of Ray
def test_it_trains_under_ray_to_the_same_bits(trained, tmp_path):
    text, whole = trained
    told = ["engine.kind=ray", "engine.workers=2", "engine.threads=1"]
    run = simulate(parse(text, "every.yaml", told), out=tmp_path / "run")
    gc.collect()  # while its warnings are still let pass
    assert run.summary["failures"] == 0 and tensors(run) == tensors(whole)


OWN = '''
"""A task of somebody's own: what is judged is the share of mistakes."""
from fedlora.tasks.classification import Classification


class Mistakes(Classification):
    metric = "mistakes"
    higher_is_better = False

    def figures(self, sums):
        told = super().figures(sums)
        return {"loss": told["loss"], "mistakes": 1 - told["accuracy"]}


class Nothing:
    pass
'''


def test_a_task_of_ones_own_runs(tiny, tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = simulate(tiny("task=my_tasks:Mistakes", "rounds=1"), out=tmp_path / "run")
    plain = simulate(tiny("rounds=1"), out=tmp_path / "plain")
    assert run.metric == "mistakes" and not run.higher_is_better
    assert run.summary["mistakes"] == pytest.approx(1 - plain.summary["accuracy"])
    assert "mistakes" in run.rounds[-1] and "mistakes" in (run.folder / "adapter" / "README.md").read_text()
    with pytest.raises(SettingError, match=r"my_tasks:Nothing is no fedlora\.Task"):
        contract.find("my_tasks:Nothing")


COUPLED = '''
"""A loss that weighs an example by how rare its label is in the batch."""
from fedlora.tasks.classification import Classification


class Balanced(Classification):
    def losses(self, batch):
        alike = (batch["targets"][:, None] == batch["targets"][None]).sum(1)
        return super().losses(batch) / alike
'''


def test_a_loss_that_couples_examples_by_their_labels_is_refused_under_privacy(tiny_base, tmp_path, monkeypatch):
    (tmp_path / "coupled.py").write_text(COUPLED)
    monkeypatch.syspath_prepend(str(tmp_path))
    told = {"labels": ("bad", "good"), "seed": 3, "max_length": 16}
    kind = Lora(4, 8, ("query", "value"))
    loading.load("coupled:Balanced", tiny_base, kind, **told)
    with pytest.raises(SettingError, match="apart"):
        loading.load("coupled:Balanced", tiny_base, kind, private=True, **told)


def test_a_task_that_cannot_be_imported_is_one_line(tiny, tmp_path, monkeypatch):
    (tmp_path / "torn.py").write_text("def x(:")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot import 'torn': SyntaxError") as raised:
        tiny("task=torn:Task")
    assert len(raised.value.lines) == 1


def test_a_folder_of_somebody_elses_names_no_code_that_runs(tiny, tmp_path, monkeypatch):
    """Its task is a module in the folder itself, which would be found from where the command is called."""
    run = simulate(tiny("rounds=1"), out=tmp_path / "theirs")
    (tmp_path / "theirs" / "evil.py").write_text("raise SystemExit('their code ran')")
    for file in (run.folder / "adapter" / "fedlora.json", run.folder / "scenario.yaml"):
        text = file.read_text().replace('"task": "classification"', '"task": "theirs.evil:X"')
        file.write_text(text.replace("task: classification", "task: theirs.evil:X"))
    monkeypatch.syspath_prepend(str(tmp_path))
    for use in (lambda: predict(run.folder, ["x"]), lambda: export(run.folder, tmp_path / "whole", merge=True)):
        with pytest.raises(UserError, match="is custom code"):
            use()
    assert written(run.folder).task == "theirs.evil:X" and report(run.folder).exists()
    with pytest.raises(SystemExit, match="their code ran"):
        predict(run.folder, ["x"], own_code=True)
