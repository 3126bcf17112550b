"""The site file: what it says, and what it refuses."""

import pytest

from fedlora.deploy import site
from fedlora.errors import SettingError, UserError

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
        (GOOD.replace("client: 1", "client: -1"), "site.yaml:2: client: should be greater than or equal to 0"),
        (GOOD.replace("client: 1\n", ""), "site.yaml:1: client is missing"),
        (
            GOOD.replace("label: ward", "lable: ward"),
            "site.yaml:3: unknown key 'data.lable': did you mean 'label'?",
        ),
        (
            GOOD + "accept: {strategy: [x]}",
            "site.yaml:5: unknown key 'accept.strategy': did you mean 'strategies'?",
        ),
        (
            GOOD + "privacy: {max_epsilon: 0, delta: 1}",
            "site.yaml:5: privacy.max_epsilon: should be greater than 0",
        ),
        (GOOD + "name: other", "site.yaml:5: name is written twice, first on line 1"),
        ("- a", "site.yaml:1: should be a mapping of keys to values, such as 'name: mine'"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(read, text, line):
    with pytest.raises(UserError) as raised:
        read(text)
    assert any(told.endswith(line) for told in raised.value.lines)


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
        ("accept: {strategies: [fedavg_lora]}", [], "does not accept the strategy 'ffa_lora'"),
        ("accept: {clients: [sgd]}", [], "does not accept the client 'dp_sgd'"),
        (
            "",
            ["strategy.use=lab.mine:Mine"],
            "runs no code that comes with a run, such as the strategy 'lab.mine:M",
        ),
        (
            "",
            ["clients.use=lab.mine:Mine"],
            "runs no code that comes with a run, such as the client 'lab.mine:Mine'",
        ),
        ("accept: {own_code: true}", ["strategy.use=lab.mine:Mine"], None),
        ("accept: {masked_only: true}", [], "sends masked updates only"),
        ("accept: {masked_only: true}", ["secure_aggregation={}"], None),
        ("", ["strategy.use=flwr.serverapp.strategy:FedAdam"], None),
        ("", ["clients.total=1"], "is client 1, and the scenario has clients 0 to 0"),
        ("privacy: {max_epsilon: 1, delta: 1.0e-5}", ["privacy=null", "clients.use=sgd"], "asks for none"),
    ],
)
def test_a_site_takes_part_where_its_rules_allow(read, tiny, rules, overrides, why):
    told = read(GOOD + rules).refuses(tiny(*overrides))
    assert told is None if why is None else why in told
