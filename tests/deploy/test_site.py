"""The site file: what it says, and what it refuses."""

import re
from pathlib import Path

import pytest

from fedlora.data import reading
from fedlora.data.cells import Taught
from fedlora.deploy import site
from fedlora.errors import SettingError, UserError
from fedlora.reference import sites

GOOD = """\
name: st-mary
client: 1
data: {train: /data/notes.csv, text: note, label: ward}
state: /var/lib/fedlora
"""


@pytest.fixture
def read(tmp_path):
    def load(text):
        (tmp_path / "site.yaml").write_text(text)
        return site.load(tmp_path / "site.yaml")

    return load


def test_says_what_a_node_brings(read):
    made = read(GOOD + "privacy: {max_epsilon: 8, delta: 1.0e-5}\naccept: {strategies: [ffa_lora]}\n")
    assert (made.name, made.client, made.data.text, made.data.label) == ("st-mary", 1, "note", "ward")
    assert made.privacy.max_epsilon == 8 and made.privacy.accountant == "pld" and made.threads == 1
    assert made.accept.strategies == ("ffa_lora",) and not made.accept.own_code


@pytest.mark.parametrize(
    "text, line",
    [
        (
            GOOD.replace("client: 1", "client: -1"),
            "site.yaml:2: client: should be greater than or equal to 0, not -1",
        ),
        (GOOD.replace("client: 1\n", ""), "site.yaml:1: client is missing"),
        (
            GOOD.replace("label: ward", "lable: ward"),
            "site.yaml:3: unknown key 'lable' in data: did you mean 'label'?",
        ),
        (
            GOOD + "accept: {strategy: [x]}",
            "site.yaml:5: unknown key 'strategy' in accept: did you mean 'strategies'?",
        ),
        (
            GOOD + "privacy: {max_epsilon: 0, delta: 1}",
            "site.yaml:5: privacy.max_epsilon: should be greater than 0, not 0",
        ),
        (GOOD + "name: other", "site.yaml:5: name is written twice, first on line 1"),
        (GOOD + "figures: yes", "site.yaml:5: figures: should be a mapping of keys to values, not true"),
        (GOOD + "personalise: 50", "site.yaml:5: personalise: should be a mapping of keys to values, not 50"),
        (GOOD + "threads: ten", "site.yaml:5: threads: should be a whole number, not 'ten'"),
        (GOOD + "idle_minutes:", "site.yaml:5: idle_minutes: should be a number, not null"),
        (GOOD + "accept: {own_code: 3}", "site.yaml:5: accept.own_code: should be true or false, not 3"),
        (GOOD + "\nfigures:\n  epsilon: 1", "site.yaml:6: figures: is paid for from a budget: set privacy too"),
        ("- a", "site.yaml:1: should be a mapping of keys to values, such as 'name: mine'"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(read, text, line):
    with pytest.raises(UserError) as raised:
        read(text)
    assert any(told.endswith(line) for told in raised.value.lines)


@pytest.mark.parametrize("key", ["survey", "figures", "personalise"])
def test_what_costs_more_than_all_runs_may_is_refused(read, key):
    more = ", steps: 5" if key == "personalise" else ""
    rest = f"privacy: {{max_epsilon: 8, delta: 1.0e-5}}\nreceive: adapter\n{key}: {{epsilon: %s{more}}}\n"
    assert getattr(read(GOOD + rest % 8), key).epsilon == 8
    with pytest.raises(UserError) as raised:
        read(GOOD + rest % 20)
    (line,) = raised.value.lines
    what = "is more than all runs together may spend (privacy.max_epsilon: 8): lower it"
    assert line.endswith(f"site.yaml:7: {key}.epsilon: 20 {what}")


def test_the_site_file_of_the_page_can_be_read(read):
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
    least, text = re.findall(r"^```yaml\n(name: .*?)^```", page, re.S | re.M)
    assert read(least).model_dump(exclude_defaults=True).keys() == {"name", "client", "data", "state", "privacy"}
    made = read(text)
    unsaid = {key.path for key in sites().keys if not re.search(rf"\b{key.name}:", text)}
    assert unsaid == {"site.data.test", "site.data.validation"}, "which a site does not use"
    assert made.personalise.steps == 50 and made.figures.epsilon == 0.2 and read(least).figures is None
    assert made.data.labels == ("surgery", "other") and made.accept.metrics is False
    assert made.metrics_address == "127.0.0.1" == read(GOOD).metrics_address


CLASSES = GOOD.replace("label: ward", "label: ward, labels: [good, bad]")
SIGNED = "accept: {submitters: [ssh-ed25519 AAAA]}\n"


@pytest.mark.parametrize(
    "text, overrides, labels, why",
    [
        (CLASSES, [], ["bad", "good"], None),
        (CLASSES, [], ["good", "bad"], None),
        (CLASSES, [], ["good"], "not those of its site file"),
        (CLASSES, [], ["good", "bad", "other"], "not those of its site file"),
        (CLASSES, [], ["good", "bad", "bad"], "not those of its site file"),
        (CLASSES, [], [], "not those of its site file"),
        (GOOD, [], ["bad", "good"], "does not say which labels"),
        (CLASSES, ["data.labels=[bad, good]"], ["bad", "good"], None),
        (CLASSES, ["data.labels=[bad, good]"], ["good", "bad"], "other labels than its scenario"),
        (CLASSES + SIGNED, [], ["bad", "good"], "nobody has signed the run's labels"),
        (CLASSES + SIGNED, ["data.labels=[bad, good]"], ["bad", "good"], None),
        (CLASSES, ["task=causal_lm"], [], None),
        (CLASSES, ["task=causal_lm"], ["bad", "good"], "its task has none"),
    ],
)
def test_a_site_is_asked_about_the_labels_of_its_file(read, tiny, text, overrides, labels, why):
    told = read(text).refuses_labels(tiny(*overrides), labels)
    assert told is None if why is None else why in told


SEVERAL = GOOD.replace("label: ward", "label: ward, labels: [good, bad], separator: '|'")
SCORES = GOOD.replace("label: ward", "label: ward, score: {low: 0, high: 5}")
SCORED = ["task=regression", "data.score={low: 0, high: 5}"]


@pytest.mark.parametrize(
    "text, overrides, labels, why",
    [
        (SEVERAL, ["task=multi_label"], ["bad", "good"], None),
        (SEVERAL, ["task=multi_label"], ["bad"], "not those of its site file"),
        (SEVERAL, [], ["bad", "good"], "not for task: classification, by what its site file has (data.separator)"),
        (CLASSES, ["task=multi_label"], ["bad", "good"], "by what its site file lacks (data.separator)"),
        (SCORES, SCORED, ["label"], None),
        (SCORES, SCORED, ["label", "other"], "its rows have 1 scores, and the run 2"),
        (SCORES, ["task=regression", "data.score={low: 0, high: 4}"], ["label"], "is not that of its site file"),
        (SCORES, ["task=multi_label"], ["bad", "good"], "not for task: multi_label"),
        (CLASSES, SCORED, ["label"], "not for task: regression, by what its site file lacks (data.score)"),
    ],
)
def test_a_site_says_how_its_rows_are_read_and_no_run_reads_them_otherwise(
    read, tiny, text, overrides, labels, why
):
    """Else the number of rows that are left would tell how many have one label, or a score of some size."""
    told = read(text).refuses_labels(tiny(*overrides), labels)
    assert told is None if why is None else why in told


def test_rows_of_other_labels_are_left_out_and_counted(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,x\nb,y\nc,z\nd,x\n")
    files = site.Held(train=str(tmp_path / "rows.csv"))
    plain = Taught("class", None)
    rows, left_out = reading.read_site(files, ("x", "z"), plain)
    assert (rows.texts, rows.labels, left_out) == (["a", "c", "d"], ["x", "z", "x"], 1)
    assert reading.read_site(files, None, plain)[1] == 0
    with pytest.raises(SettingError, match="no row has any of them"):
        reading.read_site(files, ("w",), plain)
    (tmp_path / "rows.csv").write_text("text,label\na,x|z\nb,x|y\nc,\n")
    rows, left_out = reading.read_site(files, ("x", "z"), Taught("many", None))
    assert (rows.labels, left_out) == ([("x", "z"), ()], 1)


def test_a_file_that_is_not_there_is_a_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        site.load(tmp_path / "none.yaml")


def test_an_error_about_data_names_the_line_of_the_site_file(read, tmp_path):
    read(GOOD)
    told = site.located(tmp_path / "site.yaml", SettingError("data.files.text", "no column 'note'"))
    assert str(told).endswith("site.yaml:3: data.text: no column 'note'")


@pytest.mark.parametrize(
    "rules, overrides, why",
    [
        ("", [], None),
        ("accept: {scenarios: [other]}", [], "does not accept the scenario 'tiny'"),
        ("accept: {scenarios: [tiny]}", [], None),
        ("accept: {bases: [lab/mine]}", [], "does not accept the base model 'minilm' (accept.bases)"),
        ("accept: {bases: [lab/mine]}", ["model.base=lab/mine"], None),
        ("", ["model.base=lab/mine"], "does not accept the base model 'lab/mine' (accept.bases)"),
        ("", ["model.start=/runs/public"], "does not begin from '/runs/public' (accept.starts)"),
        ("accept: {starts: [/runs/public]}", ["model.start=/runs/public"], None),
        ("accept: {strategies: [fedavg_lora]}", [], "does not accept the strategy 'ffa_lora'"),
        ("accept: {clients: [sgd]}", [], "does not accept the client 'dp_sgd'"),
        ("", ["privacy.share_metrics=true"], "the scenario asks for some by privacy.share_metrics"),
        ("", ["data.client_test_share=0.2"], "the scenario asks for some by data.client_test_share"),
        ("accept: {metrics: true}", ["privacy.share_metrics=true", "data.client_test_share=0.2"], None),
        ("accept: {masked_only: true}", [], "sends masked updates only"),
        ("accept: {masked_only: true}", ["secure_aggregation={}"], None),
        ("", ["strategy.use=flwr.serverapp.strategy:FedAdam"], None),
        ("", ["clients.total=1"], "is client 1, and the scenario has clients 0 to 0"),
        ("privacy: {max_epsilon: 1, delta: 1.0e-5}", ["privacy=null", "clients.use=sgd"], "asks for none"),
    ],
)
def test_a_site_takes_part_where_its_rules_allow(read, tiny, rules, overrides, why):
    told = read(GOOD + rules).refuses(tiny("model.base=minilm", *overrides))
    assert told is None if why is None else why in told


@pytest.mark.parametrize(
    "said, where",
    [
        ({"strategy": {"use": "lab.mine:Mine"}}, "strategy"),
        ({"strategy": {"use": "alone", "like": "lab.mine:Mine"}}, "strategy"),
        ({"strategy": {"use": "alone", "like": {"use": "lab.mine:Mine"}}}, "strategy"),
        ({"clients": {"use": "lab.mine:Mine"}}, "clients"),
        ({"task": "lab.mine:Mine"}, "task"),
        ({"metrics": ["f1", "lab.mine:Mine"]}, "metrics"),
        ({"compress": {"use": "lab.mine:Mine"}}, "compress"),
        ({"model": {"adapter": {"kind": "lab.mine:Mine"}}}, "model.adapter"),
        ({"model": {"adapter": {"kind": {"use": "lab.mine:Mine"}}}}, "model.adapter"),
        ({"model": {"adapter": {"schedule": {"kind": "lab.mine:Mine"}}}}, "model.adapter"),
    ],
)
def test_a_site_imports_nothing_that_a_scenario_names_before_its_rules_are_read(read, said, where):
    told = read(GOOD).refuses_code(said)
    assert told == f"it runs no code that comes with a run, such as 'lab.mine:Mine' ({where})"
    assert read(GOOD + "accept: {own_code: true}").refuses_code(said) is None


def test_flowers_own_strategies_and_odd_words_name_no_program(read):
    site = read(GOOD)
    assert site.refuses_code({"strategy": {"use": "flwr.serverapp.strategy:FedAdam"}}) is None
    for odd in (None, 3, [], {"model": 3}, {"model": {"adapter": None}}, {"metrics": 7}):
        assert site.refuses_code(odd) is None
