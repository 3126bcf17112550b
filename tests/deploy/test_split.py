"""Sites with several labels of a row, and with scores: their files, and what comes of them."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora import checking, prepare, simulate
from fedlora import scenario as scenarios
from fedlora.data import reading
from fedlora.data.cells import Taught
from fedlora.deploy import site
from fedlora.deploy.split import split
from fedlora.errors import UserError
from tests.deploy.federation import LocalGrid


def labels(i):
    held = [name for name, word in (("good, mostly", i % 2), ("long", i % 3 == 0)) if word]
    return f'"{"|".join(held)}"'


@pytest.fixture(params=["multi_label", "regression"])
def told(request, tmp_path):
    """Overrides of the tiny scenario for a table of the task, in which columns are called as in sites' files."""
    column = "label" if request.param == "multi_label" else "tone"
    cells = labels if request.param == "multi_label" else lambda i: f"{-1 + i % 7 / 3:.4f}"
    rows = [f"note {i} of a {'lovely' if i % 2 else 'sad'} film,{cells(i)}" for i in range(160)]
    (file := tmp_path / "rows.csv").write_text("\n".join([f"text,{column}", *rows]) + "\n")
    scale = ["data.score={low: -1, high: 1}"] if request.param == "regression" else []
    return [f"task={request.param}", f"data.files.train='{file}'", f"data.files.label={column}", *scale]


def test_sites_give_what_a_simulation_gives_bit_for_bit(told, sites, nodes, deployed, tiny, tmp_path):
    _, files = sites(*told, private=False)
    written = scenarios.load(str(tmp_path / "sites" / "scenario.yaml"))
    assert written.data.files.train is None and (written.data.labels is None) == ("regression" in told[0])
    run, _ = deployed(written, LocalGrid(nodes(files)))
    plain = simulate(tiny(*told, private=False), out=tmp_path / "plain")
    one, other = (load_file(r.folder / "adapter" / "adapter_model.safetensors") for r in (run, plain))
    assert all(np.array_equal(one[n], other[n]) for n in one) and run.summary["failures"] == 0
    assert run.summary[run.metric] == pytest.approx(plain.summary[run.metric], abs=1e-6)


def test_a_sites_file_has_the_rows_of_its_client(told, tiny, tmp_path):
    scenario = tiny(*told)
    files = split(scenario, tmp_path / "sites")
    train, _ = reading.read(scenario.data, scenario.task)
    every = dict(zip(train.texts, train.labels, strict=True))
    found = {}
    for file in files:
        own = site.load(file)
        rows, left_out = reading.read_site(own.data, own.data.labels, Taught.of(scenario.data, scenario.task))
        found |= dict(zip(rows.texts, rows.labels, strict=True))
        assert left_out == 0
    assert found.keys() == every.keys()
    for text, held in found.items():
        assert held == (every[text] if scenario.task == "multi_label" else pytest.approx(every[text]))


def test_a_separator_that_labels_have_is_not_taken(tiny, tmp_path):
    (file := tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"text": "t{i}", "label": ["a|b", "c;d{i % 2}", "e"]}}\n' for i in range(60))
    )
    told = ("task=multi_label", f"data.files.train='{file}'")
    (first, *_) = split(tiny(*told), tmp_path / "sites")
    assert 'separator: ","' in first.read_text()
    file.write_text(file.read_text().replace('"e"', '"e,f"'))
    with pytest.raises(UserError, match=r"labels have all of \| ; ,: name another"):
        split(tiny(*told), tmp_path / "more")


def test_texts_with_spans_are_no_csv(tiny, tmp_path):
    """A text has many tags, and a row of a csv one label."""
    row = '{"text": "of Ann %d", "tags": [{"start": 3, "end": 6, "label": "Name"}]}\n'
    (file := tmp_path / "rows.jsonl").write_text("".join(row % i for i in range(60)))
    told = ("task=token_classification", f"data.files={{train: {file}, text: text, label: tags}}")
    with pytest.raises(UserError, match="only rows of one text and its label"):
        split(tiny(*told), tmp_path / "sites")


def test_a_csv_s_own_columns_are_those_of_the_files_in_what_is_submitted(tiny, tmp_path):
    rows = [f"note {i},{'bad' if i % 2 else 'good'},w{i % 4}" for i in range(60)]
    (file := tmp_path / "rows.csv").write_text("\n".join(["question,kind,ward", *rows]) + "\n")
    (chosen := tmp_path / "chosen.csv").write_text("question,kind\nnew,bad\nnewer,good\n")
    told = f"data.files={{train: {file}, validation: {chosen}, text: question, label: kind}}"
    split(tiny(told, "data.partition={kind: natural, column: ward}"), tmp_path / "sites")
    made = scenarios.load(str(tmp_path / "sites" / "scenario.yaml"))
    ready = prepare.prepare_server(made)
    assert made.data.labels == ready.data.labels == ("bad", "good")
    assert len(ready.data.test) == len((tmp_path / "sites" / "test.csv").read_text().splitlines()) - 1
    assert len(ready.data.validation) == 2 and made.data.files.text == "text"
    with pytest.raises(UserError, match=r"data.files.train: is missing: name the rows that clients train on"):
        simulate(made, out=tmp_path / "run")
    assert not checking.problems(made)  # the rows are not at hand


def test_a_correlation_below_0_is_a_figure(told, sites, nodes, deployed, monkeypatch):
    from fedlora.engine import Worker

    scenario, files = sites(*told, "data.client_test_share=0.7", "rounds=1", private=False)
    judge = Worker.judge

    def against(worker, *more):
        return {c: figures | {worker.task.metric: -0.25} for c, figures in judge(worker, *more).items()}

    monkeypatch.setattr(Worker, "judge", against)
    run, _ = deployed(scenario, LocalGrid(nodes(files)))
    assert run.rounds[0][f"local_{run.metric}"] == -0.25
