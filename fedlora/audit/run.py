"""Runs a scenario with canaries in its clients' data, guesses which from what it sees, and bounds epsilon."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora import scenario as scenarios
from fedlora.adapter import Adapter, Change, Instruction
from fedlora.audit.bound import lower_bound
from fedlora.audit.canaries import Canaried, Canaries
from fedlora.checkpoint import whole_folder
from fedlora.engine import Description, Engine, Replies, Setup
from fedlora.errors import ScenarioError, SettingError, UserError
from fedlora.report import charts
from fedlora.report.console import Display
from fedlora.scenario import Scenario
from fedlora.simulation import simulate

# Shares of the canaries that are guessed to be in the data, and whether as many are guessed to be out of it.
# The bound is the best of them, each at a confidence that makes all of them hold together.
GUESSES = [(share, both) for share in (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64) for both in (True, False)]


@dataclass(frozen=True)
class Bound:
    """What one way of looking refutes.

    Attributes:
        epsilon: a lower bound on the true one; 0 where nothing is refuted.
        guesses: about how many canaries.
        correct: how many of them were right.
    """

    epsilon: float
    guesses: int
    correct: int


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
        canaries: how many.
        confidence: with which each bound holds.
        seconds: that it took.
    """

    scenario: str
    claimed: float
    claim: str
    delta: float
    server: Bound
    model: Bound
    canaries: int
    confidence: float
    seconds: float

    @property
    def refuted(self) -> bool:
        """Whether a bound is above the claim."""
        return max(self.server.epsilon, self.model.epsilon) > self.claimed

    def lines(self) -> list[str]:
        """What is printed."""
        told = [f"{self.scenario}: audited with {self.canaries} canaries in {self.seconds:.0f} s"]
        told.append(f"  claimed       epsilon {self.claimed:.3f}: {self.claim}")
        for name, bound in (("server sees", self.server), ("final model", self.model)):
            told.append(
                f"  {name}   epsilon at least {bound.epsilon:.3f} with {self.confidence:.0%} confidence: "
                f"{bound.correct} of {bound.guesses} guesses were right"
            )
        verdict = "REFUTED: the mechanism leaks more than it claims" if self.refuted else "not refuted"
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
        canaries: how many, over all clients; the largest bound that they can give is about `log(canaries / 12)`.
        confidence: with which each bound holds.
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
        delta = scenario.privacy.delta
        scores = (seen[0].scores, seen[0].moved())
        server, model = (_guess(s, hidden.included, delta, confidence) for s in scores)
        made = Audit(
            scenario=scenario.name,
            claimed=run.summary["epsilon"],
            claim=run.summary["privacy"],
            delta=delta,
            server=server,
            model=model,
            canaries=canaries,
            confidence=confidence,
            seconds=round(time.perf_counter() - began, 1),
        )
        (new / "scenario.yaml").write_text(scenario.to_yaml())
        (new / "audit.json").write_text(json.dumps({**asdict(made), "refuted": made.refuted}, indent=2) + "\n")
        _plot(new / "audit.png", made, scores, hidden.included)
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
    return Scenario.model_validate({**scenario.model_dump(), "clients": {**known, **options, "use": use}})


class Server(Engine):
    """An engine that looks at every update that passes through it, as a curious server would.

    Attributes:
        scores: for each canary the log-likelihood ratio of what was seen, between in the data and out of it.
    """

    def __init__(self, inner: Engine, hidden: Canaries, scenario: Scenario) -> None:
        super().__init__(inner.num_clients)
        self.inner, self.hidden, self.scenario = inner, hidden, scenario
        self.scores = np.zeros(hidden.count)
        self._sent: tuple[str, ...] = ()
        self._last: Adapter = {}

    def start(self, setup: Setup) -> Description:
        """The inner engine's."""
        self.description = self.inner.start(setup)
        return self.description

    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        """The inner engine's replies, never summed, each looked at.

        Raises:
            UserError: there are more canaries than directions, or clients send other tensors than they train.
        """
        told, seed, r = self.scenario.clients, self.scenario.seed, self.scenario.model.adapter.r
        self.hidden.fits(sum(instruction.adapter[n].size for n in instruction.send if n in instruction.adapter))
        replies = self.inner.train(instruction, cohort, partial_sums=False)
        self._sent = instruction.send
        sizes = {report.client: report.num_examples for report in replies.reports}
        for update in replies.updates:
            (client,) = update.clients
            before = instruction.at(told.rank(client, seed, r)).adapter
            if set(update.adapter) != set(instruction.send) or not set(update.adapter) <= set(before):
                raise SettingError(
                    "strategy.use",
                    f"clients of {self.scenario.strategy.use} send no plain update; audits read only that",
                )
            mine = self.hidden.of(client)
            drawn = self.hidden.along(self._steps(before, update.adapter))[mine]  # how often each was, and noise
            rate = told.batch_size / sizes[client]
            self.scores[mine] += likelihood_ratio(drawn, told.local_steps, rate)
        return replies

    def moved(self) -> NDArray[np.float64]:
        """How far the final model moved from the first along each canary, (count,)."""
        return self.hidden.along(self._steps(self.description.initial, self._last))

    def evaluate(self, adapter: Adapter) -> dict[str, Any]:
        """Nothing: an audit asks what leaked, not what was learnt."""
        return {"loss": None, self.description.metric: None}

    def judge(self, instruction: Instruction, cohort: Sequence[int]) -> dict[str, float]:
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

    def _steps(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> NDArray[np.float32]:
        """The sum of clipped gradients that a change stands for, in units of the clipping bound."""
        told, privacy = self.scenario.clients, self.scenario.privacy
        unit = told.lr * (privacy.clip_norm if privacy else 1.0) / told.batch_size
        change: NDArray[np.float32] = np.concatenate([(before[n] - after[n]).ravel() for n in self._sent])
        return change / np.float32(unit)


def likelihood_ratio(seen: NDArray[np.float64], steps: int, rate: float) -> NDArray[np.float64]:
    """`log p(seen | in) - log p(seen | out)` where a canary that is in is drawn binomially often, under noise.

    The scale of the noise is taken from what is seen, as the stated one may be wrong: most canaries are out,
    or were not drawn.

    Args:
        seen: along the direction of each canary, in units of one draw, (canaries,).
        steps: how many draws there could be.
        rate: the chance of each.
    """
    from scipy.special import logsumexp
    from scipy.stats import binom

    scale = max(1.4826 * float(np.median(np.abs(seen - np.median(seen)))), 1e-3)
    draws = np.arange(steps + 1)
    with np.errstate(divide="ignore"):  # where every step draws it
        prior = np.log(binom.pmf(draws, steps, rate))
    ratio: NDArray[np.float64] = logsumexp(prior + (draws * seen[:, None] - draws**2 / 2) / scale**2, axis=1)
    return ratio


def _guess(scores: NDArray[np.float64], included: NDArray[np.bool_], delta: float, confidence: float) -> Bound:
    """The best bound over `GUESSES`, all of which hold together with the confidence."""
    order = np.argsort(-scores, kind="stable")
    each = 1 - (1 - confidence) / len(GUESSES)
    bounds = []
    for share, both in GUESSES:
        count = int(share * len(scores))
        right = int(included[order[:count]].sum())
        guesses = count
        if both:
            right += int((~included[order[len(order) - count :]]).sum())
            guesses += count
        bounds.append(Bound(lower_bound(len(scores), guesses, right, delta, each), guesses, right))
    return max(bounds, key=lambda b: b.epsilon)


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
