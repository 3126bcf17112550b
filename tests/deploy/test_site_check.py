"""`fedlora site check`: what the owner of a site is told of its file, its rows and its rules."""

import json

import pytest

from fedlora.cli import main
from fedlora.deploy.account import Account
from fedlora.deploy.checking import check, rules
from fedlora.deploy.site import load, task_of
from fedlora.deploy.split import caps, split
from fedlora.errors import UserError
from fedlora.privacy.accounting import Event


def test_rows_are_counted_and_told_by_number_alone(made):
    told = check(made()).understood
    assert (told.task, told.rows, told.left_out, told.empty) == ("classification", 4, [3, 4], [2])
    assert told.labels == {"surgery": 1, "other": 3, "rare": 0} and (told.nearly, told.repeated) == (
        {"surgery": 1},
        1,
    )
    assert (told.lengths.median, told.lengths.most, told.lengths.over) == (2, 3, None)


def test_the_table_holds_counts_and_rules_and_no_text(made, capsys):
    file = made()
    assert main(["site", "check", str(file)]) == 0
    said = capsys.readouterr().out
    for line in (
        f"{file}: fine, but for 1 warning",
        "2 rows with a label that is not in data.labels: rows 3, 4",
        "'other': 3 rows",
        "1 row without a word: row 2",
        "1 of 3 labels of data.labels have no row here: 'rare'",
        "none: nothing bounds what runs may learn of the rows",
        "minilm: on this machine, BertModel, 6 blocks",
        "1 row left out, with a label that is nearly 'surgery' of data.labels",
    ):
        assert line in said
    assert "ein text" not in said and "gone" not in said
    assert not (file.parent / "state").exists()


@pytest.mark.parametrize(
    "labels, rows, nearly",
    [
        (["Biling", "other"], ["Billing"] * 3 + ["other"], {"Biling": 3}),
        (["Billing", "other"], ["Biling", "Bilings", "other"], {"Billing": 2}),
        (["Billing", "other"], ["Shipping", "other"], {}),
        (["class 1", "class 2"], ["class 3", "class 1"], {}),
    ],
)
def test_a_label_that_is_nearly_one_of_the_file_is_a_warning(made, labels, rows, nearly):
    """Slips are of letters: another digit is another label."""
    told = check(made(rows="\n".join(["text,ward", *(f"a,{one}" for one in rows)]), data=f"labels: {labels}"))
    assert told.understood.nearly == nearly and len(told.warnings) == len(nearly) and not told.problems
    text = "\n".join(told.lines())
    assert ("warning" in text) is bool(nearly)
    assert not any(one in text for one in ("Bilings", "Shipping", "class 3"))


def test_json_has_the_same_and_problems_have_exit_code_2(made, capsys):
    assert main(["site", "check", str(made()), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fine"] and told["understood"]["rows"] == 4 and told["privacy"] is None
    assert main(["site", "check", str(made(data="labels: [x, y]")), "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert not told["fine"] and told["understood"] is None


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"data": "labels: [x, y]"}, "site.yaml:3: data.labels: "),
        ({"rows": "text,kind\na,b\n"}, "site.yaml:3: data.label: "),
        ({"more": "privacy: {max_epsilon: 8, delta: 1.0e-15}\n"}, "accountant pld tells no delta below 1e-13"),
        ({"more": "acept: {}\n"}, "site.yaml:5: unknown key 'acept': did you mean 'accept'?"),
    ],
)
def test_a_wrong_file_is_one_line(made, capsys, told, message):
    assert main(["site", "check", str(made(**told))]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_delta_that_renyi_tells_is_a_budget(made):
    file = made(more="privacy: {max_epsilon: 8, delta: 1.0e-15, accountant: rdp}\n")
    assert check(file).privacy.epsilon == 0


def test_what_is_spent_stands_in_the_state_folder(made):
    file = made(more="privacy: {max_epsilon: 8, delta: 1.0e-5}\n")
    site = load(file)
    site.folder.mkdir()
    event = Event(noise_multiplier=1.0, sample_rate=0.1, steps=5, clip_norm=1.0)
    account = Account(site.folder / "ledger", site.privacy)
    for round in (1, 2):
        account.spend("wards-1", round, 2, event)
    told = check(file)  # while another holds the ledger
    assert told.privacy.epsilon == account.epsilon > 0 and told.privacy.runs == {"wards-1": 2}
    assert any("is spent" in line and "wards-1 2 rounds" in line for line in told.lines())
    ledger = site.folder / "ledger" / "privacy.jsonl"
    ledger.write_text(ledger.read_text().replace('"round": 2', '"round": 3'))
    assert "was edited" in check(file).problems[0]


@pytest.mark.parametrize(
    ("data", "task"),
    [
        ("labels: [a, b]", "classification"),
        ("labels: [O, B-X, I-X]", "token_classification"),
        ("labels: [a, b], separator: '|'", "multi_label"),
        ("score: {low: 0, high: 5}", "regression"),
        ("messages: m", "causal_lm"),
    ],
)
def test_the_task_follows_from_the_file(made, data, task):
    assert task_of(load(made(data=data))) == task


@pytest.mark.parametrize(
    ("accept", "sentence"),
    [
        ("", "may bring no program of its own (accept.own_code)"),
        ("own_code: true", "may bring programs of its own, which can read and write all that the worker can"),
        ("metrics: true", "may learn exact losses and figures of 20 rows or more"),
        ("masked_only: true", "must mask updates"),
        ("strategies: [ffa_lora, fedsvd]", "must take the strategy ffa_lora or fedsvd"),
        ("clients: []", "must take the client of no name: all are refused"),
        ("scenarios: [wards]", "must be named wards"),
        ("starts: [/site/public]", "must begin from the seed, or from /site/public"),
        ("bases: []", "may take no base model"),
    ],
)
def test_rules_are_told_in_words(made, accept, sentence):
    assert any(line.startswith(sentence) for line in rules(load(made(more=f"accept: {{{accept}}}\n"))))


@pytest.mark.parametrize("person, units", [("", "rows"), (", person: ward", "persons")])
def test_how_far_figures_and_counts_are_off_is_told_in_units(made, person, units):
    """At epsilon 0.2 an accuracy of 100 is 0.45 off, counts at 0.5 are 19 off, as docs/deploy.md says."""
    more = f"privacy: {{max_epsilon: 8, delta: 1.0e-5{person}}}\n"
    more += "figures: {epsilon: 0.2}\nsurvey: {epsilon: 0.5}\n"
    said = " ".join(rules(load(made(more=more))))
    assert f"of 100 {units} an accuracy to 0.45 either way" in said
    assert f"how many {units} have each label and length, to 19 either way" in said


def test_slips_in_rules_are_told(made):
    more = 'accept: {strategies: [ffa_lroa, "mine:Own"], submitters: [ssh-ed25519 AAAA], bases: [minilm, x/y]}\n'
    made_of = check(made(more=more))
    said = " ".join(made_of.notes)
    assert "did you mean 'ffa_lora'?" in said and "mine:Own comes with a run" in said
    assert "key 1 of accept.submitters" in said and "not on this machine" in made_of.bases["x/y"]


def test_each_command_names_the_other(made, tmp_path, capsys):
    file = made()
    for command in ("check", "plan", "simulate"):
        assert main([command, str(file)]) == 2
        assert capsys.readouterr().err == (
            f"{file}:1: this is a site's file, and no scenario: fedlora site check {file}\n"
        )
    (scenario := tmp_path / "s.yaml").write_text(
        "name: x\ndata: {dataset: tweets}\nclients: {total: 2}\nrounds: 2\n"
    )
    assert main(["site", "check", str(scenario)]) == 2
    assert f"this is a scenario, and no site's file: fedlora check {scenario}" in capsys.readouterr().err


def test_the_files_of_split_are_checked_and_say_why_they_allow_so_much(tiny, tmp_path):
    files = split(scenario := tiny(), tmp_path / "sites")
    told = check(files[0])
    asked = scenario.privacy.epsilon
    assert not told.problems and told.understood.rows and told.privacy.max_epsilon == 10 * asked
    assert f"10 rehearsals of epsilon {asked:g}" in files[0].read_text()
    (line,) = caps(scenario)
    assert f"is {10 * asked:g}: 10 rehearsals of epsilon {asked:g}" in line
    assert caps(tiny(private=False)) == []


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        check(tmp_path / "none.yaml")
