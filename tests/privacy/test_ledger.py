import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.errors import UserError
from fedlora.privacy import ledger
from fedlora.privacy.accounting import Event, epsilon
from fedlora.privacy.ledger import Ledger, epsilon_of, replay

TERMS = {"delta": 1e-5, "unit": "example", "accountant": "pld"}
LIGHT = Event(noise_multiplier=2.0, sample_rate=0.1, steps=5, clip_norm=1.0)
TWICE = replace(LIGHT, steps=10)
HEAVY = Event(noise_multiplier=1.0, sample_rate=0.1, steps=5, clip_norm=1.0)
WHOLE = {"round": 1, "client": 0, **LIGHT.to_json(), **TERMS}
WHOLE |= {"mechanism": ledger.MECHANISM, "neighbours": ledger.NEIGHBOURS}


def two_rounds(folder: Path) -> Ledger:
    record = Ledger(folder)
    record.spend(1, {0: LIGHT, 2: HEAVY}, **TERMS)
    record.spend(2, {0: LIGHT}, **TERMS)
    return record


def chained(*lines: dict) -> list[dict]:
    """The lines with the chain that the format promises: a hash over the chain before and the sorted JSON."""
    chain, made = "", []
    for line in lines:
        chain = hashlib.sha256((chain + json.dumps(line, sort_keys=True)).encode()).hexdigest()[:32]
        made.append({**line, "chain": chain})
    return made


def write(folder: Path, *lines: dict) -> Path:
    """A ledger without its head, as one that was copied."""
    file = folder / "privacy.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in chained(*lines)))
    return file


def test_a_line_holds_all_that_epsilon_needs(tmp_path):
    two_rounds(tmp_path)
    lines = ledger.read(tmp_path / "privacy.jsonl")
    assert lines == chained(*[{k: v for k, v in line.items() if k != "chain"} for line in lines])
    assert lines[0] == {**WHOLE, "chain": lines[0]["chain"]}
    assert (tmp_path / "privacy.head").read_text() == f"3 {lines[2]['chain']}\n"
    assert [(line["round"], line["client"]) for line in lines] == [(1, 0), (1, 2), (2, 0)]


def test_what_was_spent_is_read_back_exactly(tmp_path):
    record = two_rounds(tmp_path)
    again = Ledger(tmp_path)
    assert replay(tmp_path / "privacy.jsonl") == {0: [LIGHT, LIGHT], 2: [HEAVY]}
    assert record.events == again.events == {0: (TWICE,), 2: (HEAVY,)}
    assert (again.position, again.spent(1).keys(), again.spent(2).keys(), again.spent(3)) == (
        record.position,
        {0, 2},
        {0},
        {},
    )
    assert again.spent(2)[0] == {(LIGHT, "", 0)}


def test_one_draw_of_the_noise_hides_one_sum(tmp_path):
    """It may be paid for again; for another sum it is refused, and so is a ledger that has it."""
    record = Ledger(tmp_path)
    record.spend(1, {0: LIGHT}, drawn={0: ("a", 0)}, **TERMS)
    record.spend(1, {0: LIGHT}, 1, drawn={0: ("a", 0)}, **TERMS)
    record.spend(1, {0: LIGHT}, 1, drawn={0: ("b", 1)}, **TERMS)
    before = (tmp_path / "privacy.jsonl").read_bytes()
    for on in (record, None):
        if on is None:
            del record
            on = Ledger(tmp_path)
        with pytest.raises(UserError, match="would hide two sums, and no epsilon covers that"):
            on.spend(1, {0: LIGHT}, drawn={0: ("b", 0)}, **TERMS)
    assert (tmp_path / "privacy.jsonl").read_bytes() == before
    lines = [{k: v for k, v in json.loads(line).items() if k != "chain"} for line in before.splitlines()]
    (copy := tmp_path / "copy").mkdir()
    for more in ({**lines[0], "digest": "c"}, {**lines[0], "sharers": 2.0}):
        file = write(copy, *lines, more)
        with pytest.raises(UserError, match=r"privacy.jsonl:4: one draw of the noise"):
            replay(file)
    with pytest.raises(UserError, match="would hide two sums"):
        Ledger(tmp_path).spend(1, {0: replace(LIGHT, sharers=2.0)}, drawn={0: ("a", 0)}, **TERMS)


def test_rounds_that_run_again_are_known_whatever_lines_a_checkpoint_has_seen(tmp_path):
    """Its position counts lines of rounds beyond its own where an earlier life paid for them."""
    record = Ledger(tmp_path)
    for round in (1, 2, 3):
        record.spend(round, {0: LIGHT}, drawn={0: (f"r{round}", 0)}, **TERMS)
    known = record.position
    del record
    again = Ledger(tmp_path, known, 1)
    assert again.drawn(2) == {0: ("r2",)} and again.drawn(3) == {0: ("r3",)} and again.drawn(1) == {}
    assert [again.firsts(round, 0) for round in (2, 3)] == [(5,), (10,)]
    assert again.spent(3)[0] == {(LIGHT, "r3", 0)} and again.spent(1) == {}


def test_what_a_full_disk_did_not_take_was_not_spent_and_the_next_line_follows(tmp_path, largest_file):
    """As at a site, whose worker stays up and may find room again."""
    record = two_rounds(tmp_path)
    before = record.position
    for room in (10, 600):  # the head of 35 bytes does not fit, or half of the next line does
        largest_file(room)
        with pytest.raises(OSError, match="File too large"):
            record.spend(3, {0: HEAVY, 2: HEAVY}, **TERMS)
        largest_file()
        assert record.position == before and record.events == {0: (TWICE,), 2: (HEAVY,)}
    record.spend(3, {0: HEAVY, 2: HEAVY}, **TERMS)
    assert Ledger(tmp_path).events == record.events == {0: (TWICE, HEAVY), 2: (replace(HEAVY, steps=10),)}


def test_a_ledger_that_a_checkpoint_has_not_seen_is_refused(tmp_path):
    lines, chain = two_rounds(tmp_path).position
    assert Ledger(tmp_path, (2, ledger.read(tmp_path / "privacy.jsonl")[1]["chain"])).position == (lines, chain)
    for known in ((4, chain), (2, chain), (1, "")):
        with pytest.raises(UserError, match=f"whose {known[0]} lines it should begin with"):
            Ledger(tmp_path, known)


def test_epsilon_follows_from_the_file_alone(tmp_path):
    two_rounds(tmp_path)
    by_client = [epsilon([LIGHT, LIGHT], 1e-5), epsilon([HEAVY], 1e-5)]
    assert epsilon_of(tmp_path / "privacy.jsonl") == max(by_client) == by_client[1] > by_client[0] > 0
    (tmp_path / "privacy.head").unlink()
    assert epsilon_of(write(tmp_path)) == 0.0
    renyi = write(tmp_path, {**WHOLE, "accountant": "rdp"})
    assert epsilon_of(renyi) == epsilon([LIGHT], 1e-5, "rdp")
    assert epsilon_of(renyi, accountant="prv") == epsilon([LIGHT], 1e-5, "prv")


def test_units_have_an_epsilon_each(tmp_path):
    file = write(tmp_path, WHOLE, {**WHOLE, "unit": "client", "client": None, "delta": 1e-3, **HEAVY.to_json()})
    assert epsilon_of(file) == epsilon([LIGHT], 1e-5)
    assert epsilon_of(file, "client") == epsilon([HEAVY], 1e-3)
    assert replay(file) == {0: [LIGHT], None: [HEAVY]}


def test_a_fresh_ledger_has_spent_nothing(tmp_path):
    record = Ledger(tmp_path)
    assert (record.events, record.position, record.spent(1)) == ({}, (0, ""), {})
    assert not list(tmp_path.iterdir())


def test_spend_is_on_disk_when_the_call_returns(tmp_path, monkeypatch):
    synced = []

    def sync(handle):
        name = os.readlink(f"/proc/self/fd/{handle}")
        synced.append((Path(name).name, os.fstat(handle).st_size))

    monkeypatch.setattr(os, "fsync", sync)
    record = Ledger(tmp_path)
    record.spend(1, {0: LIGHT}, **TERMS)
    one = (tmp_path / "privacy.jsonl").stat().st_size
    record.spend(2, {0: LIGHT}, **TERMS)
    sizes = [size for name, size in synced if name == "privacy.jsonl"]
    assert sizes == [one, 2 * one]  # all of it had left the program's buffers
    heads, line = "privacy.head.part", ("privacy.jsonl", one)
    names = [name for name, _ in synced]
    assert names.index(heads) < synced.index(line) < len(names) - 1 - names[::-1].index(heads)
    assert names.count(tmp_path.name) == 3  # a new file is there when its folder is on disk


DAMAGE = {
    "cut in a line": (lambda text: text[:-20], 3),
    "cut at the end of a line": (lambda text: text[:-1], 3),
    "a line cut off": (lambda text: text[: text[:-1].rindex(b"\n") + 1], 3),
    "all but one line cut off": (lambda text: text[: text.index(b"\n") + 1], 2),
    "emptied": (lambda text: b"", 1),
    "a line taken out": (lambda text: b"".join(text.splitlines(True)[::2]), 2),
    "two lines swapped": (lambda text: b"".join(text.splitlines(True)[i] for i in (1, 0, 2)), 1),
    "a line doubled": (lambda text: b"".join(text.splitlines(True)[i] for i in (0, 0, 1, 2)), 2),
    "more noise": (lambda text: text.replace(b'"noise_multiplier": 1.0', b'"noise_multiplier": 9.0'), 2),
    "fewer steps": (lambda text: text.replace(b'"steps": 5', b'"steps": 1', 1), 1),
    "another delta": (lambda text: text.replace(b'"delta": 1e-05', b'"delta": 0.1', 1), 1),
    "an edited mechanism": (lambda text: text.replace(b"poisson_subsampled_gaussian", b"laplace", 1), 1),
    "other neighbours": (lambda text: text.replace(b"zero_out", b"replace_one", 1), 1),
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
        with pytest.raises(UserError, match=f"^{file}:{line}: ") as caught:
            use(file)
        assert "\n" not in str(caught.value)


def test_a_ledger_that_is_gone_or_has_lost_its_head_is_refused(tmp_path):
    two_rounds(tmp_path)
    (head, file) = (tmp_path / "privacy.head", tmp_path / "privacy.jsonl")
    kept = head.read_text()
    head.unlink()
    with pytest.raises(UserError, match=r"^\S+privacy\.head: is missing"):
        Ledger(tmp_path)
    assert epsilon_of(file) > 0  # of a copy: all that it says holds, and nobody claims that it is all
    head.write_text("x")
    with pytest.raises(UserError, match=r"^\S+privacy\.head: cannot be read"):
        Ledger(tmp_path)
    head.write_text(kept)
    file.unlink()
    with pytest.raises(UserError, match=r"privacy\.jsonl:1: was cut: 0 lines are left of 3"):
        Ledger(tmp_path)


def test_another_runs_ledger_under_this_ones_head_is_refused(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    two_rounds(tmp_path / "one")
    record = Ledger(tmp_path / "other")
    for round in (1, 2, 3):
        record.spend(round, {0: LIGHT}, **TERMS)
    (tmp_path / "other" / "privacy.jsonl").replace(tmp_path / "one" / "privacy.jsonl")
    with pytest.raises(UserError, match=r"privacy\.jsonl:3: is not the line that privacy\.head counts"):
        Ledger(tmp_path / "one")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.floats(0, 1, exclude_max=True))
def test_killed_in_mid_write_is_no_damage_and_the_round_pays_again(tmp_path, share):
    """Whatever part of a round's lines reached the disk before its head, what it paid for comes out the same."""
    for file in tmp_path.iterdir():
        file.unlink()
    two_rounds(tmp_path)
    file, head = tmp_path / "privacy.jsonl", tmp_path / "privacy.head"
    before, counted = file.read_bytes(), head.read_text()
    Ledger(tmp_path).spend(3, {0: HEAVY, 1: LIGHT, 2: LIGHT}, **TERMS)
    whole, last = file.read_bytes(), head.read_text()
    cut = len(before) + int(share * (len(whole) - len(before)))
    file.write_bytes(whole[:cut])
    head.write_text(counted)

    again = Ledger(tmp_path)
    assert set(again.spent(3)) == set(range(whole[:cut].count(b"\n") - 3))
    missing = {c: e for c, e in {0: HEAVY, 1: LIGHT, 2: LIGHT}.items() if c not in again.spent(3)}
    again.spend(3, missing, **TERMS)
    assert file.read_bytes() == whole and head.read_text() == last


@pytest.mark.parametrize(
    "edit",
    [
        *({"steps": v} for v in (2.5, -1, "5", None, True)),
        *({"noise_multiplier": v} for v in (0, -1.0, "x", None, float("nan"), float("inf"), 10**400)),
        *({"sample_rate": v} for v in (0.0, 1.5, [1])),
        *({"clip_norm": v} for v in (0.0, float("inf"))),
        *({"client": v} for v in (-1, 1.5, "0", None, True, [0])),
        *({"round": v} for v in (-1, 1.5, "0", None)),
        *({"unit": v} for v in ("user", None, ["client"])),
    ],
    ids=str,
)
def test_an_edited_value_is_refused_with_the_line(edit, tmp_path):
    with pytest.raises(UserError, match=r"privacy\.jsonl:2: .*damaged$"):
        replay(write(tmp_path, WHOLE, {**WHOLE, **edit}))


@pytest.mark.parametrize("key", [*"round client unit noise_multiplier sample_rate steps clip_norm".split()])
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
    assert (tmp_path / "privacy.jsonl").read_bytes() == before and record.position[0] == 3
    record.metrics({"round": 2, "loss": 1.0})
    assert [line["round"] for line in ledger.read(tmp_path / "metrics.jsonl")] == [1, 2]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".head", *[".jsonl"] * 3]


def test_forgetting_where_nothing_was_measured_makes_no_files(tmp_path):
    Ledger(tmp_path).forget_after(0)
    assert not list(tmp_path.iterdir())


SPENT = st.tuples(st.integers(0, 3), st.floats(0.1, 9), st.floats(0.01, 1), st.integers(0, 9))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(SPENT, max_size=5))
def test_any_history_survives_the_file(tmp_path, history):
    for name in ("privacy.jsonl", "privacy.head"):
        (tmp_path / name).unlink(missing_ok=True)
    record = Ledger(tmp_path)
    for round, (client, noise, rate, steps) in enumerate(history, 1):
        one = Event(noise_multiplier=noise, sample_rate=rate, steps=steps, clip_norm=1.0)
        record.spend(round, {client: one}, **TERMS)
    assert Ledger(tmp_path).events == record.events
    for client, events in replay(tmp_path / "privacy.jsonl").items() if history else ():
        assert sum(e.steps for e in record.events[client]) == sum(e.steps for e in events)
        assert epsilon(record.events[client], 1e-5, "rdp") == epsilon(events, 1e-5, "rdp")


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


def test_a_ledger_of_the_first_release_says_add_or_remove_and_is_read_as_before(tmp_path):
    """The events are the same, and so are the numbers; further lines say zero-out."""
    old = {**WHOLE, "neighbours": "add_or_remove_one"}
    (line,) = chained(old)
    write(tmp_path, old)
    (tmp_path / "privacy.head").write_text(f"1 {line['chain']}\n")
    record = Ledger(tmp_path)
    record.spend(2, {0: LIGHT}, **TERMS)
    assert Ledger(tmp_path).events == {0: (TWICE,)}
    assert [told["neighbours"] for told in ledger.read(tmp_path / "privacy.jsonl")] == [
        "add_or_remove_one",
        "zero_out",
    ]
    assert epsilon_of(tmp_path / "privacy.jsonl") == epsilon([TWICE], 1e-5)


def test_another_relation_than_the_unit_s_is_refused(tmp_path):
    seen = {**WHOLE, "unit": "client_from_server"}
    for line in (seen, {**seen, "neighbours": "add_or_remove_one"}, {**WHOLE, "neighbours": "one_sends_nothing"}):
        with pytest.raises(UserError, match="an event of another mechanism"):
            replay(write(tmp_path, line))


def test_every_holder_of_a_budget_is_of_one_unit():
    of_holders = [unit for unit in ledger.UNITS if unit != "person"]  # which a line says of what a client holds
    assert [ledger.unit(holder) for holder in (3, None, ledger.Whole(3))] == of_holders


WRITE = """
import sys
from pathlib import Path
from fedlora.errors import UserError
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.accounting import Event
try:
    record = Ledger(Path(sys.argv[1]))
    print("open", record.position[0])
    event = Event(noise_multiplier=1.0, sample_rate=0.1, steps=2, clip_norm=1.0)
    record.spend(9, {0: event}, delta=1e-5, unit="example", accountant="pld")
    print("spent")
except UserError as error:
    print(error)
"""


def elsewhere(folder):
    """What another process that would write gets."""
    told = subprocess.run([sys.executable, "-c", WRITE, folder], check=True, capture_output=True, text=True)
    return told.stdout.strip().split("\n")


def test_one_process_writes_and_others_read(tmp_path):
    record = two_rounds(tmp_path)
    file = tmp_path / "privacy.jsonl"
    assert elsewhere(tmp_path) == [
        f"{file}: in use by process {os.getpid()}; stop it (kill {os.getpid()}), or use another folder"
    ]
    reads = "import sys, pathlib; from fedlora.privacy import ledger; ledger.replay(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", reads, file], check=True)
    position = record.position
    del record
    assert elsewhere(tmp_path) == [f"open {position[0]}", "spent"]


def test_of_two_ledgers_of_one_folder_the_second_that_spends_is_refused(tmp_path):
    two_rounds(tmp_path)
    one, other = Ledger(tmp_path), Ledger(tmp_path)
    one.spend(3, {0: LIGHT}, **TERMS)
    before = (tmp_path / "privacy.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(UserError, match=r"privacy\.jsonl: the ledger moved underfoot: somebody else wrote"):
            other.spend(3, {1: LIGHT}, **TERMS)
    assert (tmp_path / "privacy.jsonl").read_bytes() == before
    one.spend(4, {0: LIGHT}, **TERMS)
    assert Ledger(tmp_path).position[0] == 5


def test_a_new_ledger_that_another_process_has_begun_is_refused(tmp_path):
    record = Ledger(tmp_path)
    assert elsewhere(tmp_path) == ["open 0", "spent"]
    with pytest.raises(UserError, match="moved underfoot"):
        record.spend(1, {0: LIGHT}, **TERMS)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_writes_to_no_ledger_of_its_parent(tmp_path):
    record = two_rounds(tmp_path)
    before = (tmp_path / "privacy.jsonl").read_bytes()
    if not (child := os.fork()):
        try:
            record.spend(3, {0: LIGHT}, **TERMS)
        except UserError as error:
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "privacy.jsonl").read_bytes() == before
    record.spend(3, {0: LIGHT}, **TERMS)


@pytest.mark.parametrize(
    "round, holder, attempt",
    [(-1, 0, 0), (True, 0, 0), (1.0, 0, 0), (1, -1, 0), (1, True, 0), (1, "a", 0), (1, 0, -1)],
)
def test_a_line_that_could_not_be_read_again_is_not_written(tmp_path, round, holder, attempt):
    record = two_rounds(tmp_path)
    before = (tmp_path / "privacy.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"privacy\.jsonl:4: lacks or garbles .*; it was not written"):
        record.spend(round, {holder: LIGHT}, attempt, **TERMS)
    assert (tmp_path / "privacy.jsonl").read_bytes() == before and Ledger(tmp_path).events == record.events


def test_a_site_s_account_is_one_whatever_its_number(tmp_path):
    record = Ledger(tmp_path)
    for client in (0, 1, 2):
        record.spend(1, {client: LIGHT}, run=f"run-{client}", **TERMS)
    assert record.events == Ledger(tmp_path).events == {ledger.Own(): (replace(LIGHT, steps=3 * LIGHT.steps),)}
    assert replay(tmp_path / "privacy.jsonl") == {ledger.Own(): [LIGHT] * 3}
    assert epsilon_of(tmp_path / "privacy.jsonl") == epsilon([LIGHT] * 3, TERMS["delta"], TERMS["accountant"])
