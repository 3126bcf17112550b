"""Structured logs: a line of JSON for each event, from every part, with its round and its client."""

import json
import logging
import sys
import time
import traceback
from collections.abc import Sequence

KEYS = ("run", "round", "client", "kind", "seconds", "trained", "epsilon")


class Lines(logging.Formatter):
    """A record as a line: `time, level, part, message`, and of `KEYS` those that the record has.

    Of an error it says where it came from and of which kind it is: its words may hold what a row holds.
    """

    def __init__(self, part: str) -> None:
        """Lines of a part, such as `server` or a site's name."""
        super().__init__()
        self.part = part

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        told = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "part": self.part,
            "message": record.getMessage(),
            **{key: getattr(record, key) for key in KEYS if getattr(record, key, None) is not None},
        }
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, frames = record.exc_info
            told["traceback"] = "".join(traceback.format_tb(frames)) + kind.__name__
        return json.dumps(told)


class File(logging.FileHandler):
    """A log on disk. Where it cannot be written, one line on stderr says so, once."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say what is wrong with the file; of anything else what Python says."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            print(f"{self.baseFilename}: cannot be written: {error.strerror or error}", file=sys.stderr)


def start(part: str, *handlers: logging.Handler) -> None:
    """Write fedlora's log to some handlers, as lines of a part; and Flower's own, whose lines have colours."""
    for name in ("fedlora", "flwr"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = _formatted(part, handlers)


def _formatted(part: str, handlers: Sequence[logging.Handler]) -> list[logging.Handler]:
    for handler in handlers:
        handler.setFormatter(Lines(part))
    return list(handlers)
