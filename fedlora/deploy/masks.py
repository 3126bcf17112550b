"""A site's part in secure aggregation: its secrets are in memory alone, for one round of each run."""

from collections import Counter

from flwr.app import RecordDict

from fedlora import wire
from fedlora.adapter import Instruction, Update
from fedlora.deploy.serving import Serving
from fedlora.engine.secure import to_vector
from fedlora.errors import ContractError, Refusal
from fedlora.privacy import secure
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
        client: int,
        trained: tuple[Instruction, Update] | None = None,
    ) -> RecordDict:
        """The site's part in an exchange.

        Raises:
            Refusal: it holds no secrets of this round, or the server asks for what would show its update.
        """
        scenario, parts = run.worker.scenario, wire.unpack_parts(content)
        asked, most = scenario.secure_aggregation, scenario.most_members
        if asked is None or what not in (secure.KEYS, secure.SHARES, secure.MASKED, secure.REVEAL):
            raise Refusal(f"this run has no exchange of {what}")
        round = trained[0].round if trained else wire.unpack_words(content).get("round")
        if what == secure.REVEAL:
            run.answers.forget()
        if what == secure.KEYS:
            self._members[run.key] = (round, self._fresh(run, round, parts))
        member = self.member(run.key, round)

        def vector(among: int) -> Vector:
            if trained is None:
                raise ContractError("the server asks for a masked change, and for no training")
            return to_vector(*trained, among, most, asked.range, lambda _: Stream.fresh())

        before = member.masked
        try:
            return wire.pack_parts(member.answer(what, parts, vector, asked.survivors, most))
        except ContractError as error:
            raise Refusal(str(error), None if trained is None else run.event(trained[0], client)) from error
        finally:
            self._masked[run.key, round] += member.masked - before

    def _fresh(self, run: Serving, round: object, parts: secure.Parts) -> Member:
        """Secrets for a round, under the pseudonym that the server assigns.

        Raises:
            Refusal: an update of that round was masked already, as often as the scenario tries one; or there is
                no such round, or the server assigns no pseudonym.
        """
        scenario, names = run.worker.scenario, list(parts["you"])
        if type(round) is not int or not 1 <= round <= scenario.rounds or len(names) != 1 or names[0] >= 2**63:
            raise Refusal("the server asks for keys for no round of this run, or for nobody")
        if self._masked[run.key, round] > scenario.clients.retries:
            raise Refusal(
                f"it has masked its update of round {round}: restart its worker if the server was resumed"
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
