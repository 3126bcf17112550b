"""How far representations of public text spread: the matrix nuclear norm (https://arxiv.org/abs/2410.10672).

Of the last hidden states of L tokens, (L, D), from which each column's mean is taken and whose rows are then
divided by their lengths, which makes Z, it is the sum of the longest min(L, D) columns

    sum_j || Z[:, j] ||_2 / L

It stands in for the nuclear norm of Z at a cost of O(L D). Where noise makes representations collapse into few
directions, it falls. The paper takes a matrix for each text and the mean over texts. Here the tokens of all texts
are one matrix, so that L is above D where there are enough of them: else the longest columns are chosen among
many, and the sum says more of the choice than of the spread.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.examples import Examples
from fedlora.tasks.contract import Task

NUCLEAR = "nuclear_norm"
TEXTS = 32  # of the test set, from its beginning: a bounded sample, and the same in each round


def matrix_nuclear_norm(states: NDArray[np.floating]) -> float:
    """The norm of the states of some tokens, (tokens, width); 0 where all are alike."""
    away = states.astype(np.float64) - states.mean(0, dtype=np.float64)
    lengths = np.linalg.norm(away, axis=1, keepdims=True)
    rows = np.divide(away, lengths, out=np.zeros_like(away), where=lengths > 1e-12)
    columns = np.sort(np.linalg.norm(rows, axis=0))[::-1]
    return float(columns[: min(rows.shape)].sum() / len(rows))


def states(task: Task, examples: Examples, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
    """The last hidden states of the tokens of some rows, (tokens, width); None where the model has none to show.

    Args:
        task: with an adapter in its model, as an evaluation left it.
        examples: of a dataset.
        rows: the numbers of some.
    """
    import torch

    parts: list[NDArray[np.float32]] = []
    with torch.inference_mode():
        for row in rows:  # one by one, so that nothing is padding
            batch = task.batch(examples, np.array([row]))
            out = task.run(batch, output_hidden_states=True)
            held: Any = getattr(out, "hidden_states", None) or getattr(out, "decoder_hidden_states", None)
            if held is None:
                return None
            parts.append(held[-1].flatten(0, -2).float().cpu().numpy())
    return np.concatenate(parts) if parts else None


def measured(task: Task, examples: Examples, rows: NDArray[np.int64]) -> dict[str, float]:
    """The norm over the first of some rows, by its name; nothing where it cannot be had."""
    found = states(task, examples, rows[:TEXTS])
    return {} if found is None else {NUCLEAR: matrix_nuclear_norm(found)}
