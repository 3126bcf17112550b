"""Which round is the best, by rows of the server's own that report nothing else, and when a run need not go on.

The rows that choose (`data.validation_share`) are no client's, so choosing costs no epsilon. They are not those
that report: what is reported was not chosen by.
"""

from dataclasses import dataclass

from fedlora.errors import SettingError, suggestion
from fedlora.metrics import contract as metrics
from fedlora.metrics.written import WRITTEN
from fedlora.rounds.progress import Best, Line, Progress
from fedlora.scenario import Scenario
from fedlora.tasks.contract import find

OF_VALIDATION = "validation_"  # before the names of figures on the rows that choose


@dataclass(frozen=True, kw_only=True)
class Choice:
    """By what rounds are told apart.

    Attributes:
        figure: its name in a round's line.
        higher: whether more of it is better.
        keeps: whether the run ends with the adapter of its best round.
        patience: evaluations in a row without a better one after which it ends; None: it goes on.
    """

    figure: str
    higher: bool
    keeps: bool
    patience: int | None

    def see(self, line: Line, now: Progress) -> None:
        """Take in what was measured after the round that `now` is at."""
        value, best = line[self.figure], now.best
        before = None if best is None else best.figures[self.figure]
        if value is None or value != value:
            better = False
        else:
            better = before is None or (value > before if self.higher else value < before)
        now.waited = 0 if better else now.waited + 1
        if better:
            now.best = Best(round=now.round, merges=now.merges, figures=dict(now.last), adapter=now.adapter)

    def ends(self, now: Progress) -> str | None:
        """Why there should be no further round; None if there should."""
        if self.patience is None or now.waited < self.patience:
            return None
        than = f"than after round {now.best.round}" if now.best else "that is a number"
        return f"after round {now.round}: no better {self.figure} {than} in {now.waited} evaluations"


def make(scenario: Scenario, metric: str, higher_is_better: bool) -> Choice | None:
    """The choice that a scenario asks for; None where it asks for none.

    Args:
        scenario: of the run.
        metric: of the task.
        higher_is_better: whether more of that is.

    Raises:
        SettingError: it names a figure that no evaluation gives.
    """
    if (name := scenario.chosen_by(metric)) is None:
        return None
    known = directions(scenario, metric, higher_is_better)
    if name not in known:
        raise SettingError("keep.best", f"an evaluation here has no {name!r}: {suggestion(name, known)}")
    return Choice(
        figure=f"{OF_VALIDATION}{name}",
        higher=known[name],
        keeps=scenario.keep != "last",
        patience=scenario.stop.patience if scenario.stop else None,
    )


def directions(scenario: Scenario, metric: str, higher_is_better: bool) -> dict[str, bool]:
    """The figures that an evaluation gives by name, and of each whether more of it is better.

    Args:
        scenario: of the run.
        metric: of the task.
        higher_is_better: whether more of that is.

    Raises:
        SettingError: it names a metric that is not there.
    """
    asked = metrics.find_all(scenario.metrics, find(scenario.task).target)
    known = {"loss": False, **(dict.fromkeys(WRITTEN, True) if scenario.exact_match else {})}
    return {**known, **{one.name: one.higher_is_better for one in asked}, metric: higher_is_better}
