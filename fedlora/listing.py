"""What `fedlora list` prints: each thing that a scenario can name, in a line."""

from collections.abc import Callable, Iterator, Mapping

from fedlora import plugins, scenario
from fedlora.metrics import contract as metrics

MINILM = 12
"""Layers of 384 x 384 that `minilm` has under `targets: [query, value]`."""


def _shelf(shelf: plugins.Shelf) -> dict[str, str]:
    return {name: plugins.summary(shelf, name) for name in plugins.names(shelf)}


def _strategies() -> dict[str, str]:
    """What each sends and what it is like, with its paper; then how Flower's own are named."""
    lines = {"": f"{'clients send':<14} {'exact':<6} {'linear':<7} {'ranks':<8} paper"}
    for name in plugins.names("strategies"):
        cls = plugins.find("strategies", name)
        exact, linear = ("yes" if told else "no" for told in (cls.facts.exact, cls.linear))
        ranks = "unequal" if cls.unequal_ranks else "equal"
        lines[name] = (
            f"{cls.facts.sends:<14} {exact:<6} {linear:<7} {ranks:<8} {plugins.source('strategies', name)}"
        )
    lines["flwr.serverapp.strategy:NAME"] = "one of Flower's, such as FedAdam or FedMedian; docs/strategies.md"
    return lines


def _kinds() -> dict[str, str]:
    """What each sends, how many numbers that is at rank 8 on MiniLM's queries and values, and its paper."""
    lines = {"": f"{'clients send':<28} {'numbers':<8} {'exact':<6} {'noise gain':<20} paper"}
    for name in plugins.names("kinds"):
        kind = plugins.find("kinds", name)(8, 8.0, ())
        exact = "yes" if kind.exact([role for role in kind.parts if kind.trains(role)]) else "no"
        numbers, paper = f"{MINILM * kind.numbers(384, 384):,}", plugins.source("kinds", name)
        lines[name] = f"{kind.facts.sends:<28} {numbers:<8} {exact:<6} {kind.facts.noise:<20} {paper}"
    return lines


def _compressors() -> dict[str, str]:
    """What each goes by, what it does, and its paper."""
    lines = {}
    for name in plugins.names("compressors"):
        cls = plugins.find("compressors", name)
        takes = " or ".join(cls.takes) or "weights alone"
        takes += "" if cls.needs or not cls.takes else ", or none"
        lines[name] = f"{takes:<22} {plugins.summary('compressors', name)}"
    return lines


def _metrics() -> dict[str, str]:
    """What each is of, and the range that it is in."""
    lines: dict[str, str] = {}
    for target, of in metrics.TARGETS.items():
        for name, one in metrics.known(target).items():
            better = "" if one.higher_is_better else "; less is better"
            told = f"{of}, {one.bounds[0]:g} to {one.bounds[1]:g}{better}"
            lines[name] = f"{lines[name]}; {told}" if name in lines else told
    return dict(sorted(lines.items()))


TABLES: Mapping[str, Callable[[], dict[str, str]]] = {
    "strategies": _strategies,
    "clients": lambda: _shelf("clients"),
    "tasks": lambda: _shelf("tasks"),
    "kinds": _kinds,
    "schedules": lambda: _shelf("schedules"),
    "compressors": _compressors,
    "metrics": _metrics,
    "datasets": lambda: scenario.DATASETS,
    "scenarios": scenario.shipped,
    "sweeps": lambda: scenario.shipped(scenario.SWEEPS),
}


def lines(what: str | None = None) -> Iterator[str]:
    """One table, or all of them under their names."""
    for shelf in [what] if what else TABLES:
        if not what:
            yield f"{shelf}:"
        wide = max(14, *map(len, table := TABLES[shelf]()))
        yield from (f"  {name:<{wide}} {line}" for name, line in table.items())
