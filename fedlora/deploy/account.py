"""A site's own account: what its examples, or persons, have lost in all runs together, and the most they may."""

import logging
from pathlib import Path
from typing import Any

from fedlora.deploy.serving import Serving
from fedlora.deploy.site import Budget
from fedlora.errors import Refusal, UserError
from fedlora.privacy.accounting import Event, adds, alike, alone, epsilon, in_sums
from fedlora.privacy.ledger import Ledger, Own, read
from fedlora.privacy.noise import fresh_key
from fedlora.privacy.wording import protected

STATISTIC = "statistic"  # word of a line that a statistic cost: of which kind it was

logger = logging.getLogger(__name__)


class Account:
    """What the site's examples have lost, and the most that they may lose."""

    def __init__(self, folder: Path, terms: Budget) -> None:
        """An account whose ledger is in a folder.

        Args:
            folder: of the ledger, which is made where it is missing.
            terms: of the site file.

        Raises:
            UserError: the ledger is damaged.
        """
        folder.mkdir(exist_ok=True)
        self.terms, self.ledger, file = terms, Ledger(folder), folder / "privacy.jsonl"
        unit = "example" if terms.person is None else "person"
        kept = read(file, torn=True) if file.exists() else []
        if any(line["unit"] != unit or line.get("person") != terms.person for line in kept):
            raise UserError(
                f"{file}: is the account of others than each {protected(unit, terms.person)}: what one says of "
                "the other is no bound; leave privacy.person as it was, and a renamed column too, or name another "
                "state folder for rows that no run has seen"
            )
        self.closed = any(line.get("closed") for line in kept)  # a restore could not know what was spent

    @property
    def epsilon(self) -> float:
        """Of all runs together."""
        return epsilon(self.events, self.terms.delta, self.terms.accountant)

    @property
    def events(self) -> tuple[Event, ...]:
        """All that was paid for."""
        return self.ledger.events.get(Own(), ())

    def paid(self, run: str) -> set[int]:
        """The rounds that were paid for under a name; 0 is what is no round, and no statistic."""
        return {line["round"] for line in self._lines(run) if STATISTIC not in line}

    def measured(self, run: str) -> bool:
        """Whether a statistic of the rows was paid for under a name."""
        return any(STATISTIC in line for line in self._lines(run))

    def _lines(self, run: str) -> list[dict[str, Any]]:
        file = self.ledger.folder / "privacy.jsonl"
        return [line for line in (read(file, torn=True) if file.exists() else []) if line.get("run") == run]

    def spend(self, run: str, round: int, client: int, event: Event, **more: Any) -> None:
        """Write an event into the ledger.

        Where noise is shared out it counts the site's own part alone, which holds whatever the server and all
        others do. A server that lies can have the others add none.

        Args:
            run: what it is paid for.
            round: of it.
            client: which one the site is.
            event: that is paid.
            more: words of the line.

        Raises:
            Refusal: it would pass what the site allows.
            OSError: it cannot be written.
            UserError: another process writes there too.
        """
        cap, event = self.terms, alone(event)
        if self.closed:
            raise Refusal(
                "another round would pass the epsilon that the site allows over all runs",
                own="its account is closed: it was restored by --lost all, so nobody knows what was spent",
            )
        spent = epsilon([*self.events, event], cap.delta, cap.accountant)
        if spent > cap.max_epsilon * (1 + 1e-9):
            logger.warning("it would come to epsilon %.3f; privacy.max_epsilon: %g", spent, cap.max_epsilon)
            raise Refusal(
                "another round would pass the epsilon that the site allows over all runs",
                own=f"it would come to epsilon {spent:.3f}, and privacy.max_epsilon is {cap.max_epsilon:g}",
            )
        self.ledger.spend(round, {client: event}, **terms_of(cap, run), **more, **begun(self.ledger))


def terms_of(cap: Budget, run: str) -> dict[str, Any]:
    """What each line of an account repeats of it, for what a run cost.

    Args:
        cap: of the account.
        run: its name.
    """
    terms: dict[str, Any] = {
        "delta": cap.delta,
        "unit": "example" if cap.person is None else "person",
        "accountant": cap.accountant,
        "run": run,
    }
    return terms if cap.person is None else {**terms, "person": cap.person}


def begun(book: Ledger) -> dict[str, Any]:
    """What a ledger's first line says beside all else: chance, so that one that begins again is another."""
    return {} if book.position[0] else {"begun": fresh_key()[:8].hex()}


def pay(run: Serving, account: Account | None, round: int, client: int, event: Event) -> int:
    """Write an event into the run's ledger and the site's, unless it would pass what either allows.

    Each run counts its own steps. So the site's account, of all runs, has those of banded noise as independent
    ones: as many as the turns of a group in this run have grown by.

    Returns:
        How many steps the client had paid for in this run before, on the same terms.

    Raises:
        Refusal: it would, or cannot be written.
    """
    scenario = run.worker.scenario
    asked = scenario.example_privacy
    more: dict[str, Any] = {}
    assert asked is not None
    if not round and scenario.statistics is not None:  # before the first
        more = {STATISTIC: scenario.statistics.kind}
    before = run.spent(client)
    paid = epsilon(in_sums([*before, event]), asked.delta, asked.accountant)
    if asked.epsilon is not None and paid > asked.epsilon * (1 + 1e-9):
        raise Refusal(f"another round would make epsilon {paid:.3f}, and {asked.epsilon:g} was promised")
    try:
        if account is not None:
            account.spend(run.key, round, client, adds(before, event), **more)
        run.ledger.spend(round, {client: event}, **scenario.example_terms, **more, **begun(run.ledger))
    except (OSError, UserError) as error:
        logger.error("%s", error, extra={"client": client, "round": round, "run": run.key})
        raise Refusal("its ledger cannot be written: its log says why", own=str(error)) from error
    return alike(before, event)
