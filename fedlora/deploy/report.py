"""What a ServerApp reports to the submitter: lines in its log, which Flower carries to `fedlora submit`.

A SuperLink gives its users the run's log and nothing else. So the display of a run, and at its end the run folder,
travel as lines of the log that begin with `MARK`.

Where clients are protected whole (`privacy.unit: client`), whether one was drawn stays with the server: neither
who took part in a round nor how many travels, nor a sum that shows it.
"""

import base64
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fedlora.errors import UserError
from fedlora.privacy import ledger
from fedlora.reports.console import Display
from fedlora.returned import finite
from fedlora.run import Run
from fedlora.scenario import Scenario, load

MARK = "fedlora:"
BROUGHT = (  # of a run folder; checkpoints stay with the server
    "scenario.yaml",
    "metrics.jsonl",
    "clients.jsonl",
    "privacy.jsonl",
    "privacy.head",
    "partitions.json",
    "summary.json",
    "test.json",
    "adapter",
)
COUNTS = (  # figures of a round, or of a run, that tell how many clients were drawn
    "clients",
    "failures",
    "resting",
    "late",
    "bytes_up",
    "bytes_down",
    "bytes_up_total",
    "bytes_up_head",
    "bytes_down_total",
    "clients_per_second",
)
_PIECE = 2**16  # characters of a folder in a line
_MOST = 2**32  # bytes of a folder


class Reported:
    """A display that prints what happens as lines of the log."""

    _whole = False  # whether clients are protected whole
    _notes = 0

    def stage(self, what: str) -> None:
        """Something that takes a while has begun."""
        self._say("stage", what=what)

    def note(self, what: str) -> None:
        """Something that happened; not where it may tell who was drawn."""
        if not self._whole:
            self._notes += 1
            self._say("note", number=self._notes, what=what)

    def begin(self, scenario: Scenario, metric: str, done: int) -> None:
        """Rounds begin."""
        self._whole = scenario.client_privacy is not None
        self._say("begin", metric=metric, done=done)

    def round(self, line: Mapping[str, Any]) -> None:
        """A round has finished."""
        self._say("round", line=_uncounted(line) if self._whole else dict(line))

    def failed(self, why: str) -> None:
        """The run has failed."""
        self._say("failed", why=why)

    def surveyed(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """A survey has ended: here is what sites said."""
        self._say("survey", answers=answers)

    def finished(self, folder: Path) -> None:
        """The run has ended: here is its folder."""
        data = _pack(folder)
        text, digest = base64.b85encode(data).decode(), hashlib.sha256(data).hexdigest()
        pieces = [text[i : i + _PIECE] for i in range(0, len(text), _PIECE)]
        for number, piece in enumerate(pieces):
            self._say("folder", number=number, of=len(pieces), data=piece)
        self._say("finished", name=folder.name, digest=digest)

    def _say(self, event: str, **told: Any) -> None:
        sys.stdout.write(f"{MARK}{json.dumps({'event': event, **told})}\n")  # in one piece: others write too
        sys.stdout.flush()


class Follower:
    """Reads the lines again, and shows them.

    Attributes:
        failure: why the run failed; None while it has not.
        name: of the folder that came; None before it is whole.
        answers: of sites to a survey; None before they came.
    """

    def __init__(self, scenario: Scenario | None, display: Display) -> None:
        """Follow a run of a scenario, or a survey, which has none."""
        self.scenario, self.display = scenario, display
        self.failure: str | None = None
        self.name: str | None = None
        self.answers: list[dict[str, Any]] | None = None
        self._pieces: dict[int, str] = {}
        self._data = b""
        self._shown = self._noted = 0

    @property
    def ended(self) -> bool:
        """Whether the run has said its last word."""
        return not (self.failure is None and self.name is None and self.answers is None)

    def line(self, text: str) -> bool:
        """Take in a line of the log; whether it was one of these. A log read twice is shown once."""
        if not text.startswith(MARK):
            return False
        try:
            told = json.loads(text.removeprefix(MARK))
            self._take(told)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError("the run's log is damaged: look at the run folder on the server") from error
        return True

    def _take(self, told: Mapping[str, Any]) -> None:
        match told["event"]:
            case "stage":
                self.display.stage(str(told["what"]))
            case "note" if told["number"] > self._noted:
                self._noted = int(told["number"])
                self.display.note(str(told["what"]))
            case "begin" if self.scenario is not None and not self._shown:
                self.display.begin(self.scenario, str(told["metric"]), int(told["done"]))
            case "round" if told["line"]["round"] > self._shown:
                self._shown = told["line"]["round"]
                self.display.round(told["line"])
            case "failed":
                self.failure = str(told["why"])
            case "survey":
                self.answers = [dict(one) for one in told["answers"]]
            case "folder":
                self._pieces[int(told["number"])] = str(told["data"])
            case "finished":
                self._data = base64.b85decode("".join(text for _, text in sorted(self._pieces.items())))
                if hashlib.sha256(self._data).hexdigest() != told["digest"]:
                    raise ValueError("digest")
                self.name = str(told["name"])

    def save(self, folder: Path) -> None:
        """Write the run folder that came.

        Raises:
            UserError: it holds what no run folder does.
        """
        _unpack(self._data, folder)


def _pack(folder: Path) -> bytes:
    """What is brought back of a run folder, as a compressed archive."""
    stream = io.BytesIO()
    changed = _without_counts(folder) if _protects_clients(folder) else {}
    with tarfile.open(fileobj=stream, mode="w:xz", preset=1) as archive:
        for name in BROUGHT:
            if (data := changed.get(name)) is not None:
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o644
                archive.addfile(member, io.BytesIO(data))
            elif name not in changed and (folder / name).exists():
                archive.add(folder / name, arcname=name)
    return stream.getvalue()


def _protects_clients(folder: Path) -> bool:
    file = folder / "scenario.yaml"
    return file.exists() and load(file).client_privacy is not None


def _without_counts(folder: Path) -> dict[str, bytes | None]:
    """The files of a run folder that show who was drawn, or how many, as they may travel; None: not at all."""
    run = Run.open(folder)
    made: dict[str, bytes | None] = {"clients.jsonl": None}
    made["metrics.jsonl"] = "".join(json.dumps(finite(_uncounted(line))) + "\n" for line in run.rounds).encode()
    made["summary.json"] = (json.dumps(finite(_uncounted(run.summary)), indent=2) + "\n").encode()
    file = folder / "privacy.jsonl"
    if file.exists() and any(line["client"] is not None for line in ledger.read(file)):
        made |= {"privacy.jsonl": None, "privacy.head": None}
    return made


def _uncounted(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in COUNTS}


def _unpack(data: bytes, folder: Path) -> None:
    """Write an archive's files into a folder, if each is one that a run folder has."""
    total = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:xz") as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                total += member.size
                fits = parts and parts[0] in BROUGHT and ".." not in parts and total < _MOST
                if not fits or not (member.isfile() or member.isdir()):
                    raise UserError(f"the run folder that came holds {member.name!r}, which no run folder does")
                if member.isfile() and (stream := archive.extractfile(member)) is not None:
                    file = folder.joinpath(*parts)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(stream.read())
    except tarfile.TarError as error:
        raise UserError("the run folder that came is no archive") from error
