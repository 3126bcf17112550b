"""Every word about an epsilon names the unit that it is for, in every combination."""

import io
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from fedlora import scenario as scenarios
from fedlora.errors import UserError
from fedlora.privacy import accounting, ledger, together
from fedlora.privacy.accounting import Event
from fedlora.privacy.ledger import Ledger, statements
from fedlora.privacy.wording import FROM_SERVER
from fedlora.record import Record
from fedlora.reports import console, dossier, meaning, single, summary

WHOM = {
    "example": "for each example",
    "person": "for each person (all rows with the same patient_id)",
    "client": "for each client",
}
DIFFER = {
    "example": "differ in one example, which counts for nothing in one of them",
    "person": "differ in all rows of one person, who counts for nothing in one of them",
    "client": "differ in one client, whose change counts for nothing in one of them",
}
PUBLIC = {
    "example": "how many examples a client holds is public",
    "person": "how many persons a client holds is public",
    "client": "how many clients there are is public",
}
WAYS = [
    (unit, accountant, bands, rate)
    for unit, accountant, bands, rate in itertools.product(WHOM, ("pld", "prv", "rdp"), (1, 4), (0.1, 1.0))
]


ACCOUNTANTS = ("pld", "prv", "rdp")
SHARED = "secure_aggregation={noise: shared}"


def scenario_of(unit, accountant, bands, *more):
    privacy = {"epsilon": 6, "accountant": accountant, "unit": "client" if unit == "client" else "example"}
    privacy |= {"person": "patient_id"} if unit == "person" else {}
    privacy |= {"bands": bands} if bands > 1 else {}
    told = {"name": "words", "data": {"files": {"train": "a.csv"}}, "privacy": privacy}
    return scenarios.parse(yaml.safe_dump({**told, "clients": {"total": 40, "per_round": 4}}), "words.yaml", more)


def right(said, unit, bands):
    """Whether words are about a unit, and about no other."""
    found = [other for other in WHOM if WHOM[other] in said]
    assert found == [unit], said
    assert DIFFER[unit] in said and PUBLIC[unit] in said
    assert f"{'cyclic ' * (bands > 1)}Poisson sampling of {unit}s" in said
    assert ("banded noise, b = 4" in said) is (bands > 1)
    assert ("the largest over clients" in said) is (unit != "client")
    return True


@pytest.mark.parametrize(("unit", "accountant", "bands", "rate"), WAYS)
def test_every_word_names_the_unit(tmp_path, unit, accountant, bands, rate):
    scenario = scenario_of(unit, accountant, bands)
    asked = scenario.privacy
    assert asked.protects == unit
    record = Ledger(tmp_path)
    event = Event(noise_multiplier=2.0, sample_rate=rate, steps=4, clip_norm=1.0, bands=bands)
    record.spend(1, {None if unit == "client" else 0: event}, **asked.terms)
    spent = accounting.epsilon([event], asked.delta, accountant)

    ready = SimpleNamespace(scenario=scenario, setup=SimpleNamespace(secret=True))
    words = summary.privacy_in_words(ready, record)  # also of the card, the report and the audit
    assert right(words, unit, bands) and words.startswith(f"({spent:.3g}, 1e-05)-differential privacy for each")
    first, *others = statements(tmp_path)
    assert len(others) == 3 and all(right(line, unit, bands) for line in others), first
    (found, said) = together.total_epsilon([tmp_path])[unit]
    assert WHOM[unit] in said and PUBLIC[unit] in said and found > 0
    assert f"Poisson sampling of {unit}s" in said

    out = io.StringIO()
    console.Live(Console(file=out, width=1000)).begin(scenario, "accuracy", 0)
    said = " ".join(out.getvalue().split())
    assert [other for other in WHOM if WHOM[other] in said] == [unit]
    assert ("of the client that spent most" in said) is (unit != "client")
    (tmp_path / "scenario.yaml").write_text(scenario.to_yaml())
    line = {
        "round": 1,
        "clients": 4,
        "loss": None,
        "accuracy": None,
        "epsilon": spent,
        "seconds": 1.0,
        "failures": 0,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    tiles = {name: note for name, _, note in single._key_figures(Record(tmp_path, {"metric": "accuracy"}))}
    explained = " ".join(meaning.explained(Record(tmp_path, {"metric": "accuracy"})))
    assert f"The unit is one {unit}: " in explained and ("patient_id" in explained) is (unit == "person")
    assert f"for each {unit}" in tiles["Epsilon"] and ("over clients" in tiles["Epsilon"]) is (unit != "client")


@pytest.mark.parametrize(
    ("unit", "accountant", "honest"), [*itertools.product(("example", "person"), ACCOUNTANTS, (1.0, 0.7))]
)
def test_every_word_of_noise_that_is_shared_says_from_whom(tmp_path, unit, accountant, honest):
    """Two epsilons, of the sum and of a client's own part: each with its terms, wherever it is told."""
    scenario = scenario_of(unit, accountant, 1, "clients.local_steps=1", f"{SHARED[:-1]}, honest: {honest}}}")
    asked, record = scenario.privacy, Ledger(tmp_path)
    event = Event(noise_multiplier=1.0, sample_rate=0.1, steps=4, clip_norm=1.0, sharers=4.0)
    record.spend(1, {0: event}, **scenario.example_terms)
    own = accounting.epsilon([event], asked.delta, accountant)
    seen = accounting.epsilon([replace(event, noise_multiplier=2.0, sharers=1.0)], asked.delta, accountant)
    assert seen < own / 2
    kept = f"of those who sent {honest:.0%} keep their noise to themselves"

    def about(said, epsilon, summed):
        told = f"({epsilon:.3g}, 1e-05)-differential privacy {WHOM[unit]}" in said
        return (
            told
            and right(said, unit, 1)
            and (kept in said) is summed
            and ("own part of the noise" in said) is not summed
        )

    ready = SimpleNamespace(scenario=scenario, setup=SimpleNamespace(secret=True))
    first, second = summary.privacy_in_words(ready, record).split("; from everybody, ")
    assert about(first, seen, True) and about(second, own, False)
    lines = statements(tmp_path)[1:]
    values = [
        accounting.epsilon(e, asked.delta, a) for e in ([event], accounting.in_sums([event])) for a in ACCOUNTANTS
    ]
    assert len(lines) == 6 and all(map(about, lines, values, [False] * 3 + [True] * 3))
    found = together.total_epsilon([tmp_path])
    assert [*found] == [unit, f"{unit}_in_sums"] and found[unit][0] > 2 * found[f"{unit}_in_sums"][0]
    assert kept in found[f"{unit}_in_sums"][1] and "own part of the noise alone" in found[unit][1]

    (tmp_path / "scenario.yaml").write_text(scenario.to_yaml())
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"round": 1, "loss": None, "accuracy": None, "epsilon": seen}) + "\n"
    )
    run = Record(tmp_path, {"metric": "accuracy", "own_epsilon": own, "server_epsilon": seen})
    explained = " ".join(meaning.explained(run))
    share = "all" if honest == 1 else "70%"
    assert (
        f"{share} of those who send keep their part" in explained and f"a larger epsilon: {own:.2f}" in explained
    )
    assert "everything that the clients sent" not in explained and "each round's sum" in explained
    tiles = {name: value for name, value, _ in single._key_figures(run)}
    assert (tiles["Epsilon"], tiles["Epsilon by own noise"]) == (f"{seen:.2f}", f"{own:.2f}")
    page = dossier.html(scenario.model_dump(mode="json"))
    assert "a part of the noise is added" in page and "a server that lies can have the others add none" in page
    assert f"if {honest:.0%} of those who send keep their noise" in page


def test_an_earlier_reader_refuses_a_line_of_persons(tmp_path, monkeypatch):
    told = scenario_of("person", "pld", 1).privacy.terms
    event = Event(noise_multiplier=2.0, sample_rate=0.1, steps=4, clip_norm=1.0)
    Ledger(tmp_path).spend(1, {0: event}, **told)
    assert ledger.replay(tmp_path / "privacy.jsonl") == {0: [event]}
    monkeypatch.setattr(ledger, "UNITS", ("example", "client", FROM_SERVER))
    with pytest.raises(UserError, match="lacks or garbles unit"):
        ledger.replay(tmp_path / "privacy.jsonl")


def test_runs_of_several_units_are_summed_apart_and_say_so(tmp_path):
    """Two columns of persons are two units, and what one says of the other is no bound."""
    event = Event(noise_multiplier=2.0, sample_rate=0.1, steps=4, clip_norm=1.0)
    told = [("example", {}), ("example", {}), ("person", {"person": "visit"}), ("person", {"person": "patient"})]
    for i, (unit, more) in enumerate(told):
        (folder := tmp_path / str(i)).mkdir()
        Ledger(folder).spend(1, {0: event}, delta=1e-5, unit=unit, accountant="pld", **more)
    every = [tmp_path / str(i) for i in range(4)]
    found = together.total_epsilon(every)
    assert sorted(found) == ["example", "person patient", "person visit"]
    assert all(
        "the other runs add, which protect another unit, is not in it" in said for _, said in found.values()
    )
    assert "2 runs together give" in found["example"][1]
    assert "(all rows with the same visit)" in found["person visit"][1]
    alone = together.total_epsilon(every[2:3])
    assert [*alone] == ["person"] and "other runs" not in alone["person"][1]
    assert alone["person"][0] == found["person visit"][0] < found["example"][0]
