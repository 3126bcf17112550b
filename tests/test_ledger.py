import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora import ledger
from fedlora.errors import UserError
from fedlora.ledger import Ledger, epsilon_of, replay
from fedlora.privacy import Event, epsilon

TERMS = {"delta": 1e-5, "unit": "example", "accountant": "pld"}
LIGHT = Event(noise_multiplier=2.0, sample_rate=0.1, steps=5, clip_norm=1.0)
HEAVY = Event(noise_multiplier=1.0, sample_rate=0.1, steps=5, clip_norm=1.0)
WHOLE = {"round": 1, "client": 0, **LIGHT.to_json(), **TERMS}
WHOLE |= {"mechanism": ledger.MECHANISM, "neighbours": ledger.NEIGHBOURS}


def two_rounds(folder: Path) -> Ledger:
    record = Ledger(folder)
    record.spend(1, {0: LIGHT, 2: HEAVY}, **TERMS)
    record.spend(2, {0: LIGHT}, **TERMS)
    return record


def write(folder: Path, *lines: object) -> Path:
    file = folder / "privacy.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_line_holds_all_that_epsilon_needs(tmp_path):
    two_rounds(tmp_path)
    lines = ledger.read(tmp_path / "privacy.jsonl")
    assert lines[0] == WHOLE
    assert [(line["round"], line["client"]) for line in lines] == [(1, 0), (1, 2), (2, 0)]


def test_what_was_spent_is_read_back_exactly(tmp_path):
    record = two_rounds(tmp_path)
    again = Ledger(tmp_path)
    assert replay(tmp_path / "privacy.jsonl") == record.events == again.events
    assert record.events == {0: [LIGHT, LIGHT], 2: [HEAVY]}
    assert (again.last_round, again.spent(1).keys(), again.spent(2).keys(), again.spent(3)) == (2, {0, 2}, {0}, {})
    assert again.spent(2)[0] == again.events[0][-1]


def test_epsilon_follows_from_the_file_alone(tmp_path):
    two_rounds(tmp_path)
    by_client = [epsilon([LIGHT, LIGHT], 1e-5), epsilon([HEAVY], 1e-5)]
    assert epsilon_of(tmp_path / "privacy.jsonl") == max(by_client) == by_client[1] > by_client[0] > 0
    assert epsilon_of(write(tmp_path)) == 0.0
    renyi = write(tmp_path, {**WHOLE, "accountant": "rdp"})
    assert epsilon_of(renyi) == epsilon([LIGHT], 1e-5, "rdp")


def test_a_fresh_ledger_has_spent_nothing(tmp_path):
    record = Ledger(tmp_path)
    assert (record.events, record.last_round, record.spent(1)) == ({}, 0, {})
    assert not list(tmp_path.iterdir())


def test_spend_is_on_disk_when_the_call_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    record = Ledger(tmp_path)
    record.spend(1, {0: LIGHT}, **TERMS)
    one = (tmp_path / "privacy.jsonl").stat().st_size
    record.spend(2, {0: LIGHT}, **TERMS)
    assert synced == [one, 2 * one]  # all of it had left the program's buffers


DAMAGE = {
    "cut in a line": (lambda text: text[:-20], 3),
    "cut at the end of a line": (lambda text: text[:-1], 3),
    "an edited mechanism": (lambda text: text.replace(b"poisson_subsampled_gaussian", b"laplace", 1), 1),
    "other neighbours": (lambda text: text.replace(b"add_or_remove_one", b"replace_one", 1), 1),
    "no JSON": (lambda text: text + b"not json\n", 4),
    "no object": (lambda text: text + b"[1]\n", 4),
    "an empty line": (lambda text: b"\n" + text, 1),
    "no UTF-8": (lambda text: text + b"\xff\xfe\n", 4),
    "nested without end": (lambda text: text + b"[" * 100_000 + b"\n", 4),
}


@pytest.mark.parametrize(("damage", "line"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_record_is_refused_with_the_line(damage, line, tmp_path):
    two_rounds(tmp_path)
    file = tmp_path / "privacy.jsonl"
    file.write_bytes(damage(file.read_bytes()))
    for use in (replay, epsilon_of, lambda _: Ledger(tmp_path)):
        with pytest.raises(UserError, match=f"^{file}:{line}: "):
            use(file)


@pytest.mark.parametrize(
    "edit",
    [
        *({"steps": v} for v in (2.5, -1, "5", None, True)),
        *({"noise_multiplier": v} for v in (0, -1.0, "x", None, float("nan"), float("inf"), 10**400)),
        *({"sample_rate": v} for v in (0.0, 1.5, [1])),
        *({"clip_norm": v} for v in (0.0, float("inf"))),
        *({"client": v} for v in (-1, 1.5, "0", None, True, [0])),
        *({"round": v} for v in (-1, 1.5, "0", None)),
    ],
    ids=str,
)
def test_an_edited_value_is_refused_with_the_line(edit, tmp_path):
    with pytest.raises(UserError, match=r"privacy\.jsonl:2: .*damaged$"):
        replay(write(tmp_path, WHOLE, {**WHOLE, **edit}))


@pytest.mark.parametrize("key", ["round", "client", "noise_multiplier", "sample_rate", "steps", "clip_norm"])
def test_a_missing_key_is_refused_by_name(key, tmp_path):
    with pytest.raises(UserError, match=rf"privacy\.jsonl:1: lacks or garbles '{key}'"):
        replay(write(tmp_path, {k: v for k, v in WHOLE.items() if k != key}))


TERMS_EDITED = [*({"delta": v} for v in (1e-6, 2.0, "x", None)), {"accountant": "gdp"}, {"accountant": ["pld"]}]


@pytest.mark.parametrize("edit", TERMS_EDITED, ids=str)
def test_terms_that_change_or_are_damaged_have_no_epsilon(edit, tmp_path):
    with pytest.raises(UserError, match=r"privacy\.jsonl:2: delta or accountant"):
        epsilon_of(write(tmp_path, WHOLE, {**WHOLE, **edit}))
    if edit != {"delta": 1e-6}:
        with pytest.raises(UserError, match=r"privacy\.jsonl:1: delta or accountant"):
            epsilon_of(write(tmp_path, {**WHOLE, **edit}))


def test_a_missing_file_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read: No such file"):
        replay(tmp_path / "none.jsonl")


def test_forgetting_drops_measurements_and_never_spend(tmp_path):
    record = two_rounds(tmp_path)
    for round in (1, 2, 3):
        record.clients([{"round": round, "client": 0}, {"round": round, "client": 1}])
        record.metrics({"round": round, "loss": None})
    before = (tmp_path / "privacy.jsonl").read_bytes()

    record.forget_after(1)

    assert ledger.read(tmp_path / "clients.jsonl") == [{"round": 1, "client": 0}, {"round": 1, "client": 1}]
    assert ledger.read(tmp_path / "metrics.jsonl") == [{"round": 1, "loss": None}]
    assert (tmp_path / "privacy.jsonl").read_bytes() == before and record.last_round == 2
    record.metrics({"round": 2, "loss": 1.0})
    assert [line["round"] for line in ledger.read(tmp_path / "metrics.jsonl")] == [1, 2]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".jsonl"] * 3


def test_forgetting_where_nothing_was_measured_makes_no_files(tmp_path):
    Ledger(tmp_path).forget_after(0)
    assert not list(tmp_path.iterdir())


SPENT = st.tuples(st.integers(0, 3), st.floats(0.1, 9), st.floats(0.01, 1), st.integers(0, 9))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(SPENT, max_size=5))
def test_any_history_survives_the_file(tmp_path, history):
    (tmp_path / "privacy.jsonl").unlink(missing_ok=True)
    record = Ledger(tmp_path)
    for round, (client, noise, rate, steps) in enumerate(history, 1):
        one = Event(noise_multiplier=noise, sample_rate=rate, steps=steps, clip_norm=1.0)
        record.spend(round, {client: one}, **TERMS)
    assert Ledger(tmp_path).events == record.events
    assert sum(map(len, record.events.values())) == len(history)


LINES = st.binary(max_size=40) | st.sampled_from([*WHOLE]).flatmap(
    lambda key: st.sampled_from([None, -1, 0.5, 1e400, 10**400, "x", [], {}, True]).map(
        lambda value: json.dumps({**WHOLE, key: value}).encode()
    )
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(st.lists(LINES | st.just(json.dumps(WHOLE).encode()), max_size=3), st.sampled_from([b"\n", b""]))
def test_any_bytes_give_events_or_the_users_error(tmp_path, lines, end):
    file = tmp_path / "privacy.jsonl"
    file.write_bytes(b"\n".join(lines) + end)
    for use in (replay, epsilon_of, lambda _: Ledger(tmp_path)):
        try:
            use(file)
        except UserError as error:
            assert str(error).startswith(f"{file}:")
