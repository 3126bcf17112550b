"""`fedlora tune`: a short search of the learning rate, on public rows at no epsilon, or on private ones at theirs.

The learning rate is scaled by powers of three: `strategy.server.lr` where the server has an optimiser,
else `clients.lr`; rates by role together. Each run of the search has a quarter of the rounds and is of the real
run's kind: its batch, its clipping bound and its noise multiplier, that of the client with the median number of
examples. So the rate that is found fits the private run, though no public row needs the noise.

On public rows every client draws as many of them as the median client holds, whatever `data.partition` is. Runs
are judged by public rows that were held out, on private rows by the validation rows. What the scenario reports by
chooses nothing in either case.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fedlora import prepare
from fedlora import scenario as scenarios
from fedlora.data import reading
from fedlora.data import store as datasets
from fedlora.errors import SettingError, UserError, suggestion
from fedlora.privacy import accounting
from fedlora.privacy.accounting import Event
from fedlora.privacy.together import total_epsilon
from fedlora.reports.tables import Table
from fedlora.reports.verdicts import UNLEARNT, Verdict, verdicts
from fedlora.returned import finite
from fedlora.rounds.choice import OF_VALIDATION
from fedlora.run import Run
from fedlora.scenario import Privacy, Sampled, Scenario
from fedlora.sweep import Sweep, claim, explore
from fedlora.tasks.contract import find

FACTORS = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)  # of the scenario's rate, that are tried at first
LOWER, HIGHER = (1 / 81, 1 / 27), (27.0, 81.0)  # that are tried too, where the best is at this edge
_SHARE = 4  # of the rounds, a run of the search has one in so many

Rate = float | Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run of the search.

    Attributes:
        factor: that the scenario's learning rate was multiplied by.
        rate: its learning rate.
        value: its metric on the rows that choose; None where it failed or was not measured.
        loss: likewise.
        verdicts: what is wrong with how it learnt.
        failed: why it failed; None if it did not.
    """

    factor: float
    rate: Rate
    value: float | None = None
    loss: float | None = None
    verdicts: Sequence[Verdict] = ()
    failed: str | None = None

    @property
    def learnt(self) -> bool:
        """Whether it may be chosen."""
        return self.value is not None and not any(verdict.code in UNLEARNT for verdict in self.verdicts)


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A search that has come to its end.

    Attributes:
        key: the setting that was searched.
        metric: that chose.
        trials: in the order of their learning rates.
        best: the one that was chosen; None where none has learnt.
        file: the scenario with that learning rate; None likewise.
        folder: of the runs.
        costs: what the search cost, a sentence for each unit that is protected.
        epsilon_total: the same in numbers; empty on public rows.
    """

    key: str
    metric: str
    trials: Sequence[Trial]
    best: Trial | None
    file: Path | None
    folder: Path
    costs: Sequence[str]
    epsilon_total: Mapping[str, float]

    def lines(self) -> list[str]:
        """What a terminal shows."""
        shown = [
            [_shown(t.rate), *("-" if v is None else f"{v:.4f}" for v in (t.value, t.loss)), self._remark(t)]
            for t in self.trials
        ]
        lines = [*Table((self.key, self.metric, "loss", ""), shown).text(""), "", *self.costs]
        if self.best is None:
            told = [str(v) for t in self.trials for v in t.verdicts if v.code in UNLEARNT]
            failed = [f"a run failed: {t.failed}" for t in self.trials if t.failed]
            most = statistics.mode(told) if told else next(iter(failed), "nothing was measured")
            return [*lines, f"none has learnt, and no scenario is written: {most}"]
        if self.best in (self.trials[0], self.trials[-1]):
            lines.append("the best is at the edge of what was tried: tune what is written once more")
        return [*lines, f"best: {self.key} {_shown(self.best.rate)}", f"scenario: {self.file}"]

    def _remark(self, trial: Trial) -> str:
        if trial is self.best:
            return "best"
        return "failed" if trial.failed else "" if trial.learnt else "has not learnt"


def tune(
    file: str | Path,
    *,
    overrides: Sequence[str] = (),
    public: str | None = None,
    private: bool = False,
    out: str | Path | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Search the learning rate of a scenario, and write the scenario with the best one.

    Args:
        file: of the scenario, or the name of one that ships with fedlora.
        overrides: `a.b=value`, which hold in the search and in what is written.
        public: a named dataset, or a file whose columns are called as the scenario's; else `data.public`.
        private: search on the private rows instead.
        out: the file to write, by default `<scenario>.tuned.yaml` beside the scenario's own.
        told: is given what it costs before it begins, then a line after each run.

    Raises:
        UserError: the input is wrong, there are no rows to search on, or the file to write exists.
    """
    rows = [f"data.public={_source(public)}"] if public is not None else []
    scenario = scenarios.load(file, [*overrides, *rows])
    if private and public is not None:
        raise UserError("--private and --public: name one of them, the rows to search on")
    if not private and scenario.data.public is None:
        raise UserError(
            f"{file}: tune needs rows to search on: name public ones, by  data: {{public: {{files: {{train: "
            "rows.csv}}}  or --public tweets, which costs no epsilon; or take the clients' own by --private"
        )
    if scenario.compress is not None:
        what = "tune takes a base as it is: run fedlora compress, and name its folder as model.base"
        raise scenario.located(SettingError("compress", what))
    written = Path(out) if out is not None else _beside(file)
    if written.exists():
        raise UserError(f"{written}: is there already; name another file with --out")
    if not written.absolute().parent.is_dir():
        raise UserError(f"{written}: its folder does not exist; make it, or name another file with --out")
    try:
        return _Search(scenario, private, told).run(lambda key, rate: _write(written, file, overrides, key, rate))
    except SettingError as error:
        raise scenario.located(error) from error


def rate_key(scenario: Scenario) -> tuple[str, Rate]:
    """The setting whose size is that of a round's change, and what it is."""
    if scenario.strategy.server is not None:
        return "strategy.server.lr", scenario.strategy.server.lr
    return "clients.lr", scenario.clients.lr


class _Search:
    """The runs of a search, and what becomes of them."""

    def __init__(self, scenario: Scenario, private: bool, told: Callable[[str], None]) -> None:
        self.ready = prepare.prepare(scenario)
        self.scenario = scenario = self.ready.scenario
        self.private, self.told = private, told
        self.key, self.base = rate_key(scenario)
        self.task = find(scenario.task)
        noise, self.bands = prepare.calibrate(scenario, self.ready.data), prepare.banded(scenario, self.ready.data)
        if private:
            self._check_validation()
        sizes = [size for size, count in self.ready.data.unit_sizes().items() for _ in range(count) if size]
        self.typical = statistics.median_high(sizes)
        self.rows: list[str] = []
        self.short = self._short(noise)
        rows = "".join(part[:4] for part in (self.ready.data.fingerprint.split("-") if private else self.rows))
        self.folder = (Path("tunings") / f"{scenario.name}-{self.short.hash}-{rows}").absolute()

    def run(self, write: Callable[[str, Rate], Path]) -> Tuned:
        """Every run of it, then the file."""
        first = self._sweep(FACTORS)
        for line in self._foretold():
            self.told(line)
        claim(self.folder, first)
        (self.folder / "scenario.yaml").write_text(self.short.to_yaml())
        trials = self._explore(first, FACTORS)
        best = self._best(trials)
        if best is not None and best in (trials[0], trials[-1]):
            more = LOWER if best is trials[0] else HIGHER
            trials = sorted([*trials, *self._explore(self._sweep(more), more)], key=lambda trial: trial.factor)
            best = self._best(trials)
        total = self._total() if self.private else {}
        tuned = Tuned(
            key=self.key,
            metric=self.task.metric,
            trials=trials,
            best=best,
            file=write(self.key, best.rate) if best is not None else None,
            folder=self.folder,
            costs=[words for _, words in total.values()] or [self._free()],
            epsilon_total={unit: value for unit, (value, _) in total.items()},
        )
        kept: dict[str, Any] = {
            "key": self.key,
            "metric": tuned.metric,
            "trials": [asdict(trial) for trial in trials],
        }
        kept |= {"best": best and best.rate, "epsilon_total": tuned.epsilon_total, "costs": tuned.costs}
        (self.folder / "tuning.json").write_text(json.dumps(finite(kept), indent=2) + "\n")
        return tuned

    def _check_validation(self) -> None:
        """Make sure that there are rows to choose by that report nothing.

        Raises:
            SettingError: there are none.
        """
        if self.ready.strategy.personal or self.ready.strategy.tested:
            raise SettingError(
                "strategy.use",
                f"{self.scenario.strategy.use} ends with a model for each client, which no validation row judges: "
                "tune it on public rows, by data.public",
            )
        if not self.scenario.data.validates:
            raise SettingError(
                "data",
                "what chooses must not be what reports: set data.validation_share, such as 0.3, which takes rows "
                "off the test set to choose by",
            )

    def _short(self, noise: Mapping[int, float] | None) -> Scenario:
        """A run of the search: of a quarter of the rounds, under the noise of the whole run."""
        told = self.scenario
        rounds = max(told.rounds // _SHARE, 1)
        changed: dict[str, Any] = {
            "rounds": rounds,
            "eval_every": rounds,
            "keep": "last",
            "stop": None,
            "trackers": (),
        }
        changed |= {"exact_match": None, "privacy": self._privacy(rounds, noise)}
        data = told.data.model_copy(update={"public": None})
        if not self.private:
            data = self._public_data()
            changed["secure_aggregation"] = None  # the sum would be the same
            batch = {"batch_size": told.clients.batch(self.typical), "sample_rate": None}
            changed["clients"] = told.clients.model_copy(update=batch)
        return told.model_copy(update={**changed, "data": data})

    def _public_data(self) -> scenarios.Data:
        """The public rows, of which each client draws as many as the median client holds.

        Raises:
            SettingError: they cannot be read, are not of the same columns and labels, or are too few.
        """
        told, labels = self.scenario, self.ready.data.labels
        train, test = reading.read_public(told.data, told.task, labels)
        self.rows = [datasets.content(rows) for rows in (train, test)]  # other rows are another search
        kept = 1 - (told.data.client_test_share or 0.0)  # what each has for training
        examples = min(round(self.typical / kept), len(train.texts))
        if told.example_privacy is not None and examples < (batch := told.clients.batch(self.typical)):
            raise SettingError(
                "data.public",
                f"{examples} rows to train on, and a step takes {batch} on average: name more",
            )
        drawn = {"partition": Sampled(kind="sampled", examples=examples), "labels": labels or None}
        return reading.public(told.data).model_copy(update=drawn)

    def _privacy(self, rounds: int, noise: Mapping[int, float] | None) -> Privacy | None:
        """The section under which a short run has the noise of the whole one."""
        told, asked = self.scenario, self.scenario.privacy
        example = told.example_privacy
        if example is not None and noise is not None:
            example = self._for_examples(example, rounds, noise[self.typical])
        if asked is None or asked.unit == "example":
            return example
        whole = prepare.central(told, told.seed)
        assert whole is not None
        bands = None if asked.bands is None else min(whole.bands, rounds)
        noised = {"epsilon": None, "noise_multiplier": whole.noise_multiplier, "bands": bands}
        return asked.model_copy(update={**noised, "example": example})

    def _for_examples(self, asked: Privacy, rounds: int, noise: float) -> Privacy:
        """Public rows: the noise of the median client. Private rows: what that client spends, for all of them."""
        steps = rounds * self.scenario.clients.local_steps
        bands = None if self.bands is None else min(self.bands[self.typical], steps)
        if isinstance(asked.bands, int):
            asked = asked.model_copy(update={"bands": bands})
        if not self.private:
            noise /= math.sqrt(self.scenario.noise_parts(self.scenario.most_members))
            return asked.model_copy(update={"epsilon": None, "noise_multiplier": noise, "bands": bands})
        if asked.noise_multiplier is not None:
            return asked
        event = self._event(self.typical, noise, rounds, asked, bands or 1)
        return asked.model_copy(update={"epsilon": accounting.epsilon([event], asked.delta, asked.accountant)})

    def _event(self, size: int, noise: float, rounds: int, asked: Privacy, bands: int) -> Event:
        """What a client that holds so many examples spends if it is in every round."""
        told = self.scenario.clients
        return Event(
            noise_multiplier=noise,
            sample_rate=min(told.rate(size) * bands, 1.0),
            steps=rounds * told.local_steps,
            clip_norm=asked.clip_norm,
            bands=bands,
        )

    def _foretold(self) -> list[str]:
        """What the search will cost, before it begins."""
        if not self.private:
            return [self._free()]
        short, asked, whole = self.short, self.short.example_privacy, prepare.central(self.short, self.short.seed)
        lines = []
        if asked is not None:
            noise = prepare.calibrate(short, self.ready.data) or {}
            bands = prepare.banded(short, self.ready.data) or dict.fromkeys(noise, 1)
            events = [[self._event(size, z, short.rounds, asked, bands[size])] for size, z in noise.items()]
            lines.append(_cost(events, asked.delta, "example"))
        if whole is not None and short.client_privacy is not None:
            event = replace(whole.event(short.client_privacy.clip_norm), steps=short.rounds)
            lines.append(_cost([[event]], short.client_privacy.delta, "client"))
        return lines or ["on the clients' own rows, without privacy: nothing bounds what the runs reveal"]

    def _free(self) -> str:
        if self.private:
            return "there is no privacy section: nothing bounds what the runs reveal"
        return "on public rows: no epsilon is spent"

    def _total(self) -> dict[str, tuple[float, str]]:
        """What all runs spent together, those that failed included."""
        return total_epsilon([file.parent for file in (self.folder / "runs").glob("*/scenario.yaml")])

    def _sweep(self, factors: Sequence[float]) -> Sweep:
        rates: list[Any] = [_times(self.base, factor) for factor in factors]
        return Sweep(name="tune", scenario=str(self.folder / "scenario.yaml"), search={self.key: rates})

    def _explore(self, asked: Sweep, factors: Sequence[float]) -> list[Trial]:
        # What a run says as it ends is of rows that choose nothing where these are private.
        found = explore(
            asked, self.folder, lambda line: self.told(line.rpartition(":")[0] if self.private else line)
        )
        return [self._trial(factor, *each) for factor, each in zip(factors, found, strict=True)]

    def _trial(self, factor: float, place: Path, failed: str | None) -> Trial:
        """A run by the figures of the rows that choose."""
        rate = _times(self.base, factor)
        if failed is not None or not (run := Run.open(place)).ended:
            return Trial(factor=factor, rate=rate, failed=failed or "it was interrupted")
        if not self.private:
            lines, judged = run.rounds, run.summary
        else:
            metric, held, labels = run.metric, self.ready.data.validation, self.ready.data.labels
            of = {metric: f"{OF_VALIDATION}{metric}", "loss": f"{OF_VALIDATION}loss"}
            lines = [{**line, **{name: line.get(other) for name, other in of.items()}} for line in run.rounds]
            majority = held.majority if labels else None
            judged = {**run.summary, "test_examples": len(held), "majority": majority}
        wrong = verdicts(lines, run.clients, run.scenario, judged, len(self.ready.data.labels))
        last = next((line for line in reversed(lines) if line.get(run.metric) is not None), {})
        value, loss = last.get(run.metric), last.get("loss")
        return Trial(factor=factor, rate=rate, value=value, loss=loss, verdicts=wrong)

    def _best(self, trials: Sequence[Trial]) -> Trial | None:
        """The best one that has learnt; of equals the one of the lower loss."""
        sign = 1 if self.task.higher_is_better else -1

        def good(trial: Trial) -> tuple[float, float]:
            assert trial.value is not None
            return sign * trial.value, -(trial.loss if trial.loss is not None else math.inf)

        return max((trial for trial in trials if trial.learnt), key=good, default=None)


def _cost(events: Sequence[Sequence[Event]], delta: float, unit: str) -> str:
    first, most = (
        accounting.epsilon_of_runs([events] * runs, delta) for runs in (len(FACTORS), len(FACTORS) + len(HIGHER))
    )
    return (
        f"on the clients' own rows: {len(FACTORS)} runs will cost each {unit} epsilon {first:.3g} together, and "
        f"{most:.3g} if the best is at an edge and {len(HIGHER)} more follow; at delta {delta:g}, by Renyi DP; "
        "the run itself adds to it"
    )


def _times(rate: Rate, factor: float) -> Rate:
    """A learning rate, or those of all roles, to three digits."""
    if isinstance(rate, Mapping):
        return {role: float(f"{one * factor:.3g}") for role, one in rate.items()}
    return float(f"{rate * factor:.3g}")


def _shown(rate: Rate) -> str:
    if isinstance(rate, Mapping):
        return ", ".join(f"{role} {one:g}" for role, one in rate.items())
    return f"{rate:g}"


def _source(named: str) -> str:
    """What `--public` stands for, a file or a dataset that has a name, as a value of `data.public`."""
    if Path(named).is_file():
        return json.dumps({"files": {"train": named}})
    if named not in scenarios.DATASETS:
        raise UserError(
            f"--public {named}: no such file, and no dataset of that name: {suggestion(named, scenarios.DATASETS)}"
        )
    return json.dumps({"dataset": named})


def _beside(file: str | Path) -> Path:
    """Where the tuned scenario goes: beside its own file, or here if it ships with fedlora."""
    found = scenarios.find(file)
    name = f"{found.stem}.tuned.yaml"
    return Path(name) if found.is_relative_to(scenarios.SHIPPED) else found.with_name(name)


def _write(written: Path, file: str | Path, overrides: Sequence[str], key: str, rate: Rate) -> Path:
    """The scenario's own text with one key changed, comments kept; where that cannot be, all of it resolved."""
    value = dict(rate) if isinstance(rate, Mapping) else rate
    whole = yaml.safe_load(scenarios.load(file, overrides).to_yaml())
    section = whole
    for part in key.split(".")[:-1]:
        section = section[part]
    section[key.rpartition(".")[2]] = value
    asked = scenarios.parse(yaml.safe_dump(whole, sort_keys=False), str(file))
    try:
        text = scenarios.edited(scenarios.find(file).read_text(encoding="utf-8"), key.split("."), value)
        if scenarios.parse(text).hash != asked.hash:
            text = asked.to_yaml()
    except (LookupError, UserError):
        text = asked.to_yaml()
    try:
        written.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{written}: cannot be written: {error.strerror or error}") from error
    return written
