"""Lines of a run's records, made of the reports and figures of its clients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from fedlora.engine.replies import Replies, Report
from fedlora.rounds.progress import Line


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the reports of a round's clients come to.

    Attributes:
        trained: clients whose change arrived in time.
        failed: those with an error, the late ones apart.
        late: those that came too late.
        bytes_up: of all.
        bytes_down: of all.
        train_loss: mean over those who say it; None where nobody does.
    """

    trained: int
    failed: int
    late: int
    bytes_up: int
    bytes_down: int
    train_loss: float | None

    @classmethod
    def of(cls, reports: Sequence[Report]) -> Self:
        """Count them."""
        late = sum(r.late for r in reports)
        failed = sum(r.error is not None for r in reports) - late
        losses = [r.metrics["train_loss"] for r in reports if "train_loss" in r.metrics]
        return cls(
            trained=len(reports) - failed - late,
            failed=failed,
            late=late,
            bytes_up=sum(r.bytes_up for r in reports),
            bytes_down=sum(r.bytes_down for r in reports),
            train_loss=sum(losses) / len(losses) if losses else None,
        )


def round_line(
    round: int,
    told: Counts,
    figures: Line,
    epsilon: float | None,
    elapsed: float | None,
    phases: Mapping[str, float],
) -> Line:
    """A round's line in `metrics.jsonl`.

    Args:
        round: its number.
        told: of its clients.
        figures: of the adapter after it.
        epsilon: spent by then, at most.
        elapsed: seconds of a simulated world's clock; None without one.
        phases: seconds of each part of the round.
    """
    world = {} if elapsed is None else {"late": told.late, "virtual_seconds": round_to(elapsed)}
    return {
        "round": round,
        "clients": told.trained,
        "failures": told.failed,
        **figures,
        "train_loss": told.train_loss,
        "bytes_up": told.bytes_up,
        "bytes_down": told.bytes_down,
        "epsilon": epsilon,
        **world,
        "seconds": round_to(sum(phases.values())),
        "phases": {phase: round_to(took) for phase, took in phases.items()},
    }


def client_line(round: int, report: Report, epsilon: float | None) -> Line:
    """A client's line in `clients.jsonl`."""
    own: Line = {
        "round": round,
        "client": report.client,
        "num_examples": report.num_examples,
        "steps": report.steps,
        "bytes_up": report.bytes_up,
        "bytes_down": report.bytes_down,
        "epsilon": epsilon,
        "seconds": round_to(report.seconds),
        "error": report.error,
    }
    if report.virtual_seconds is not None:
        own["virtual_seconds"] = round_to(report.virtual_seconds)
    return {**own, **report.metrics, **own}  # no figure of a client's takes the place of one of these


def means(figures: Sequence[Mapping[str, Any]]) -> Line:
    """Over clients, of each figure; of those that say something where not all do."""
    said = {key: [each[key] for each in figures if each[key] is not None] for key in (figures or [{}])[0]}
    return {key: sum(values) / len(values) if values else None for key, values in said.items()}


def round_to(seconds: float) -> float:
    """Seconds as a record holds them."""
    return round(seconds, 4)


def added(before: Sequence[Report], later: Sequence[Report]) -> list[Report]:
    """A report for each client of several attempts: its last, with the bytes and seconds of all."""
    found = {report.client: report for report in before}
    for report in later:
        had = found.get(report.client)
        found[report.client] = report if had is None else replace(had.then(report), steps=report.steps)
    return [found[client] for client in sorted(found)]


def first_error(replies: Replies) -> str:
    """What went wrong with the first client that failed."""
    bad = next((r for r in replies.reports if r.error is not None), None)
    return f"client {bad.client}: {bad.error}" if bad else "none of them failed"
