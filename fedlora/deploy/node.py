"""A site's side of a run: introduce, account, train. It knows no sockets and no processes.

What a site says to the server when it refuses is fit for the server's eyes; what is wrong with the site's own
data stands in the site's log. It is a function of the message, of the site file and of how many rows the site
has: nothing that a server can choose makes it depend on what is in them.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from fedlora import prepare, wire, wire_base
from fedlora.adapter import Instruction
from fedlora.deploy import admission, cutting, ending, figures, history, loading, personal, surveyed
from fedlora.deploy import site as sites
from fedlora.deploy.account import Account, pay
from fedlora.deploy.history import History
from fedlora.deploy.masks import Masks
from fedlora.deploy.serving import Serving, Words
from fedlora.deploy.site import Site
from fedlora.deploy.state import State
from fedlora.engine.roster import BEHIND, STRANGER
from fedlora.errors import ContractError, Refusal, SettingError, UserError
from fedlora.privacy import lock
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms.central import WITHIN
from fedlora.scenario import Scenario

logger = logging.getLogger(__name__)

RUNS = 2  # that models are loaded for at once; a further one takes the place of the one asked for longest ago
_WAIT = 10.0  # seconds that a worker before this one may take to end


class Node:
    """One site, or in Flower's own simulation all of them.

    Attributes:
        served: rounds that were trained and sent.
        failed: rounds that were not.
        trained: seconds that the last of them trained.
        repeated: answers that were given again.
        history: of what was asked; None where no site file says where.
    """

    def __init__(self, where: Path, app: Path) -> None:
        """A node that serves nothing yet.

        Args:
            where: the site file; in Flower's simulation a folder, and clients hold the scenario's partitions.
            app: of the Flower app, with the code that came with the run.

        Raises:
            UserError: the site file is wrong, the site's ledger is damaged, or another worker has its state
                folder.
        """
        self.file, self.app = where, app
        self.site: Site | None = None
        self.history: History | None = None
        self._signers: dict[str, str] = {}  # by run
        self._ended: list[str] = []  # runs whose adapter came, and was not trained further yet
        self.account: Account | None = None
        self._lock: lock.Lock | None = None
        self._runs: dict[str, Serving] = {}  # that a model is loaded for, the last that was asked for last
        self.state, self.masks, self._counts = State(where), Masks(), surveyed.Counts()
        self._read_site()
        self.served, self.failed, self.trained, self.repeated = 0, 0, 0.0, 0

    def _read_site(self) -> None:
        """Read the site file, which may have changed since the last run."""
        if self.file.is_dir():
            return
        before, self.site = self.site, sites.load(self.file)
        self.state = State(self.site.folder)
        self.state.folder.mkdir(parents=True, exist_ok=True)
        if self.site != before:
            self._runs, self.account = {}, None
            self._lock = lock.hold(self.state.folder / "lock", _WAIT)
            self.history = History(self.state.folder)
        if self.site.privacy is not None and self.account is None:
            self.account = Account(self.state.folder / "ledger", self.site.privacy)

    def close(self) -> None:
        """Let the model, the ledgers and the state folder go."""
        self._runs, self.account, self._lock, self.history = {}, None, None, None

    @property
    def run(self) -> Serving | None:
        """The run that was asked for last, of those that a model is loaded for."""
        return next(reversed(self._runs.values()), None)

    def _serving(self, key: str) -> Serving | None:
        """A run that a model is loaded for, which is then the one that was asked for last."""
        if (run := self._runs.pop(key, None)) is not None:
            self._runs[key] = run
        return run

    @property
    def epsilon(self) -> float | None:
        """What the site's examples have lost in all runs together; None where it keeps no account."""
        return None if self.account is None else self.account.epsilon

    def answer(self, kind: str, content: RecordDict, partition: int) -> RecordDict:
        """Do what a message asks for.

        Args:
            kind: `query` and what may follow it, `train` or `evaluate`.
            content: of the message.
            partition: which client this is, where no site file says.
        """
        survey = kind == f"query.{wire.SURVEY}"
        if kind == "query" or survey:
            self._read_site()
        client = partition if self.site is None else self.site.client
        began = time.perf_counter()
        seen: dict[str, Any] = {"client": client, "kind": kind}
        words: Words = {}
        repeated = self.repeated
        try:
            with _understood():
                words = wire.unpack_words(content)
            if kind == "query":
                made = self._introduce(words, client, content)
            elif survey:
                made = self._survey(words, client)
            else:
                run = self._resumed(words, client)
                rounds = run.worker.scenario.rounds
                if kind == f"query.{wire.END}":
                    made = self._end(run, words, content, client)
                    self._record(kind, words, seen, history.ANSWERED)
                    return made
                if kind.startswith("query.") and kind != f"query.{wire_base.STATISTIC}":
                    least = int(run.worker.scenario.statistics is None)
                    with _understood():
                        wire.unpack_parts(content)
                        seen["round"] = wire.whole(words.get("round"), "round", least, rounds)
                    return self.masks.exchange(run, kind.partition(".")[2], content, seen["round"])
                if kind.startswith("query."):
                    made = cutting.answer(run, client, content, self.masks)
                else:
                    made = self._asked(kind, run, words, content, client, seen)
        except Refusal as error:
            self.failed += kind == "train"
            logger.warning("refused: %s", error, extra=seen)
            self._record(kind, words, seen, history.REFUSED, error.own)
            spent = {} if error.event is None else {"privacy": error.event.to_json()}
            who = {"client": client, "name": self.site.name} if kind == "query" and self.site else {}
            made = wire.pack_words({"refused": str(error), **spent, **who})
            self._tell_spent(made, kind, words, client)
            return made
        except Exception as error:
            self._record(kind, words, seen, history.FAILED, type(error).__name__)  # its words may be of a row
            raise
        self._record(kind, words, seen, history.AGAIN if self.repeated > repeated else history.ANSWERED)
        self._tell_spent(made, kind, words, client)
        self.served += kind == "train"
        if kind == "train":
            seen["trained"] = round(self.trained, 3)
        seen |= {"seconds": round(time.perf_counter() - began, 3), "epsilon": self.epsilon}
        logger.info("answered", extra=seen)
        return made

    def _asked(
        self, kind: str, run: Serving, words: Words, content: RecordDict, client: int, seen: dict[str, Any]
    ) -> RecordDict:
        """Train, or judge, as an instruction says.

        Raises:
            Refusal: the message is wrong, or what it asks for cannot be.
        """
        worker = run.worker
        with _understood():
            instruction = wire.unpack_instruction(
                content, worker.task.layout, worker.scenario.rounds, worker.strategy.trips
            )
            merged = wire.whole(words.get("merged", 0), "merged", 0, worker.scenario.rounds)
        seen["round"] = instruction.round
        run = self._caught_up(run, content, merged, client)
        if kind == "train":
            return self._train(run, instruction, content, client)
        return figures.judge(self.site, self.account, self.state, run, instruction, client)

    def afterwards(self) -> None:
        """What the site does for itself alone once its answer has gone, so that nobody waits for it."""
        while self._ended:
            key = self._ended.pop()
            self._runs.pop(key, None)  # its ledger and its memory: it is loaded with the merges of what was kept
            if self.site is not None and self.account is not None and self.history is not None:
                personal.at_the_end(self.file, self.site, self.account, self.history, key)

    def _tell_spent(self, made: RecordDict, kind: str, words: Words, client: int) -> None:
        """Say beside an answer what the examples lost in the run, so that the server's ledger says no less."""
        run = self._serving(str(words.get("run")))
        if kind == "train" and run is not None and run.worker.scenario.example_privacy is not None:
            wire.add_words(made, {"spent": [event.to_json() for event in run.spent(client)]})

    def _record(self, kind: str, words: Words, seen: dict[str, Any], outcome: str, why: str | None = None) -> None:
        """A line for the owner of what was asked."""
        if self.history is None:
            return
        known = history.known(kind, words, self._runs, self.state, seen["client"])
        signer = self._signers.get(str(known["run"]))
        more = {"round": seen.get("round"), "submitter": signer, "epsilon_site": self.epsilon, "why": why}
        self.history.write(history.WHAT.get(kind, kind), outcome, **known, **more)

    # Introductions.

    def _introduce(self, words: Words, client: int, content: RecordDict) -> RecordDict:
        """Say who this is, when everything is ready to train.

        Raises:
            Refusal: the run and the site do not go together.
        """
        scenario = self._acceptable(words, client)
        run = self._serving(str(words["run"]))
        if run is None or {**run.words, "signature": None} != {**words, "signature": None}:
            run = self._load(words, client, content=content)
        for what, mine, theirs in (
            ("base model", run.worker.base_fingerprint(), words["base"]),
            ("first adapter", run.worker.describe().fingerprint, words["adapter"]),
        ):
            if mine != theirs and not len(run.merges):
                del self._runs[run.key]
                raise Refusal(
                    f"its {what} is another than the server's ({mine[:8]} here, {str(theirs)[:8]} there): install "
                    f"the same weights of {scenario.model.base} and the same torch on both sides"
                )
        self.state.keep(words)
        held = run.worker.dataset.units(client)  # its event tells it too: q = batch_size / n
        event = run.event(Instruction(round=1, adapter={}, train=(), send=()), client)
        return wire.pack_words(
            {
                "client": client,
                "name": self.site.name if self.site else f"partition-{client}",
                "version": version("fedlora"),
                "time": time.time(),
                "num_examples": held,
                "event": None if event is None else event.to_json(),
                "receive": self.site.receive if self.site else None,
                "figures": figures.noise(self.site, run),
            }
        )

    def _acceptable(self, words: Words, client: int) -> Scenario:
        """As `admission.admitted`, and who signed the run is known from then on.

        Raises:
            Refusal: the site's rules do not allow the run.
        """
        scenario, signer = admission.admitted(self.site, self.state, self.app, words, client)
        if signer is not None:
            self._signers[str(words["run"])] = signer
        return scenario

    def _survey(self, words: Words, client: int) -> RecordDict:
        """Noised counts of the rows, for whoever may submit a run.

        Raises:
            Refusal: the site's rules or budget do not allow it, or its rows cannot be read.
        """
        key = admission.named(words)
        if self.site is None:
            raise Refusal("it answers no survey: it has no site file")
        remedy = "survey: ask by fedlora survey --key FILE"
        if (signer := admission.signed(self.site, self.app, words, surveyed.ASKED, remedy)) is not None:
            self._signers[key] = signer
        try:
            return wire.pack_words(surveyed.answer(self.site, self.account, self.state, key, self._counts))
        except (SettingError, UserError, OSError) as error:
            shown = sites.located(self.file, error) if isinstance(error, SettingError) else error
            logger.error("%s", shown, extra={"client": client})
            raise Refusal("its rows or its ledger cannot be read: its log says why", own=str(shown)) from error

    def _load(
        self, words: Words, client: int, merged: int | None = None, content: RecordDict | None = None
    ) -> Serving:
        """Be a worker of a run, with its ledger, and with the merges that are kept here.

        Args:
            words: of the introduction.
            client: which client this is.
            merged: how many merges to keep; by default all.
            content: of the message that it came in; None: it is kept here.

        Raises:
            Refusal: the data do not fit; the log says how.
        """
        key = str(words["run"])
        self._runs.pop(key, None)
        self._runs = {other: run for other, run in self._runs.items() if not run.ended}
        while len(self._runs) >= RUNS:
            self._runs.pop(next(iter(self._runs)))  # the one that was asked for longest ago
        told = (self.file, self.app, self.site, self.state, words, client)
        run = loading.load(*told, lambda *spent: self._pay(key, *spent), merged, content)
        figures.admit(self.site, self.account, run)
        self._runs[key] = run
        return run

    def _resumed(self, told: Words, client: int) -> Serving:
        """The run that a message is about; loaded again if this process was not the one that met it.

        Raises:
            Refusal: no introduction of it is kept here.
        """
        key = str(told.get("run"))[:100]
        if (run := self._serving(key)) is not None:
            return run
        if (words := self.state.introduction(key)) is None:
            raise Refusal(f"{STRANGER}: it knows nothing of the run {key}")
        self._acceptable(words, client)  # the site file, or the app, may be another by now
        return self._load(words, client)

    # Rounds.

    def _caught_up(self, run: Serving, content: RecordDict, count: int, client: int) -> Serving:
        """The run with the merges that its server has: those that came with the message, and none beyond.

        Raises:
            Refusal: some in between are missing, or the run merges nothing.
        """
        with _understood():
            came = wire.unpack_merges(content, run.worker.task.weights)
        if (came or count) and not run.merges_now:
            raise Refusal("the server sends what is merged into the base, and the run has no such thing")
        if len(run.merges) > count:  # the server fell behind: it lost a round
            run = self._load(run.words, client, merged=count)
        for number, change in sorted(came.items()):
            if number == len(run.merges) < count:
                run.worker.merge(run.merges.append(change))
        if len(run.merges) < count:
            raise Refusal(f"{BEHIND}: it has {len(run.merges)} of {count}")
        return run

    def _train(self, run: Serving, instruction: Instruction, content: RecordDict, client: int) -> RecordDict:
        """Train, which pays first; where the scenario says so, mask what is sent.

        Asked again what it has paid for and answered, it answers as before.

        Raises:
            Refusal: the site cannot afford it, holds no masks, would add less noise than was promised, or
                training failed.
        """
        scenario, run.ended = run.worker.scenario, False
        masked = scenario.secure_aggregation is not None
        if masked:
            self.masks.member(run.key, instruction.round)
        if (asked := scenario.client_privacy) and (whole := prepare.central(scenario, root=0)):
            try:
                whole.check_words(instruction.config, asked.clip_norm)
            except ContractError as error:
                raise Refusal(str(error)) from error
        with _understood():
            run.check(instruction)
            expected = run.event(instruction, client) if instruction.trip == 1 else None
        question = run.answers.question(instruction, client, len(run.merges), expected)
        if run.keeps and (before := run.answers.find(instruction.trip, question)) is not None:
            self.repeated += 1
            logger.info("asked again: answered as before", extra={"client": client, "round": instruction.round})
            made = self._masked(run, instruction, content, client, before) if masked else wire.from_bytes(before)
            wire.add_words(made, {"again": True})
            return made
        update, report = run.worker.fit(instruction, client)
        event, self.trained = report.event, report.seconds
        if self.site is not None and instruction.trip == 1:
            run.ledger.metrics(run.line(report, instruction.round, client))
        if update is None:
            logger.error("%s", report.error, extra={"client": client, "round": instruction.round})
            sort = str(report.error).partition(":")[0]  # the rest may be words of a row
            raise Refusal(
                "training failed: its log says why", event, f"training failed ({sort}): site.log says more"
            )
        if self.site is not None and not self.site.accept.metrics:
            update = replace(update, metrics={k: v for k, v in update.metrics.items() if k == WITHIN})
        packing = None if masked else run.worker.transport.packing_up(instruction, client)
        answer = wire.pack_update(update, event, packing)
        if run.keeps:
            try:
                run.answers.keep(instruction.trip, question, wire.to_bytes(answer))
            except OSError as error:
                logger.warning("its answer cannot be kept, in case it is lost: %s", error.strerror or error)
        return self._masked(run, instruction, content, client, wire.to_bytes(answer)) if masked else answer

    def _masked(
        self, run: Serving, instruction: Instruction, content: RecordDict, client: int, answer: bytes
    ) -> RecordDict:
        """An answer with its update masked."""
        told = wire.from_bytes(answer)
        update = run.worker.transport.arrived(wire.unpack_update(told, client), instruction)
        return self.masks.update(run, content, instruction, update, wire.unpack_event(told))

    def _end(self, run: Serving, words: Words, content: RecordDict, client: int) -> RecordDict:
        """Take in that a run has ended, and its adapter where the site file asks for it.

        Raises:
            Refusal: the message is wrong, or the adapter cannot be written.
        """
        with _understood():
            merged = wire.whole(words.get("merged", 0), "merged", 0, run.worker.scenario.rounds)
        if self.site is not None and self.site.receive is not None:
            run = self._caught_up(run, content, merged, client)
        try:
            with _understood():
                made = ending.end(run, self.site, self.state.of_run(run.key), content, client)
        except OSError as error:
            logger.error("%s", error, extra={"client": client, "run": run.key})
            raise Refusal("the adapter cannot be written: its log says why", own=str(error)) from error
        run.ended = True
        if self.site is not None and self.site.personalise is not None and wire.ARRAYS in content.array_records:
            self._ended.append(run.key)
        self.masks.forget(run.key)
        return made

    def _pay(self, key: str, round: int, client: int, event: Event) -> int:
        """As `fedlora.deploy.account.pay`.

        Raises:
            Refusal: it would, or cannot be written.
        """
        if (run := self._runs.get(key)) is None:
            raise Refusal("it serves another run by now")
        return pay(run, self.account, round, client, event)


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """What a message holds is read here; what is wrong with it is for its sender."""
    try:
        yield
    except ContractError as error:
        raise Refusal(str(error)) from error
