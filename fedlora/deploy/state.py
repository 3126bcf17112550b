"""A site's state folder, beside its account: its own key, and of each run what it received and sent."""

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlora import seeding
from fedlora.deploy.serving import Serving, Words
from fedlora.errors import Refusal, UserError
from fedlora.privacy.noise import fresh_key
from fedlora.record import INTRODUCTION
from fedlora.scenario import Scenario

RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # a run's name, which is a folder's
_ROWS = "rows"  # which rows a site began a run with, by a digest under its own key
_FORGOTTEN = "forgotten"  # that the owner had it removed
_STAYS = (_FORGOTTEN, "privacy.jsonl", "privacy.head")  # what it spent
SURVEYS = "surveys.json"  # names of surveys, and what each was answered over
JUDGED = "judged.json"  # what a site has said of its own rows in a run, by round

logger = logging.getLogger(__name__)


class State:
    """A site's state folder; in Flower's own simulation that of all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of_run(self, key: str) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / key

    def keep(self, words: Words) -> None:
        """Write an introduction down, so that a restart needs no other, and the scenario for people."""
        file = self.of_run(str(words["run"])) / INTRODUCTION
        file.with_name("scenario.yaml").write_text(Scenario.model_validate(words["scenario"]).to_yaml())
        part = file.with_suffix(".part")
        part.write_text(json.dumps(dict(words)))
        part.replace(file)

    def introduction(self, key: str) -> dict[str, Any] | None:
        """The introduction of a run that is kept here."""
        try:
            if not RUN.fullmatch(key):
                raise ValueError(key)
            words = json.loads((self.of_run(key) / INTRODUCTION).read_text())
        except (OSError, ValueError):
            return None
        return words if isinstance(words, dict) else None

    def runs(self) -> list[str]:
        """The runs that something is kept of, and that are not forgotten."""
        kept = sorted(folder.name for folder in (self.folder / "runs").glob("*") if folder.is_dir())
        return [name for name in kept if not self.forgotten(name)]

    def forgotten(self, key: str) -> bool:
        """Whether the owner had a run forgotten: nothing is answered under its name any more."""
        return (self.of_run(key) / _FORGOTTEN).exists()

    def forget(self, key: str) -> int:
        """Remove what is kept of a run but its ledger; gives how many files went.

        Raises:
            OSError: one cannot be removed; the run is forgotten all the same.
        """
        folder, removed = self.of_run(key), 0
        with (folder / _FORGOTTEN).open("w") as mark:  # first: an interruption must not leave a run half known
            os.fsync(mark.fileno())
        for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif path.relative_to(folder).as_posix() not in _STAYS:
                path.unlink()
                removed += 1
        return removed

    def key(self) -> bytes:
        """The site's own key, from which it draws the rows that it holds out: nobody else can tell which they are.

        Raises:
            UserError: its file is damaged.
        """
        file = self.folder / "held.key"
        if not file.exists():
            part = file.with_suffix(".part")
            part.unlink(missing_ok=True)
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(fresh_key())
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(file)
        if len(key := file.read_bytes()) != 32:
            raise UserError(f"{file}: is damaged; restore it, or remove it to hold other rows out")
        return key

    def check_rows(self, run: Serving, client: int) -> None:
        """Make sure that a run under banded noise goes on over the rows that it began with, in their order.

        A digest of them is kept under the site's own key.

        Raises:
            Refusal: they are others, or nobody knows; the log says so.
        """
        rows = run.worker.dataset.fingerprint
        file, mine = self.of_run(run.key) / _ROWS, seeding.key(self.key(), "rows", rows).hex()
        if not any(event.bands > 1 for spent in run.ledger.events.values() for event in spent):
            part = file.with_suffix(".part")
            part.write_text(mine)
            part.replace(file)
        elif not file.exists() or file.read_text() != mine:
            logger.error(
                "the rows are not those that this run began with, or stand in another order: under privacy.bands "
                "each row has its turn by its place; put them back, or let another run begin",
                extra={"client": client, "run": run.key},
            )
            raise Refusal("its data are not as they were when the run began: its log says why")

    def same_survey(self, name: str, mark: str) -> bool:
        """Whether a survey of a name was answered over nothing else; it is noted where it was not answered at all.

        Args:
            name: of the survey.
            mark: differs where the answer would.
        """
        file = self.folder / SURVEYS
        known: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
        if name not in known:
            part = file.with_suffix(".part")
            part.write_text(json.dumps({**known, name: mark}))
            part.replace(file)
        return known.get(name, mark) == mark

    def judged(self, key: str, round: int, judge: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the site says of its own rows in a round of a run: as it said before, or what `judge` finds."""
        file = self.of_run(key) / JUDGED
        said: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
        if str(round) not in said:
            said[str(round)] = judge()
            part = file.with_suffix(".part")
            part.write_text(json.dumps(said))
            part.replace(file)
        return said[str(round)]
