"""`fedlora predict --all-pairs`: the best of many texts for each of many others, by a model that judges pairs.

A model of pairs reads both texts together, so scoring all pairs takes a pass for each. Here all texts are scored
against a few of the other side, drawn from a seed, and the rest follows by a CUR decomposition: with C the scores
against `anchors` columns, R those of twice as many rows, and W where they meet, `S ~ C pinv(W) R` (Yadav et al.
2022, https://arxiv.org/abs/2210.12579). What looks best for a text is scored by the model, and ranked by that.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora import seeding
from fedlora.errors import UserError, suggestion
from fedlora.exporting import About, adapter_of, load_adapter, task_of
from fedlora.record import Record
from fedlora.tasks.base_model import text_kinds

Scores = NDArray[np.float64]
Score = Callable[[NDArray[np.intp], NDArray[np.intp]], Scores]
"""The scores of pairs, by numbers of their left and right texts: both of shape (k,), and so is the result."""

_BATCH = 64  # pairs of a pass
_SMALL = 1e-3  # of the largest singular value of W: smaller ones are noise of the rest of S, and are left out


@dataclass(frozen=True)
class Found:
    """The best right texts of each left one.

    Attributes:
        best: numbers of right texts, best first, (left, top).
        scores: of these pairs by the model itself, likewise: probabilities of the label, or scores in their units.
        scored: pairs that the model scored.
        pairs: that there are.
        recall: the share of the true best that was found, over the left texts that were checked; None: of none.
        checked: left texts that were scored whole to see that.
    """

    best: NDArray[np.intp]
    scores: Scores
    scored: int
    pairs: int
    recall: float | None
    checked: int


def search(score: Score, shape: tuple[int, int], top: int, anchors: int, check: int, seed: int) -> Found:
    """The best columns of each row of a matrix of which only some numbers are asked for.

    Args:
        score: gives numbers of it.
        shape: of it.
        top: how many of each row.
        anchors: columns that are asked for whole; of rows it is twice as many.
        check: rows that are asked for whole, to see what was missed.
        seed: of which those are.
    """
    rows, columns = shape
    top, chosen = min(top, columns), seeding.generator(seed, "all-pairs")
    across = np.sort(chosen.choice(columns, min(anchors, columns), replace=False))
    down = np.sort(chosen.choice(rows, min(2 * anchors, rows), replace=False))
    tried, every = min(max(2 * top, len(across)), columns), rows * columns
    if asked_for(shape, top, anchors, check) == every:
        whole = score(*(a.ravel() for a in np.indices(shape))).reshape(shape)
        best = _best(whole, top)
        return Found(best, np.take_along_axis(whole, best, 1), every, every, None, 0)
    c, r = _grid(score, np.arange(rows), across), _grid(score, down, np.arange(columns))
    about = c @ (np.linalg.pinv(c[down], rcond=_SMALL) @ r)
    candidates = _best(about, tried)
    left = np.repeat(np.arange(rows), tried)
    exact = score(left, candidates.ravel()).reshape(candidates.shape)
    order = _best(exact, top)
    best = np.take_along_axis(candidates, order, 1)
    some = chosen.choice(np.setdiff1d(np.arange(rows), down), min(check, rows - len(down)), replace=False)
    true = _best(_grid(score, some, np.arange(columns)), top) if len(some) else None
    hits = [len(set(best[i]) & set(t)) / top for i, t in zip(some, true, strict=True)] if true is not None else []
    asked = c.size + r.size + exact.size + len(some) * columns
    recall = float(np.mean(hits)) if hits else None
    return Found(best, np.take_along_axis(exact, order, 1), asked, every, recall, len(some))


def asked_for(shape: tuple[int, int], top: int, anchors: int, check: int) -> int:
    """How many numbers `search` asks for: all, where its few rows and columns would be as many."""
    rows, columns = shape
    across, down = min(anchors, columns), min(2 * anchors, rows)
    few = rows * (across + min(max(2 * min(top, columns), across), columns)) + down * columns
    return rows * columns if few >= rows * columns else few + min(check, rows - down) * columns


def _grid(score: Score, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Scores:
    left, right = (part.ravel() for part in np.meshgrid(rows, columns, indexing="ij"))
    return score(left, right).reshape(len(rows), len(columns))


def _best(scores: Scores, count: int) -> NDArray[np.intp]:
    """The largest of each row, largest first; of equal ones the first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def all_pairs(
    run: Record | str | Path,
    left: Sequence[str],
    right: Sequence[str],
    *,
    top: int = 5,
    anchors: int = 50,
    check: int = 10,
    label: str | None = None,
    seed: int = 0,
    own_code: bool = False,
) -> Found:
    """The best right texts of each left text, by a run's model of pairs.

    Args:
        run: that has ended, its folder, or the folder of an exported adapter.
        left: texts, each the first of its pairs.
        right: texts, each the second.
        top: how many of each left text.
        anchors: right texts that all left ones are scored against; more find more, and cost more.
        check: left texts that are scored against all right ones, to measure what was missed.
        label: by whose log-odds pairs are ranked; by default the last one. Scores are ranked by themselves.
        seed: of which texts are anchors, and which are checked.
        own_code: as `load_adapter` takes it.

    Returns:
        The best of each left text; an (left x right) matrix was never made whole unless that was cheaper.

    Raises:
        UserError: the model judges no pairs, has no such label, or a number is out of its range.
    """
    from tqdm import tqdm

    about = About.read(folder := adapter_of(run))
    task = task_of(about, folder, own_code)
    if not about.pairs:
        raise UserError(f"{folder}: its model judges single texts: --all-pairs is for models of pairs")
    if task.target not in ("class", "score") or (task.target == "class" and len(about.labels) < 2):
        raise UserError(f"{folder}: its task is {about.task}: --all-pairs ranks by a label or by a score")
    if label is not None and (task.target == "score" or label not in about.labels):
        raise UserError(f"--label {label}: {suggestion(label, about.labels)}")
    for name, number, least in (("top", top, 1), ("anchors", anchors, 1), ("check", check, 0), ("seed", seed, 0)):
        if number < least:
            raise UserError(f"--{name}: should be {least} or more")
    if not left or not right:
        raise UserError("--all-pairs: both files need a text at least")
    model, reader = load_adapter(folder, own_code=own_code)
    at = None if task.target == "score" else about.labels.index(label or about.labels[-1])

    def score(rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Scores:
        pairs = [(left[i], right[j]) for i, j in zip(rows, columns, strict=True)]
        order = sorted(range(len(pairs)), key=lambda k: len(pairs[k][0]) + len(pairs[k][1]))
        made = np.empty(len(pairs))
        for some in _batches(order):
            made[some] = _scored(model, reader, [pairs[k] for k in some], about.max_length, at)
            bar.update(len(some))
        return made

    shape = (len(left), len(right))
    with tqdm(total=asked_for(shape, top, anchors, check), unit="pair", disable=None) as bar:  # on a terminal
        found = search(score, shape, top, anchors, check, seed)
    low, high = about.scale or (0.0, 1.0)
    shown = low + (high - low) * found.scores if at is None else 1 / (1 + np.exp(-found.scores))
    return replace(found, scores=shown)


def _batches(order: Sequence[int]) -> Iterator[list[int]]:
    yield from ([*order[i : i + _BATCH]] for i in range(0, len(order), _BATCH))


def _scored(model: Any, reader: Any, pairs: Sequence[tuple[str, str]], max_length: int, at: int | None) -> Scores:
    """The log-odds of a label, or the score, of some pairs."""
    import torch

    told = [[*part] for part in zip(*pairs, strict=True)]
    with torch.inference_mode():
        read = reader(*told, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        known = ("input_ids", "attention_mask", *(["token_type_ids"] if text_kinds(model) > 1 else []))
        out = model(**{key: read[key] for key in known if key in read}).logits.double()
    if at is None:
        return np.asarray(out[:, 0])
    others = torch.cat([out[:, :at], out[:, at + 1 :]], 1)
    return np.asarray(out[:, at] - others.logsumexp(1))
