"""What an evaluation has beyond a pass over its rows, where the scenario asks for it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.examples import Examples
from fedlora.engine import representations
from fedlora.engine.setup import Half
from fedlora.metrics.written import WRITTEN
from fedlora.scenario import Scenario
from fedlora.tasks.contract import Task


def more(
    scenario: Scenario, task: Task, half: Half, examples: Examples, rows: NDArray[np.int64]
) -> dict[str, Any]:
    """Sums beside those of the pass: of answers that the model writes, and of how far representations spread.

    Args:
        scenario: says what is asked for.
        task: as the pass left it.
        half: which rows these are of.
        examples: of that half.
        rows: their numbers, one after another.
    """
    found: dict[str, Any] = {}
    first, asked, model = int(rows[0]), scenario.exact_match, scenario.model
    writes = half == "test" or scenario.chosen_by(task.metric) in WRITTEN
    if asked and writes and first < asked.examples:
        found |= task.written(lambda: task.reader(model.base, model.revision), examples, rows, asked)
    if scenario.diagnostics and half == "test" and first == 0:
        found |= representations.measured(task, examples, rows)
    return found
