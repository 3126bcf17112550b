"""`fedlora check`: what is wrong with a scenario, and what was understood of it, without torch or the Hub."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedlora import client, strategy, suitability
from fedlora.data import overview as data
from fedlora.data import suggested
from fedlora.errors import SettingError, UserError, cut
from fedlora.privacy import affordable
from fedlora.reports.tables import Table
from fedlora.scenario import Scenario
from fedlora.tasks import located
from fedlora.tasks.contract import find

_LABELS = 12  # in a table for people
_CLIENTS = 8


def remarks(scenario: Scenario) -> list[str]:
    """What is no mistake, and good to know of a scenario, a sentence each."""
    found = [*scenario.unused]
    server, told = scenario.strategy.server, scenario.clients.optimizer
    whole, example = (
        asked is not None and asked.bands not in (None, 1)
        for asked in (scenario.client_privacy, scenario.example_privacy)
    )
    others = [f"clients.optimizer: {told.kind}"] if example and told is not None and told.kind != "sgd" else []
    others += [f"strategy.server: {server.kind}"] if (whole or example) and server is not None else []
    if others:
        found.append(
            f"privacy.bands: noise cancels best in plain steps of SGD; under {' and '.join(others)} it protects "
            "as much, and may help less: measure it"
        )
    if scenario.compress is not None:
        found.append(
            "compress: a plan takes the whole base: time, memory and frozen numbers of the run are below it"
        )
    packed = scenario.compression.up if scenario.compression is not None else None
    if packed is not None and packed.kind == "mask":
        found.append(
            f"compression.up: mask sends fewer numbers, in which a change is about {packed.share**-0.5:.3g} times "
            "as long, its noise included: the signal and noise of a plan are of the change before that"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a check found.

    Attributes:
        scenario: what it was called.
        problems: each in a line, with the file and line of its setting; none where all is fine.
        understood: of the data; None where they are not at hand, or wrong.
        base: where the base model is, and what it is by its configuration.
        positions: tokens that the base model has places for; None where it does not say, or is not at hand.
        max_length: of the scenario.
        notes: what is no mistake, and good to know, a sentence each.
        folder: from which relative paths are read.
    """

    scenario: str
    problems: Sequence[str]
    understood: data.Overview | None
    base: str
    positions: int | None
    max_length: int
    notes: Sequence[str]
    folder: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "fine": not self.problems}

    def lines(self) -> list[str]:
        """What a terminal shows, where there is no problem."""
        fine = f"{self.scenario}: fine"
        told = self.understood
        if told is None:
            return [
                f"{fine}; its rows are not at hand, and were not looked at",
                f"  base  {self.base}",
                *self.notes,
            ]
        said = [["rows", ", ".join(f"{count:,} {part}" for part, count in told.rows.items())]]
        said += [["labels", line] for line in self._labels(told)]
        if (held := told.lengths) is not None:
            over = f"{held.over:,} of {held.rows:,} rows have more" if held.over else "no row has more"
            said.append(["words", f"{held.median} in the median row, {held.most} at most (about 1.3 tokens each)"])
            kept = "in each window of a row" if held.windows else "kept of a row"
            said.append(["tokens", f"{self.max_length} {kept} (data.max_length); {over} words than that"])
            said.append(["empty", f"{held.empty:,} rows without a word"])
        places = "as many as the base has places for is not known" if self.positions is None else None
        said.append(["base", self.base])
        said.append(["positions", places or f"{self.positions} of the base model"])
        said.append(["clients", _clients(told)])
        said.append(["repeated", f"{told.repeated:,} training rows have the text of another"])
        said.append(["leaks", f"{told.leaks:,} test rows have a text of the training set"])
        said += [["note", note] for note in told.notes]
        return [fine, *Table(("what", "understood"), said, left=frozenset({0, 1})).text(), *self.notes]

    def told(self, as_json: bool) -> int:
        """Print it; gives the exit code.

        Raises:
            UserError: there are problems.
        """
        if as_json:
            print(json.dumps(self.to_json(), indent=2, ensure_ascii=False))
            return 2 if self.problems else 0
        if self.problems:
            raise UserError(*self.problems)
        print("\n".join(self.lines()))
        return 0

    def _labels(self, told: data.Overview) -> list[str]:
        if not told.labels:
            return ["none"]
        ordered = sorted(told.labels.items(), key=lambda pair: -pair[1]["train"])
        made = [
            f"{cut(name)!r}: {', '.join(f'{count:,} {part}' for part, count in counts.items())}"
            for name, counts in ordered[:_LABELS]
        ]
        return [*made, *([f"and {len(ordered) - _LABELS} more, rarer ones"] if len(ordered) > _LABELS else [])]


def _clients(told: data.Overview) -> str:
    if told.sizes is None:
        return "sizes are known once rows are tokenised"
    ordered = sorted(told.sizes)
    line = f"{len(ordered)}, of {ordered[0]:,} to {ordered[-1]:,} rows, {ordered[len(ordered) // 2]:,} the median"
    if told.persons is not None:
        line += f", of {min(told.persons):,} to {max(told.persons):,} persons"
    if told.names:
        each = [f"{cut(name)} {size:,}" for name, size in zip(told.names, told.sizes, strict=True)]
        line += f": {', '.join(each[:_CLIENTS])}{' ...' if len(each) > _CLIENTS else ''}"
    return line


def check(scenario: Scenario, called: str = "") -> Checked:
    """Everything that can be said before a model is loaded.

    Args:
        scenario: to check.
        called: what it is called in the answer; by default its name.
    """
    found: list[str] = []
    seen: list[data.Overview] = []

    def of_strategy() -> None:
        made = strategy.load(scenario.strategy.use, scenario.strategy.options)
        suitability.check(made, scenario)
        suitability.kind_of(made, scenario)

    def of_clients() -> None:
        made = client.load(scenario.clients.use, scenario.clients.options)
        client.check_fused(made, scenario.engine.fused)
        client.check_private(made, scenario)

    def of_data() -> None:
        if data.at_hand(scenario.data):
            told = scenario.data, scenario.task, scenario.clients.total, scenario.seed, scenario.person
            seen.append(data.overview(*told))

    def of_model() -> None:
        base, revision = scenario.model.base, scenario.model.revision
        located.check(base, revision)
        room = located.places(base, by_table=True, revision=revision)
        if room is not None and room < scenario.data.max_length:
            what = f"{scenario.data.max_length} tokens, and the model has {room} positions: lower it"
            raise SettingError("data.max_length", what)
        asked, there = scenario.model.adapter.layers, located.blocks(base, revision)
        if asked and there is not None and max(asked) >= there:
            what = f"no layer {max(asked)}: {cut(base)} has {there}, which are counted from 0 to {there - 1}"
            raise SettingError("model.adapter.layers", what)

    def of_budget() -> None:
        sizes = seen[0].persons or seen[0].sizes if seen else None
        affordable.check(scenario, sizes or ())

    checks: tuple[Callable[[], object], ...] = (
        lambda: find(scenario.task),
        of_strategy,
        of_clients,
        of_model,
        of_data,
        of_budget,
    )
    for one in checks:
        try:
            one()
        except SettingError as error:
            found += scenario.located(error).lines
    try:
        base = located.told(scenario.model.base, scenario.model.revision)
    except SettingError as error:
        base = error.message
    return Checked(
        scenario=called or scenario.name,
        problems=found,
        understood=seen[0] if seen else None,
        base=base,
        positions=located.places(scenario.model.base, revision=scenario.model.revision),
        max_length=scenario.data.max_length,
        notes=[*remarks(scenario), *suggested.of_scenario(scenario)],
        folder=os.getcwd(),
    )


def problems(scenario: Scenario) -> list[str]:
    """Each problem in a line, with the file and line of its setting; none where all is fine."""
    return [*check(scenario).problems]
