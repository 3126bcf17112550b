"""A site's part in secure aggregation: its secrets are in memory alone, for one round of each run."""

from collections import Counter
from collections.abc import Callable

from flwr.app import RecordDict

from fedlora import wire
from fedlora.adapter import Instruction, Update
from fedlora.deploy.serving import Serving
from fedlora.engine.secure import to_vector
from fedlora.errors import ContractError, Refusal
from fedlora.privacy import secure
from fedlora.privacy.accounting import Event
from fedlora.privacy.grid import Vector
from fedlora.privacy.member import Member
from fedlora.privacy.noise import Stream


class Masks:
    """What a node masks, and how often it has. It outlives the models of runs, which give way to each other."""

    def __init__(self) -> None:
        self._members: dict[str, tuple[object, Member]] = {}  # by run, with the round
        self._masked: Counter[tuple[str, object]] = Counter()  # updates by run and round, whatever the server lost

    def exchange(
        self,
        run: Serving,
        what: str,
        content: RecordDict,
        round: object,
        vector: Callable[[int], Vector] | None = None,
    ) -> RecordDict:
        """The site's part in an exchange.

        Args:
            run: that it is about.
            what: the exchange.
            content: of the message.
            round: of the run; 0 is that of a statistic before the first.
            vector: what is to be masked, as one of so many clients; None: the exchange asks for none.

        Raises:
            Refusal: it holds no secrets of this round, or the server asks for what would show its update.
        """
        scenario, parts = run.worker.scenario, wire.unpack_parts(content)
        asked, most = scenario.secure_aggregation, scenario.most_members if round else scenario.clients.total
        if asked is None or what not in (secure.KEYS, secure.SHARES, secure.MASKED, secure.REVEAL):
            raise Refusal(f"this run has no exchange of {what}")
        if what == secure.REVEAL:
            run.answers.forget()
        if what == secure.KEYS:
            self._members[run.key] = (round, self._fresh(run, round, parts))
        member = self.member(run.key, round)

        def none(among: int) -> Vector:
            raise ContractError("the server asks for a masked change, and for no training")

        before = member.masked
        try:
            return wire.pack_parts(member.answer(what, parts, vector or none, asked.survivors, most))
        except ContractError as error:
            raise Refusal(str(error)) from error
        finally:
            self._masked[run.key, round] += member.masked - before

    def update(
        self, run: Serving, content: RecordDict, instruction: Instruction, update: Update, event: Event | None
    ) -> RecordDict:
        """An update under masks, with what it cost.

        Raises:
            Refusal: as `exchange`.
        """
        asked, most = run.worker.scenario.secure_aggregation, run.worker.scenario.most_members
        assert asked is not None

        def vector(among: int) -> Vector:
            return to_vector(instruction, update, among, most, asked.range, lambda _: Stream.fresh())

        try:
            made = self.exchange(run, secure.MASKED, content, instruction.round, vector)
        except Refusal as error:
            raise Refusal(str(error), event) from error
        wire.add_words(made, {} if event is None else {"privacy": event.to_json()})
        return made

    def _fresh(self, run: Serving, round: object, parts: secure.Parts) -> Member:
        """Secrets for a round, under the pseudonym that the server assigns.

        Raises:
            Refusal: an update of that round was masked already, as often as the scenario tries one; or there is
                no such round, or the server assigns no pseudonym.
        """
        scenario, names = run.worker.scenario, list(parts["you"])
        least = int(scenario.statistics is None)
        if type(round) is not int or not least <= round <= scenario.rounds or len(names) != 1 or names[0] >= 2**63:
            raise Refusal("the server asks for keys for no round of this run, or for nobody")
        if self._masked[run.key, round] > scenario.clients.retries:
            raise Refusal(
                f"it has masked what it sends in round {round}: restart its worker if the server was resumed"
            )
        return Member(names[0])

    def member(self, run: str, round: object) -> Member:
        """The site's secrets for a round.

        Raises:
            Refusal: it has none.
        """
        of, member = self._members.get(run, (None, None))
        if member is None or of != round:
            raise Refusal("it has no masks for this round: its worker was restarted, or it was not asked for keys")
        return member

    def forget(self, run: str) -> None:
        """Let the secrets of a run go that has ended."""
        self._members.pop(run, None)
