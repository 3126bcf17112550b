"""After whatever befell a site's state, a restore by honest words counts no less than was spent."""

import os
import random
import shutil
from dataclasses import dataclass, field

import pytest

from fedlora.deploy.backup import backup
from fedlora.deploy.lost import lines_of
from fedlora.deploy.restoring import restore
from fedlora.deploy.state import State
from fedlora.errors import UserError
from fedlora.privacy.accounting import Event, epsilon
from fedlora.privacy.ledger import Ledger
from tests.deploy.test_backup import EVENT, TERMS, introduce, lose, pay, personalise

RUNS, PROMISED = "ab", 6  # rounds
ACCOUNT = "ledger/privacy.jsonl"
PROMISE = {"epsilon": epsilon([EVENT] * PROMISED, 1e-5, "rdp"), "delta": 1e-5, "accountant": "rdp"}
SCENARIO = {
    "name": "t",
    "model": {"base": "x"},
    "data": {"files": {"train": "a.csv", "text": "text", "label": "label"}},
    "clients": {"total": 10, "use": "dp_sgd", "local_steps": 1, "batch_size": 8},
    "rounds": 10,
    "privacy": PROMISE,
}


@dataclass(eq=False)
class Paid:
    """What was really spent, and which ledgers of the state say so."""

    run: str
    round: int  # 0: personalised
    steps: int
    where: set[str] = field(default_factory=set)  # "ledger" and the run's name


class World:
    """A site's owner, who knows all that happened, and a submitter."""

    def __init__(self, at, seed):
        self.at, self.state, self.file = at, at / "state", at / "site.yaml"
        self.choose, self.paid, self.kept, self.said = random.Random(seed), [], [], []
        self.file.write_text(
            f"name: s\nclient: 0\nstate: {self.state}\ndata: {{train: a.csv, labels: [x, y]}}\n"
            "privacy: {max_epsilon: 900, delta: 1.0e-5, accountant: rdp}\n"
        )
        self.state.mkdir()

    def steps(self, name):
        return sum(Event.from_json(line).steps for line in lines_of(self.state / name))

    def up(self):
        self.state.mkdir(exist_ok=True)
        if not (key := self.state / "held.key").exists():
            key.write_bytes(os.urandom(32))

    def train(self):
        """A round, the next or the first again, within the promise that the run's ledger holds it to."""
        run, last = self.choose.choice(RUNS), 0
        if State(self.state).forgotten(run):
            return
        if self.steps(f"runs/{run}/privacy.jsonl") + EVENT.steps > PROMISED * EVENT.steps:
            return
        self.up()
        last = max((one.round for one in self.paid if one.run == run), default=0)
        round = self.choose.choice([1, last + 1, last + 1])
        pay(self.state, run, round)
        introduce(self.state, run, SCENARIO)
        self.paid.append(Paid(run, round, EVENT.steps, {"ledger", run}))

    def further(self):
        run, steps = self.choose.choice(RUNS), self.choose.choice([5, 50])
        if State(self.state).introduction(run) is None:
            return
        self.up()
        (self.state / "ledger").mkdir(exist_ok=True)
        personalise(self.state, steps, run)
        self.paid.append(Paid(run, 0, steps, {"ledger"}))

    def forget(self):
        if (self.state / "runs" / (run := self.choose.choice(RUNS))).is_dir():
            State(self.state).forget(run)

    def keep(self):
        """A backup; where something stands in no ledger a restore comes first."""
        if self.state.is_dir() and all(one.where for one in self.paid):
            made = self.at / f"kept-{len(self.kept)}"
            backup(self.file, made)
            self.kept.append((made, {one: set(one.where) for one in self.paid}))

    def lose(self):
        gone = self.choose.choice([("ledger",), ("a",), ("b",), ("ledger", "a"), ("ledger", *RUNS), None])
        if gone is None:
            shutil.rmtree(self.state, ignore_errors=True)
        else:
            lose(self.state, *gone)
        for one in self.paid:
            one.where -= set(("ledger", *RUNS) if gone is None else gone)

    def words(self, then):
        """What an owner may say in honesty of what stands in no ledger, of the state or the backup."""
        gone = [one for one in self.paid if not one.where | then.get(one, set())]
        rounds = {run: sum(one.run == run and one.round > 0 for one in gone) for run in RUNS}
        further = sum(one.steps for one in gone if not one.round)
        told = []
        for run, count in rounds.items():
            mine = [one for one in self.paid if one.run == run and one.round]
            known = any({run} & (one.where | then.get(one, set())) for one in mine)
            how = self.choose.choice(["rounds", "file", "all"])
            left = PROMISED - sum(run in then.get(one, ()) for one in mine)
            if count and how == "all" and known and count <= left and not State(self.state).forgotten(run):
                told.append(f"{run}=all")
            elif count and known and how == "rounds":
                told.append(f"{run}={count}")
            elif count:
                told.append(f"{run}={self.submitted(run, mine)}")
        return told or ["none"], further

    def submitted(self, run, mine):
        """The submitter's ledger, which may lack the last round."""
        (folder := self.at / f"submitted-{len(list(self.at.iterdir()))}").mkdir()
        book = Ledger(folder)
        for one in mine[:-1] if len(mine) > 1 and self.choose.random() < 0.5 else mine:
            book.spend(one.round, {0: EVENT}, **TERMS)
        return folder / "privacy.jsonl"

    def restore(self):
        """By no word if none is asked for, else by honest ones; gives whether the account is closed."""
        if not self.kept:
            return False
        made, then = self.choose.choice([*self.kept, self.kept[-1]])
        told, further = self.words(then)
        try:
            done = restore(self.file, made, merge=True)
            told = []
        except UserError as error:
            assert "nobody here can say" in str(error)
            try:
                if self.choose.random() < 0.1:
                    told = ["all"]
                done = restore(self.file, made, lost=told, merge=True, personalised=further)
            except UserError as error:
                assert any(word in str(error) for word in ("promised no epsilon", "no run is known by whose"))
                return False
        for one in self.paid:
            one.where |= {"ledger"} | then.get(one, set())
        self.said.append((made.name, told, further, done.lines()))
        spent = sum(one.steps for one in self.paid)
        assert done.closed or self.steps(ACCOUNT) >= spent, (told, further, self.said)
        return done.closed


@pytest.mark.parametrize("seed", range(12))
def test_the_account_is_never_below_what_was_spent(tmp_path, seed):
    world = World(tmp_path, seed)
    does = [world.train] * 5 + [world.further, world.forget, world.keep, world.keep, world.lose, world.restore]
    for act in [world.train, world.keep, *world.choose.choices(does, k=20), world.restore]:
        world.said.append(act.__name__)
        if act():
            return
