"""Runs a scenario with canaries in its clients' data, guesses which from what it sees, and bounds epsilon."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora import scenario as scenarios
from fedlora.adapter import Adapter, Change, Instruction
from fedlora.audit.bands import Apart, reached, turned
from fedlora.audit.bound import Curve, lower_bound
from fedlora.audit.canaries import Canaried, Canaries
from fedlora.audit.noise import LEVEL, Noise, Seen, measure, places, worth
from fedlora.audit.scores import covariance, scores
from fedlora.data.store import Dataset
from fedlora.engine import Description, Engine, Replies, Report, Setup
from fedlora.errors import ContractError, ScenarioError, SettingError, UserError
from fedlora.privacy import ledger
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms.bands import coefficients
from fedlora.reports import charts
from fedlora.reports.console import Display
from fedlora.returned import finite
from fedlora.rounds.checkpoint import whole_folder
from fedlora.scenario import Scenario
from fedlora.seeding import generator
from fedlora.simulation import simulate

# What each view may take of the chance that a bound is wrong, and in it the bound that assumes nothing.
VIEWS = {"server": 0.85, "model": 0.15}
ANYWAY = 0.05


_INSTEAD = {key: f"leave it out, or --set clients.{key}=null" for key in ("optimizer", "schedule")}
_INSTEAD["lr"] = "write one rate, such as --set clients.lr=1.0"


@dataclass(frozen=True)
class Bound:
    """What one way of looking refutes.

    Attributes:
        epsilon: a lower bound on that of a mechanism whose steps are as the ledger has them, its noise unknown; 0
            where nothing is refuted.
        guesses: about how many canaries.
        correct: how many of them were right.
        anyway: a lower bound on epsilon that assumes nothing of the mechanism.
    """

    epsilon: float
    guesses: int
    correct: int
    anyway: float


@dataclass(frozen=True, kw_only=True)
class Audit:
    """An audit's outcome.

    Attributes:
        scenario: its name.
        claimed: the epsilon that the run's ledger claims.
        claim: the same in words.
        delta: of the claim.
        server: from the updates that the server sees, client by client and round by round.
        model: from the first and the last adapter alone.
        noise: what was measured of it in the updates.
        canaries: how many.
        confidence: with which all bounds hold together.
        seconds: that it took.
    """

    scenario: str
    claimed: float
    claim: str
    delta: float
    server: Bound
    model: Bound
    noise: Noise
    canaries: int
    confidence: float
    seconds: float

    @property
    def refuted(self) -> bool:
        """Whether a bound is above the claim, or the noise is not what is stated."""
        bounds = (b for view in (self.server, self.model) for b in (view.epsilon, view.anyway))
        return max(bounds) > self.claimed or self.noise.refuted

    def lines(self) -> list[str]:
        """What is printed."""
        told = [f"{self.scenario}: audited with {self.canaries} canaries in {self.seconds:.0f} s"]
        told.append(f"  claimed       epsilon {self.claimed:.3f}: {self.claim}")
        for name, bound in (("server sees", self.server), ("final model", self.model)):
            told.append(
                f"  {name}   epsilon at least {bound.epsilon:.3f} with {self.confidence:.0%} confidence: "
                f"{bound.correct} of {bound.guesses} guesses were right; {bound.anyway:.3f} if its steps may be "
                "other ones"
            )
        told += [f"  noise         {line}" for line in self.noise.lines()]
        why = "its noise is not as stated" if self.noise.refuted else "the mechanism leaks more than it claims"
        verdict = f"REFUTED: {why}" if self.refuted else "not refuted"
        return [*told, f"  the claim is {verdict}"]


def audit(
    scenario: Scenario | str | Path,
    *,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    canaries: int = 4000,
    confidence: float = 0.95,
    display: Display | None = None,
) -> Audit:
    """Run a scenario once with canaries, and bound its epsilon from below.

    The folder is that of a run, with `audit.json` and `audit.png` beside the rest.

    Args:
        scenario: a loaded one, a file, or the name of one that ships with fedlora.
        overrides: `a.b=value` settings; only with a file or a name.
        out: the folder to write, by default `audits/<name>-<hash>`.
        canaries: how many, over all clients.
        confidence: with which all bounds hold together.
        display: shown how the run goes.

    Raises:
        UserError: the input is wrong, or the strategy hides what its clients trained; nothing was written.
    """
    began = time.perf_counter()
    if not isinstance(scenario, Scenario):
        scenario = scenarios.load(scenario, overrides)
    folder = Path(out) if out else Path("audits") / f"{scenario.name}-{scenario.hash}"
    if scenario.privacy is None or scenario.privacy.unit != "example":
        raise ScenarioError(f"{scenario.name}: has no privacy section of unit: example, and so no claim to audit")
    told = scenario.clients
    own = (("optimizer", told.optimizer), ("schedule", told.schedule), ("lr", told.rates or None))
    for key, value in own:
        if value is not None:
            what = f"an audit reads plain steps of SGD: {_INSTEAD[key]}"
            raise scenario.located(SettingError(f"clients.{key}", what))
    if scenario.shares_example_noise is not None:
        what = "an audit reads single updates, which carry a part of the noise: set secure_aggregation=null for it"
        raise scenario.located(SettingError("secure_aggregation.noise", what))
    if folder.exists():
        raise UserError(f"{folder}: is there already; name another with --out")
    hidden = Canaries(scenario.seed, canaries, scenario.clients.total)
    seen: list[Server] = []

    def watch(engine: Engine) -> Engine:
        seen.append(Server(engine, hidden, scenario))
        return seen[0]

    with whole_folder(folder) as new:
        try:
            run = simulate(_planted(scenario, hidden), out=new, display=display, watch=watch)
        except SettingError as error:
            raise scenario.located(error) from error
        delta, server = scenario.privacy.delta, seen[0]
        spent = ledger.replay(new / "privacy.jsonl")
        claim = Curve(list(spent.values()), delta, scenario.privacy.accountant)
        rated = {"server": server.rate(), "model": server.rate_model()}
        wrong = 1 - confidence - LEVEL
        found = {v: _guess(s, hidden.included, claim, wrong * VIEWS[v]) for v, s in rated.items()}
        made = Audit(
            scenario=scenario.name,
            claimed=run.summary["epsilon"],
            claim=run.summary["privacy"],
            delta=delta,
            server=found["server"],
            model=found["model"],
            noise=server.noise(),
            canaries=canaries,
            confidence=confidence,
            seconds=round(time.perf_counter() - began, 1),
        )
        (new / "scenario.yaml").write_text(scenario.to_yaml())
        (new / "audit.json").write_text(
            json.dumps(finite({**asdict(made), "refuted": made.refuted}), indent=2) + "\n"
        )
        _plot(new / "audit.png", made, tuple(rated.values()), hidden.included)
    return made


def _planted(scenario: Scenario, hidden: Canaries) -> Scenario:
    """The scenario with canaries in its clients' data."""
    told = scenario.clients
    known = {name: getattr(told, name) for name in type(told).model_fields}
    options = {
        "inner": told.use,
        "options": told.options,
        "seed": hidden.seed,
        "canaries": hidden.count,
        "among": told.total,
    }
    use = f"{Canaried.__module__}:{Canaried.__name__}"
    whole = {"keep": "last", "stop": None}  # every round tells something
    return Scenario.model_validate({**scenario.model_dump(), **whole, "clients": {**known, **options, "use": use}})


class Server(Engine):
    """An engine that looks at every update that passes through it, as a curious server would.

    Attributes:
        seen: the updates, in the order in which they came.
    """

    def __init__(self, inner: Engine, hidden: Canaries, scenario: Scenario) -> None:
        super().__init__(inner.num_clients)
        self.inner, self.hidden, self.scenario = inner, hidden, scenario
        self.seen: list[Seen] = []
        self.apart: list[Seen] = []  # the same with banded noise taken apart, as far as it can be
        self._apart = Apart()
        self._sent: tuple[str, ...] = ()
        self._last: Adapter = {}

    def start(self, setup: Setup) -> Description:
        """The inner engine's."""
        self.description, self._data = self.inner.start(setup), Dataset.open(setup.dataset, setup.partitions)
        return self.description

    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        """The inner engine's replies, never summed, each looked at.

        Raises:
            UserError: there are more canaries than directions, or clients send other tensors than they train.
            ContractError: a client names no event.
        """
        sent = (instruction.adapter[name] for name in instruction.send if name in instruction.adapter)
        self.hidden.within(tuple(tensor.size for tensor in sent))
        replies = self.inner.train(instruction, cohort, partial_sums=False)
        self._sent = instruction.send
        reports = {report.client: report for report in replies.reports}
        for update in replies.updates:
            (client,) = update.clients
            before = instruction.at(self.scenario.rank(client, instruction.round)).adapter
            plain = set(update.adapter) == set(instruction.send) <= set(before)
            if not plain or any(before[name].shape != tensor.shape for name, tensor in update.adapter.items()):
                raise SettingError(
                    "strategy.use",
                    f"clients of {self.scenario.strategy.use} send no plain update; audits read only that",
                )
            report = reports[client]
            if report.event is None:
                raise ContractError(f"client {client} names no event that its noise could be measured against")
            self.seen.append(self._look(instruction, before, update.adapter, report, report.event))
        return replies

    def _look(
        self, instruction: Instruction, before: Adapter, after: Adapter, report: Report, event: Event
    ) -> Seen:
        """An update as it is; noted also with its noise taken apart."""
        names, told, layout = instruction.send, self.scenario.clients, self.description.layout
        lr = _rate(told.lr)
        sizes = tuple(after[name].size for name in names)
        change = self._steps(before, after, report.num_examples)
        chosen = places(sizes, generator(self.hidden.seed, "audit", "kept"))

        def measured(change: NDArray[np.float32]) -> dict[str, Any]:
            tensors = np.split(change, np.cumsum(sizes)[:-1])
            squares = np.array([float(np.square(t, dtype=np.float64).sum()) for t in tensors])
            return {"squares": squares, "kept": tuple(t[at] for t, at in zip(tensors, chosen, strict=True))}

        drawn, held = instruction.drawn.get(report.client), self._data.units(report.client)
        made = Seen(
            client=report.client,
            round=instruction.round,
            steps=report.steps,
            rate=min(event.bands * told.rate(held), 1.0),
            noise=event.noise_multiplier,
            examples=held,
            names=names,
            sizes=sizes,
            worth=np.array([worth(instruction.config, layout[n].role, report.steps, lr) for n in names]),
            parts=self.hidden.within(sizes).along(change, self.hidden.of(report.client)),
            coefficients=coefficients(event.bands, self.scenario.counted_steps),
            first=drawn.first(report.draw) if drawn is not None and event.bands > 1 else 0,
            **measured(change),
        )
        if (fresh := self._apart.of(made, change)) is not None:
            self.apart.append(replace(reached(made), **measured(fresh)))
        return made

    def noise(self) -> Noise:
        """Whether the updates hold the noise that is stated."""
        told = self.scenario
        if told.compression and told.compression.up:
            return Noise(skipped="compression.up rounds what clients send")
        asked = told.example_privacy
        if asked is not None and asked.clip.kind == "quantile" and told.clients.local_steps > 1:
            return Noise(skipped="the clipping bound moves within a round")
        if self.seen and not self.apart:
            return Noise(skipped="banded noise is taken apart where rounds of one step train the same tensors")
        return measure(self.apart, -(-self.hidden.count // self.hidden.clients))

    def rate(self) -> NDArray[np.float64]:
        """The score of each canary from all updates of its client, (count,)."""
        made = np.zeros(self.hidden.count)
        alike: dict[tuple[int, Any, tuple[int, ...], int, float, int], list[Seen]] = {}
        for u in self.seen:
            alike.setdefault((u.client, u.names, u.sizes, u.steps, u.rate, u.bands), []).append(u)
        for (client, _, sizes, _, rate, bands), updates in alike.items():
            numbers = [np.stack([u.kept[t] for u in updates]) for t in range(len(sizes))]
            parts = np.stack([u.parts for u in updates])  # (rounds, tensors, canaries)
            mine = self.hidden.of(client)
            for turn in range(bands):
                taken = np.array([float(turned(u, turn)) for u in updates])  # (rounds,)
                mean, variance = taken * rate, taken * rate * (1 - rate)
                found = self._rate(client, sizes, numbers, parts, mean, variance)
                made[mine] += np.where(self.hidden.turn(mine, bands) == turn, found, 0.0)
        return made

    def rate_model(self) -> NDArray[np.float64]:
        """The score of each canary from the first and the last model, (count,).

        Each client's updates are taken to weigh alike in the mean of a round.
        """
        made, first = np.zeros(self.hidden.count), self.description.initial
        if any(self._last[name].shape != first[name].shape for name in self._sent):
            return made  # of another rank: nothing to compare
        held = [u.examples for u in self.seen]  # a mean by weights as batches are is one of sums over their mean
        change = self._steps(first, self._last, *held) * np.float32(self.scenario.clients.cohort_size)
        sizes = tuple(self._last[name].size for name in self._sent)
        tensors = [t[None] for t in np.split(change, np.cumsum(sizes)[:-1])]
        for client in range(self.hidden.clients):
            mine = [u for u in self.seen if u.client == client and u.names == self._sent]
            here, bands = self.hidden.of(client), max((u.bands for u in mine), default=1)
            along = self.hidden.within(sizes).along(change, here)
            for turn in range(bands):
                mean = sum(turned(u, turn) * u.rate for u in mine)
                variance = sum(turned(u, turn) * u.rate * (1 - u.rate) for u in mine)
                found = self._rate(client, sizes, tensors, along[None], mean, variance)
                made[here] += np.where(self.hidden.turn(here, bands) == turn, found, 0.0)
        return made

    def _rate(
        self,
        client: int,
        sizes: tuple[int, ...],
        numbers: list[NDArray[np.float32]],
        parts: NDArray[np.float64],
        mean: float | NDArray[np.float64],
        variance: float | NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Of a client's canaries, group by group; a tensor that rested says nothing."""
        directions = self.hidden.within(sizes)
        home = directions.home[self.hidden.of(client)]
        moved = np.array([block.any() for block in numbers])
        spread, made = [covariance(block) for block in numbers], np.zeros(len(home))
        for group in np.unique(home):
            here, shares = home == group, directions.shares[group] * moved
            if shares.any():
                made[here] = scores(parts[:, :, here], shares, spread, mean, variance)
        return made

    def evaluate(self, adapter: Adapter) -> dict[str, Any]:
        """Nothing: an audit asks what leaked, not what was learnt."""
        return {"loss": None, self.description.metric: None}

    def judge(self, instruction: Instruction, cohort: Sequence[int], test: bool = False) -> dict[int, Any]:
        """Nothing either."""
        return {}

    def merge(self, change: Change) -> None:
        """The inner engine's."""
        self.inner.merge(change)

    def export(self, adapter: Adapter, folder: Path, merged: Change | None = None) -> None:
        """The inner engine's; this is the final model."""
        self._last = adapter
        self.inner.export(adapter, folder, merged)

    def close(self) -> None:
        """The inner engine's."""
        self.inner.close()

    def _steps(self, before: Mapping[str, Any], after: Mapping[str, Any], *held: int) -> NDArray[np.float32]:
        """The sum of clipped gradients that a change stands for, in units of the clipping bound.

        Args:
            before: it.
            after: it.
            held: examples of the clients whose change it is.
        """
        told, privacy = self.scenario.clients, self.scenario.privacy
        batch = float(np.mean([told.rate(n) * n for n in held])) if held else float(told.batch_size)
        unit = _rate(told.lr) * (privacy.clip_norm if privacy else 1.0) / batch
        change: NDArray[np.float32] = np.concatenate([(before[n] - after[n]).ravel() for n in self._sent])
        return change / np.float32(unit)


def _rate(lr: float | dict[str, float]) -> float:
    assert not isinstance(lr, dict)  # `audit` refused
    return lr


def _ways(canaries: int) -> list[tuple[int, int, float]]:
    """How many are guessed to be in the data and out of it, and what a way may take of the chance of being wrong.

    The first sees most of a true mechanism, the others more of a gross fault.
    """
    half, quarter = canaries // 2, canaries // 4
    return [(min(160, quarter), min(80, quarter // 2), 0.9), (quarter, quarter, 0.05), (half, half, 0.05)]


def _guess(scores: NDArray[np.float64], included: NDArray[np.bool_], claim: Curve, wrong: float) -> Bound:
    """The best bound over all ways to guess, all of which hold together but for a chance of `wrong`."""
    order, bounds = np.argsort(-scores, kind="stable"), []
    for into, out, part in _ways(len(scores)):
        right = int(included[order[:into]].sum() + (~included[order[len(order) - out :]]).sum())
        counts = (len(scores), into + out, right)
        epsilon = claim.bound(*counts, 1 - wrong * part * (1 - ANYWAY))
        anyway = lower_bound(*counts, claim.delta, 1 - wrong * part * ANYWAY)
        bounds.append(Bound(epsilon, into + out, right, anyway))
    return replace(max(bounds, key=lambda b: b.epsilon), anyway=max(b.anyway for b in bounds))


def _plot(file: Path, made: Audit, scores: tuple[NDArray[np.float64], ...], included: NDArray[np.bool_]) -> None:
    """The bounds beside the claim, and the scores of canaries that were in and out."""
    import altair as alt

    views = (("server sees", made.server), ("final model", made.model))
    told = [("claimed", made.claimed), *((f"bound, {name}", bound.epsilon) for name, bound in views)]
    bars = alt.Chart(charts.data([{"what": what, "epsilon": epsilon} for what, epsilon in told])).mark_bar()
    bars = bars.encode(x=alt.X("what:N", title=None, sort=None), y=alt.Y("epsilon:Q", title="epsilon"))
    panels: list[charts.Chart] = [bars.properties(title=f"{made.scenario}, at {made.confidence:.0%}")]
    for (name, _), score in zip(views, scores, strict=True):
        low, high = (float(edge) for edge in np.quantile(score, [0.001, 0.999]))
        rows = [
            {"score": float(edge), "canaries": int(count), "canary": label}
            for label, chosen in (("in the data", included), ("out of it", ~included))
            for count, edge in zip(*np.histogram(score[chosen], 40, (low, high)), strict=False)
        ]
        panel = charts.lines(rows, ("score", "score of a canary"), ("canaries", "canaries"), series="canary")
        panels.append(panel.properties(title=name))
    alt.hconcat(*(panel.properties(width=260, height=240) for panel in panels)).save(str(file), scale_factor=2)
