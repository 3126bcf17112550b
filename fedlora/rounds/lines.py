"""Lines of a run's records, made of the reports and figures of its clients."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedlora.engine.replies import Replies, Report
from fedlora.rounds.progress import Line


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
