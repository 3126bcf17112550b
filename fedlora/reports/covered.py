"""A private run without what its epsilon does not cover: what may be shown where rows are real people's.

A list of what is kept, not of what is left out: a figure that nobody thought of stays at home. What is kept
follows from the protected updates, the scenario or the test rows. Those are the server's, and count as public.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

from fedlora.errors import UserError
from fedlora.record import Line, Record

_SECTIONS = ("name", "task", "model", "clients", "strategy", "rounds", "privacy", "secure_aggregation")
_SUMMARY = (
    "rounds",
    "metric",
    "higher_is_better",
    "lower_is_better",
    "epsilon",
    "delta",
    "privacy_unit",
    "accountant",
    "server_epsilon",
    "own_epsilon",
    "privacy",
    "test_examples",
    "start",
    "layers",
    "prefixes",
    "best_round",
    "ended",
    "stopped",
    "versions",
    "finished",
)


class Covered(Record):
    """A run as its epsilon covers it: no clients, no partition, no bytes, no times, no failures and no seed.

    The test rows' loss, metrics, and the level of their commonest label stay, but no counts of single labels.
    Where clients judge their own models by their own rows, no figure stays.
    """

    @classmethod
    def of(cls, run: Record) -> Self:
        """What may be shown of a run.

        Raises:
            UserError: it has no privacy, so that epsilon covers nothing of it.
        """
        if not run.scenario.get("privacy"):
            raise UserError(f"{run.folder}: has no privacy, so epsilon covers nothing of it: leave --share out")
        names = _shown(run)
        told = {key: value for key, value in run.summary.items() if key in (*_SUMMARY, *names)}
        if run.summary:
            told["metrics"] = {k: v for k, v in (run.summary.get("metrics") or {}).items() if k in names}
            told["majority"] = run.summary.get("majority") if names else None
        return cls(run.folder, told, run.judged_by)

    @cached_property
    def scenario(self) -> Mapping[str, Any]:
        """What was trained and promised; no files, and no seed: the noise follows from it."""
        whole = Record(self.folder).scenario
        return {key: whole[key] for key in _SECTIONS if whole.get(key) is not None}

    @property
    def rounds(self) -> list[Line]:
        """Of each round the figures of test and validation rows, and epsilon."""
        whole = Record.open(self.folder)
        names = _shown(whole)
        kept = {"round", "epsilon", *names, *(f"validation_{name}" for name in names)}
        return [{key: value for key, value in line.items() if key in kept} for line in whole.rounds]

    @property
    def clients(self) -> list[Line]:
        """None: they tell of single clients."""
        return []

    @property
    def partitions(self) -> Mapping[str, Any]:
        """Nothing: it says who holds what."""
        return {}

    @property
    def test(self) -> Mapping[str, Any]:
        """Nothing: it counts labels."""
        return {}


def _shown(run: Record) -> list[str]:
    """The names of the figures of test rows; none where clients judge their own models by their own rows."""
    by_round = [line for line in run.rounds if line.get(run.metric) is not None]
    if by_round and all(line[run.metric] == line.get(f"local_{run.metric}") for line in by_round):
        return []
    return [name for name in run.figures if not name.startswith("local_")]
