"""What `summary.json` says of a run: figures, and what its privacy is in words."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedlora import scenario as scenarios
from fedlora import starting
from fedlora.compressing import summed
from fedlora.engine.setup import Description
from fedlora.metrics import contract as metrics
from fedlora.prepare import Prepared
from fedlora.privacy import accounting, cohorts, ledger, wording
from fedlora.privacy.accounting import in_sums
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.replay import versions
from fedlora.returned import finite
from fedlora.rounds.choice import OF_VALIDATION, Choice
from fedlora.rounds.lines import round_to
from fedlora.rounds.progress import Progress
from fedlora.scenario import Scenario
from fedlora.tasks.contract import find
from fedlora.tasks.smaller import manifest

Spent = Mapping[ledger.Holder, Sequence[accounting.Event]]


def summary_of(
    ready: Prepared, now: Progress, found: Description, record: Ledger, stopped: str | None, choice: Choice | None
) -> dict[str, Any]:
    """What `summary.json` holds; `stopped` says why the run was cut short, if it was.

    Where the best round's adapter is kept, the figures are of that round, and `best_round` says which. `ended`
    says why a run that is finished has fewer rounds than it might.
    """
    scenario = ready.scenario
    best = now.best if choice is not None and choice.keeps else None
    figures = best.figures if best else now.last
    asked = scenario.privacy
    spent = spent_of(record, asked)
    summary: dict[str, Any] = {
        "scenario": scenario.name,
        "strategy": scenario.strategy.use,
        "rounds": now.round,
        "metric": found.metric,
        "higher_is_better": found.higher_is_better,
        found.metric: figures.get(found.metric),
        "loss": figures.get("loss"),
        **_by_name(scenario, found, figures),
        "bytes_up_total": now.bytes_up,
        "bytes_up_head": now.bytes_up_head,
        "bytes_down_total": now.bytes_down,
        "epsilon": spent,
        "delta": asked.delta if asked else None,
        "privacy_unit": asked.protects if asked else None,
        "accountant": asked.accountant if asked else None,
        "neighbours": ledger.neighbours(asked.protects) if asked else None,
        "sampling": None if asked is None else "cyclic_poisson" if _bands(record, asked) else "poisson",
        "example_epsilon": None if scenario.person else spent_of(record, scenario.example_privacy),
        "server_epsilon": server_epsilon(scenario, record.events),
        "own_epsilon": own_epsilon(scenario, record.events),
        "peer_epsilon": peer_epsilon(scenario, record.events.get(None, ())),
        "privacy": privacy_in_words(ready, record),
        "seconds": round_to(now.seconds),
        "clients_per_second": round_to(now.trained / now.seconds) if now.seconds else None,
        "failures": now.failures,
        "seed": scenario.seed,
        "hash": scenario.hash,
        "precision": found.precision,
        "device": found.device,
        "threads": ready.setup.threads,
        "test_examples": found.test_examples,
        "majority": None if ready.strategy.personal and not ready.strategy.tested else ready.data.majority,
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if ready.strategy.tested:  # each client's own model; the metric is their mean
        ends = (f"{found.metric}_least", f"{found.metric}_most")
        summary |= {key: now.last.get(key) for key in ends}
    if scenario.person is not None:
        summary["person"] = scenario.person
    if (base := ready.setup.base) is not None:
        summary["compress"] = summed(manifest(base))
    if (start := starting.said(scenario)) is not None:
        summary["start"] = start
    if scenario.world is not None:
        summary["virtual_seconds"] = round_to(now.virtual_seconds)
    if scenario.exact_match is not None:
        summary["exact_match"] = figures.get("exact_match")
    if found.validation_examples:
        summary["validation_examples"] = found.validation_examples
        summary |= {key: value for key, value in figures.items() if key.startswith(OF_VALIDATION)}
    if now.layers is not None:
        summary["layers"] = now.layers
    if best is not None:
        summary["best_round"] = best.round
    if choice is not None and stopped is None and now.round < scenario.rounds and (why := choice.ends(now)):
        summary["ended"] = why
    if stopped is not None:
        summary["stopped"] = stopped
    plain: dict[str, Any] = finite(summary)  # an epsilon without a bound is null, and told in words
    return plain


def _by_name(scenario: Scenario, found: Description, figures: Mapping[str, Any]) -> dict[str, Any]:
    """`metrics`, all figures of the last evaluation but the loss; `lower_is_better`, of which less is better."""
    asked = metrics.find_all(scenario.metrics, find(scenario.task).target)
    aside = ("loss", "epsilon", "stopped", *(f"{found.metric}_{end}" for end in ("least", "most")))
    told = dict.fromkeys([found.metric, *(metric.name for metric in asked)])
    told |= {k: v for k, v in figures.items() if k not in aside and not k.startswith(OF_VALIDATION)}
    known = metrics.known(find(scenario.task).target).values()
    low = {metric.name for metric in (*known, *asked) if metric.name in told and not metric.higher_is_better}
    low |= set() if found.higher_is_better else {found.metric}
    return {"metrics": told, "lower_is_better": sorted(low)}


def spent_of(record: Ledger, asked: scenarios.Privacy | None) -> float | None:
    """The largest epsilon over those who hold a budget for a guarantee; None without one.

    Where clients share out the noise that protects their examples it is that from those who see sums.
    """
    if asked is None:
        return None
    return _largest({holder: in_sums(spent) for holder, spent in record.events.items()}, asked.unit, asked)


def server_epsilon(scenario: Scenario, events: Spent) -> float | None:
    """The largest epsilon over clients from the server that sees their sums; None where they share no noise."""
    if not scenario.shares_noise or (asked := scenario.privacy) is None:
        return None
    if asked.unit == "example":
        return _largest({holder: in_sums(spent) for holder, spent in events.items()}, asked.unit, asked)
    return _largest(events, wording.FROM_SERVER, asked)


def own_epsilon(scenario: Scenario, events: Spent) -> float | None:
    """The largest epsilon under a client's own part of the noise; None where others' is not counted upon."""
    if scenario.shares_example_noise is None or scenario.privacy is None:
        return None
    return _largest(events, "example", scenario.privacy)


def _largest(
    events: Mapping[ledger.Holder, Sequence[accounting.Event]], unit: str, asked: scenarios.Privacy
) -> float:
    """The largest epsilon over those who hold a budget of a unit; 0 where nothing was spent."""
    every = (
        accounting.epsilon(spent, asked.delta, asked.accountant)
        for holder, spent in events.items()
        if ledger.unit(holder) == unit
    )
    return max(every, default=0.0)


def privacy_in_words(ready: Prepared, record: Ledger) -> str:
    """What was promised, to whom, and what it takes for granted."""
    scenario, asked = ready.scenario, ready.scenario.privacy
    if asked is None:
        return "none: no gradient was clipped or noised"
    told = (spent_of(record, asked) or 0.0, asked.delta, asked.protects, asked.accountant)
    words = wording.statement(*told, bands=_bands(record, asked), person=asked.person)
    if (masks := scenario.shares_example_noise) is not None:
        words = _in_sums(scenario, masks.honest, record)
    if asked.unit == "client":
        seen = "the sum of the clipped updates" if scenario.secure_aggregation else "each clipped update"
        words += f", from anyone who sees the models but not from the server, which sees {seen}"
    if asked.unit == "client" and scenario.shares_noise and scenario.secure_aggregation is not None:
        whole = server_epsilon(scenario, record.events) or 0.0
        honest = scenario.secure_aggregation.honest
        words += " under the clients' noise; "
        words += wording.statement(whole, asked.delta, wording.FROM_SERVER, asked.accountant, honest)
    if asked.unit == "client" and scenario.secure_aggregation is not None:
        words += _among_clients(scenario, asked, record.events.get(None, ()))
    if asked.example is not None:
        own = asked.example
        words += "; at the same time, from the server too, "
        told = (spent_of(record, own) or 0.0, own.delta, own.protects, own.accountant)
        words += wording.statement(*told, bands=_bands(record, own), person=own.person)
    if asked.share_metrics:
        words += "; the training losses and example counts that clients shared are not covered by it"
    if scenario.statistics is not None and scenario.statistics.epsilon is not None:
        words += f"; epsilon {scenario.statistics.epsilon:g} of it went to a statistic by which the base was cut"
    if scenario.model.start is not None:
        words += "; the adapter that it began from is taken as given: what rows lost there adds up with this"
    if ready.setup.secret:
        return f"{words}; noise and batches were drawn under keys from the operating system"
    return (
        f"{words}; noise was drawn from the scenario's seed, as fits a simulation and not a deployment; who holds "
        "which examples, the labels and the test set are taken as given"
    )


def _in_sums(scenario: Scenario, honest: float, record: Ledger) -> str:
    """What examples are promised whose clients share the noise out: from those who see sums, and by one alone."""
    asked = scenario.privacy
    assert asked is not None
    seen, own = (f(scenario, record.events) or 0.0 for f in (server_epsilon, own_epsilon))
    told = (seen, asked.delta, wording.IN_SUMS[asked.protects], asked.accountant, honest)
    words = wording.statement(*told, person=asked.person)
    told = (own, asked.delta, asked.protects, asked.accountant, honest)
    return f"{words}; from everybody, {wording.statement(*told, person=asked.person)}{wording.OWN_ALONE}"


def _bands(record: Ledger, asked: scenarios.Privacy) -> set[int]:
    """The bands of the noise behind a guarantee; none where it is independent."""
    found = ledger.bands_of(record.events, asked.unit)
    return found if max(found, default=1) > 1 else set()


def peer_epsilon(scenario: Scenario, events: Sequence[accounting.Event]) -> float | None:
    """Epsilon of a client from another that is in the same rounds under masks; None elsewhere.

    Args:
        scenario: of the run.
        events: of those rounds, as they cost every client.
    """
    if (asked := scenario.client_privacy) is None or scenario.secure_aggregation is None:
        return None
    known = 1 / cohorts.LEAST if scenario.shares_noise else 0.0
    return accounting.beside(events, asked.delta, asked.accountant, known)


def _among_clients(scenario: Scenario, asked: scenarios.Privacy, events: Sequence[accounting.Event]) -> str:
    """What a client is promised from another that is in the same rounds; and what small cohorts add to delta."""
    most = max((peer_epsilon(scenario, [replace(event, steps=1)]) or 0.0 for event in events), default=0.0)
    every = peer_epsilon(scenario, events) or 0.0
    said = wording.statement(every, asked.delta, wording.FROM_CLIENTS, asked.accountant)
    return (
        f"; {said}, in every round of the run; in one round, epsilon {most:.3g}; cohorts too small or too large "
        f"for a sum add at most {cohorts.RARE:.0%} to delta, and whether enough clients stay to the end of a "
        "round is not covered"
    )
