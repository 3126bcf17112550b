"""Whether a run learnt, from its figures alone: verdicts, each with the setting to try.

With n test rows, m the share of their commonest label, the standard error of an accuracy a is
`e(a) = sqrt(a (1 - a) / n)`. The rules:

- `majority`: the last accuracy is at most `m + 2 e(m)`; at most m is sure. Or the last micro F1 is at most that of
  always saying the commonest label, or the last F1 of entities is 0.
- `guessing`: the last loss is above that of saying each of k labels by its share. Of labels with a commonest share
  of m that is at most the entropy `-m log m - (1 - m) log((1 - m) / (k - 1))`. The mean of n losses is taken to be
  off by `2 / sqrt(n)`: a loss spreads by about one nat.
- `rising`: a line through the last third of the evaluations, four at least, rises from its first round to its last
  by more than two standard errors: of an accuracy, and of the line itself, by what it leaves.
- `collapsed`: the best less the last is above three standard errors of their difference, and the loss grew too.
- `client`: by Grubbs' test (1950, https://doi.org/10.1214/aoms/1177729885) at 1 %, one client's training loss is
  off from the others' over the last third of the rounds, three at least, and a quarter above theirs. Only of
  losses that clients share, and never where clients are protected whole: a name would show who took part.

Of a metric that is no accuracy the standard error is not known: then a hundredth of it counts for two of them, and
a tenth for three.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite, log, sqrt
from typing import Any, Literal, NamedTuple

from fedlora import plugins

Code = Literal["majority", "guessing", "rising", "collapsed", "client"]
Lines = Sequence[Mapping[str, Any]]

UNLEARNT: tuple[Code, ...] = ("majority", "guessing", "collapsed")
"""Verdicts on a run that is not to be chosen, whatever its metric is beside others'."""

AGAIN = "Another run on the same private rows spends its epsilon too, and the two add up"
"""Said beside the verdicts on a private run: each names a setting to try."""

GUESSED = ("accuracy", "micro_f1")
"""Metrics in which a summary's `majority` is given."""

UNRELATED = ("pearson", "spearman")
"""Metrics that are 0 where predictions say nothing of scores, with a standard error of `1 / sqrt(rows)`."""

_POOL = ("classification", "multi_label", "regression")  # tasks that read one vector of a text
_ALONE = 4  # clients from which one can be told from the others
_CHANCE = 0.01  # of naming a client where all are alike


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a run.

    Attributes:
        code: in a word.
        says: in a sentence, without its full stop.
        setting: to try.
    """

    code: Code
    says: str
    setting: str

    def __str__(self) -> str:
        return f"{self.says}; try {self.setting}"


class _Point(NamedTuple):
    """An evaluation."""

    round: int
    value: float
    loss: float | None


def verdicts(
    rounds: Lines, clients: Lines, scenario: Mapping[str, Any], summary: Mapping[str, Any], labels: int
) -> list[Verdict]:
    """What is wrong with a run that has ended.

    Args:
        rounds: the lines of `metrics.jsonl`.
        clients: the lines of `clients.jsonl`.
        scenario: as the run folder holds it.
        summary: what `summary.json` holds.
        labels: how many there are; 0 where rows have none.
    """
    metric, settings = summary.get("metric", "accuracy"), _Settings(scenario, summary)
    measured = [line for line in rounds if isinstance(line.get(metric), int | float)]
    points = [_Point(line["round"], line[metric], line.get("loss")) for line in measured]
    found: list[Verdict] = []
    if points:
        # Where each client has a model of its own, the figures are means over clients, and not of the test rows.
        personal = f"local_{metric}" in measured[-1] and measured[-1][f"local_{metric}"] == measured[-1][metric]
        judged = summary.get("test_examples") if metric == "accuracy" and not personal else None
        better = 1 if summary.get("higher_is_better", True) else -1
        fell = _collapsed(points, metric, better, judged)
        majority = summary.get("majority")
        above = judged and majority and labels > 1 and _guessing(points[-1], majority, labels, judged)
        if majority and (judged or metric in GUESSED[1:]):
            found += _no_better(points[-1], majority, judged, settings.lower if fell or above else settings.signal)
        if metric == "f1" and not points[-1].value:
            says = "not one entity is found as it is: no better than always saying that there is none"
            found.append(Verdict("majority", says, settings.lower if fell else settings.signal))
        if metric in UNRELATED and not personal and (count := summary.get("test_examples")):
            if better * points[-1].value < 2 / sqrt(count):
                shown = f"{metric} {points[-1].value:.2f} on {count:,} test rows"
                says = f"no better than one score for all rows ({shown})"
                found.append(Verdict("majority", says, settings.lower if fell else settings.signal))
        if above:
            found.append(Verdict("guessing", above, settings.lower))
        if fell:
            found.append(Verdict("collapsed", fell, settings.decay))
        elif risen := _rising(points, metric, better, judged):
            found.append(Verdict("rising", risen, settings.more))
    if (settings.privacy or {}).get("unit") != "client" and (behind := _behind(clients)):
        found.append(Verdict("client", behind, settings.personal))
    return found


def _error(share: float, rows: int) -> float:
    """The standard error of a share of so many rows."""
    return sqrt(max(share * (1 - share), 0.0) / rows)


def _no_better(last: _Point, majority: float, rows: int | None, setting: str) -> Iterator[Verdict]:
    least = majority + 2 * _error(majority, rows) if rows else majority
    if last.value > least:
        return
    shown = f"{majority:.2f} of {rows:,} test rows" if rows else f"a micro F1 of {majority:.2f}"
    always = f"always saying the commonest label ({shown})"
    if last.value <= majority:
        says = f"no better than {always}"
    else:
        says = f"its accuracy of {last.value:.3f} may be no better than {always}: above {least:.3f} it would be"
    yield Verdict("majority", says, setting if least < 1 else "more test rows, of more labels")


def _guessing(last: _Point, majority: float, labels: int, rows: int) -> str:
    rest = 1 - majority
    guess = -majority * log(majority) - (rest * log(rest / (labels - 1)) if rest > 0 else 0.0)
    if last.loss is None or last.loss <= guess + 2 / sqrt(rows):
        return ""
    return f"its loss of {last.loss:.3f} is above the {guess:.3f} of guessing labels by their shares"


def _collapsed(points: Sequence[_Point], metric: str, better: int, rows: int | None) -> str:
    best, last = max(points, key=lambda point: better * point.value), points[-1]
    if rows:
        most = 3 * sqrt(_error(best.value, rows) ** 2 + _error(last.value, rows) ** 2)
    else:
        most = abs(best.value) / 10
    worse = best.loss is not None and last.loss is not None and last.loss > best.loss
    if not worse or better * (best.value - last.value) <= most:
        return ""
    return f"it collapsed: {metric} was {best.value:.4f} after round {best.round} and is {last.value:.4f}"


def _rising(points: Sequence[_Point], metric: str, better: int, rows: int | None) -> str:
    if len(points) < 4:
        return ""
    late = points[-max(4, ceil(len(points) / 3)) :]
    x, y = [float(point.round) for point in late], [better * point.value for point in late]
    if len(set(x)) < len(x):
        return ""
    slope, start = statistics.linear_regression(x, y)
    span, middle, mean = x[-1] - x[0], statistics.fmean(x), statistics.fmean(y)
    left = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True)) / (len(x) - 2)
    own = span * sqrt(left / sum((a - middle) ** 2 for a in x))
    known = _error(abs(mean), rows) if rows else abs(mean) / 200
    if slope * span <= 2 * max(own, known):
        return ""
    way = "rising" if better > 0 else "falling"
    return f"{metric} was still {way} at the end: by {slope * span:.3f} from round {late[0].round} on"


def _behind(clients: Lines) -> str:
    """The client, if there is one, whose training loss stands out."""
    losses: dict[int, dict[int, float]] = {}
    for line in clients:
        loss = line.get("train_loss")
        if line.get("error") is None and isinstance(loss, int | float) and isfinite(loss):
            losses.setdefault(line["round"], {})[line["client"]] = loss
    late = sorted(losses)[-max(3, ceil(len(losses) / 3)) :]
    off: dict[int, list[float]] = {}
    told: dict[int, list[float]] = {}
    for round in late:
        usual = statistics.median(losses[round].values())
        for client, loss in losses[round].items():
            off.setdefault(client, []).append(loss - usual)
            told.setdefault(client, []).append(loss)
    means = {client: statistics.fmean(each) for client, each in off.items() if len(each) > 1}
    if len(late) < 3 or len(means) < _ALONE:
        return ""
    worst = max(means, key=means.__getitem__)
    others = [mean for client, mean in means.items() if client != worst]
    gap, spread = means[worst] - statistics.fmean(others), statistics.stdev(others)
    theirs = statistics.fmean(loss for client in means if client != worst for loss in told[client])
    if gap <= theirs / 4 or _by_chance(gap, spread, len(others)) > _CHANCE:
        return ""
    own = statistics.fmean(told[worst])
    return f"client {worst} is far behind: its training loss is {own:.3f} where that of the others is {theirs:.3f}"


def _by_chance(gap: float, spread: float, others: int) -> float:
    """How likely the largest of so many and one is so far from the mean of the others, if all are alike."""
    if spread == 0:
        return 0.0 if gap > 0 else 1.0
    from scipy.stats import t

    return (others + 1) * float(t.sf(gap / (spread * sqrt(1 + 1 / others)), others - 1))


class _Settings:
    """What there is to try in a scenario."""

    def __init__(self, scenario: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        self.clients: Mapping[str, Any] = scenario.get("clients") or {}
        self.strategy: Mapping[str, Any] = scenario.get("strategy") or {}
        self.privacy: Mapping[str, Any] | None = scenario.get("privacy")
        self.rounds = scenario.get("rounds")
        self.spent = "stopped" in summary
        self.server: Mapping[str, Any] | None = self.strategy.get("server")
        model: Mapping[str, Any] = scenario.get("model") or {}
        self.pools = scenario.get("task") in _POOL and "pooling" in model and model["pooling"] is None

    @property
    def signal(self) -> str:
        """Steps that are larger, or less noisy."""
        tried = []
        if self.server is None and _takes_server(str(self.strategy.get("use", ""))):
            tried.append("strategy.server: {kind: adam, lr: 0.02}")
        tried += self._larger
        if self.pools:
            tried.append("model.pooling: mean, of an encoder")
        key, rate = self._rate()
        return ", ".join([*tried, f"another {key} (now {rate}), as fedlora tune finds it"])

    @property
    def lower(self) -> str:
        """Smaller steps."""
        key, rate = self._rate()
        return f"a lower {key} (now {rate})"

    @property
    def decay(self) -> str:
        """Steps that get smaller, or smaller ones where they do."""
        if self.server is not None and self.server.get("schedule") is None:
            return f"strategy.server.schedule: {{kind: linear}}, or {self.lower}"
        own = self.clients.get("use") in ("sgd", "dp_sgd")
        if self.server is None and own and self.clients.get("schedule") is None:
            return f"clients.schedule: {{kind: cosine}}, or {self.lower}"
        return self.lower

    @property
    def more(self) -> str:
        """More rounds, and what they cost."""
        if self.spent:
            return "a larger privacy.epsilon or noise_multiplier: no client had epsilon left"
        rounds = f"rounds: {2 * self.rounds}" if isinstance(self.rounds, int) else "more rounds"
        if self.privacy is None:
            paced = any((section or {}).get("schedule") for section in (self.clients, self.server))
            return f"{rounds} in a new run, for its schedule" if paced else f"{rounds}, with --resume"
        if self.privacy.get("noise_multiplier") is not None:
            return f"{rounds}, which costs more epsilon"
        noisier = f"{rounds} in a new run: at the same epsilon each then has more noise"
        return ", or ".join([noisier, *self._larger])

    @property
    def personal(self) -> str:
        """A model of its own for each client."""
        if self.strategy.get("use") == "fedsa_lora":
            return "a look at its rows"
        return "a look at its rows, or strategy.use: fedsa_lora with data.client_test_share: 0.2"

    @property
    def _larger(self) -> list[str]:
        """What has less noise in a round, if there is more to take."""
        if self.privacy is None:
            return []
        if self.privacy.get("unit") == "client":
            return [f"a larger clients.per_round (now {self.clients.get('per_round') or 'all'})"]
        rate = self.clients.get("sample_rate")
        if rate is None:
            return [f"a larger clients.batch_size (now {self.clients.get('batch_size', '?')})"]
        return [] if rate >= 1 else [f"a larger clients.sample_rate (now {rate}), up to 1.0"]

    def _rate(self) -> tuple[str, Any]:
        """The learning rate that says most about the size of steps, and its key."""
        if self.server is not None and self.server.get("kind") in ("adam", "yogi"):
            return "strategy.server.lr", self.server.get("lr", "?")
        return "clients.lr", self.clients.get("lr", "?")


def _takes_server(use: str) -> bool:
    """Whether a built-in strategy takes `strategy.server`; custom ones are not imported to be asked."""
    if use not in plugins.names("strategies"):
        return False
    from fedlora.suitability import has_mean

    return has_mean(plugins.find("strategies", use))
