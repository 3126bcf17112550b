"""Algebra of thin matrices: sums of low-rank products, and rows that come one by one, without the large matrix.

A pair of factors (left: out x m, right: m x in) stands for `left @ right`. A weighted sum of such products
is one pair again, with the factors stacked; its norm and its singular vectors come from two thin QRs and
an m x m core. All of it costs O(m^2 (out + in)), never O(out in), and is done in float64.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Factors = tuple[NDArray[np.floating], NDArray[np.floating]]


def stack(parts: Iterable[tuple[float, NDArray[np.floating], NDArray[np.floating]]]) -> tuple[Matrix, Matrix]:
    """`sum_k w_k left_k right_k` as one pair of factors, exactly.

    Args:
        parts: of each term its weight, left (out x m_k) and right (m_k x in).

    Returns:
        left (out x sum m_k) and right (sum m_k x in).
    """
    weights, lefts, rights = zip(*parts, strict=True)
    return (
        np.concatenate([w * left.astype(np.float64) for w, left in zip(weights, lefts, strict=True)], axis=1),
        np.concatenate([right.astype(np.float64) for right in rights], axis=0),
    )


def norm(left: NDArray[np.floating], right: NDArray[np.floating]) -> float:
    """`|| left right ||_F`."""
    upper_left = np.linalg.qr(left.astype(np.float64)).R  # (min(out, m), m)
    upper_right = np.linalg.qr(right.T.astype(np.float64)).R  # (min(in, m), m)
    return float(np.linalg.norm(upper_left @ upper_right.T))


def svd(left: NDArray[np.floating], right: NDArray[np.floating]) -> tuple[Matrix, Matrix, Matrix]:
    """The thin singular value decomposition of `left right`.

    Returns:
        U (out x k), the singular values (k,) descending, and V^T (k x in), with k the least of m, out and in.
        The sign that an SVD leaves open is such that the largest entry of each row of V^T is positive.
    """
    q_left, upper_left = np.linalg.qr(left.astype(np.float64))
    q_right, upper_right = np.linalg.qr(right.T.astype(np.float64))
    u, s, vt = np.linalg.svd(upper_left @ upper_right.T, full_matrices=False)
    vt = vt @ q_right.T
    sign = np.sign(np.take_along_axis(vt, np.abs(vt).argmax(1, keepdims=True), 1))  # (k, 1)
    return q_left @ u * sign.T, s, vt * sign


def compact(left: NDArray[np.floating], right: NDArray[np.floating]) -> tuple[Matrix, Matrix]:
    """The same product, with no more columns than the smaller side of the matrix that it stands for."""
    least = min(left.shape[0], right.shape[1])
    return shorten(left, right) if left.shape[1] > least else (left.astype(np.float64), right.astype(np.float64))


def energy_rank(s: Matrix, share: float) -> int:
    """The fewest of descending singular values whose squares hold a share of the sum; 0 where all are zero."""
    energy = np.cumsum(s**2)
    if not energy.size or not energy[-1] > 0:
        return 0
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12)) + 1)


def split(
    u: Matrix, s: Matrix, vt: Matrix, a: NDArray[np.float32], shared: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """B (out x r) and A (r x in) whose product is the first r directions of `U S V^T`.

    Directions without any weight teach neither factor again if both are zero there: these rows of A stay.

    Args:
        u: left singular vectors, (out, k).
        s: their values, descending, (k,).
        vt: right singular vectors, (k, in).
        a: the A before, (r, in).
        shared: whether both factors take the root of the values, or B takes them whole.
    """
    r = min(len(a), int((s > 1e-7 * s[:1].sum()).sum()))
    new_b, new_a = np.zeros((len(u), len(a)), np.float32), a.copy()
    values = np.sqrt(s[:r]) if shared else s[:r]
    new_b[:, :r] = single(u[:, :r] * values)
    new_a[:r] = single(vt[:r] * values[:, None] if shared else vt[:r])
    return new_b, new_a


def single(matrix: NDArray[np.floating]) -> NDArray[np.float32]:
    """A matrix in float32; what is too large for it is as large as it can be."""
    most = np.finfo(np.float32).max
    clipped: NDArray[np.float32] = np.clip(matrix, -most, most).astype(np.float32)
    return clipped


def shorten(left: NDArray[np.floating], right: NDArray[np.floating]) -> tuple[Matrix, Matrix]:
    """The same product with as few columns as its numerical rank needs; each side takes the root of the values."""
    u, s, vt = svd(left, right)
    rank = int((s > 1e-7 * s[:1].sum()).sum())
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, vt[:rank] * root[:, None]


def top_direction(rows: Iterable[NDArray[np.floating]], held: int = 8) -> tuple[Matrix, float]:
    """The direction in which rows differ most, in one pass and in the memory of `2 held + 2` rows.

    With c the mean of the rows, it is the top right singular vector of the rows minus c. These are held in a
    sketch (Frequent Directions: Ghashami et al., 2016, https://arxiv.org/abs/1501.01711), whatever order they come
    in: exact up to `2 held + 1` rows, and beyond them short of the largest sum of squares along any direction by
    at most `1 / held` of what is not along the top one.

    Args:
        rows: of one length, d.
        held: directions that the sketch keeps when it is full.

    Returns:
        The direction (d,), of norm 1, or zeros where all rows are alike; and `sum_k || row_k - c ||^2`.
    """
    count, used, total = 0, 0, 0.0
    mean, sketch = np.zeros(0), np.zeros((0, 0))
    for row in rows:
        if count == 0:
            mean, sketch = row.astype(np.float64), np.zeros((2 * held, len(row)))
        step = row - mean
        mean += step / (count + 1)
        if count:  # what this row adds to the products of rows around their mean
            if used == len(sketch):
                _halve(sketch, held)
                used = held
            sketch[used] = step * (count / (count + 1)) ** 0.5
            total += float(sketch[used] @ sketch[used])
            used += 1
        count += 1
    if not total > 0:
        return np.zeros_like(mean), 0.0
    _, turn = np.linalg.eigh(sketch[:used] @ sketch[:used].T)
    top = turn[:, -1] @ sketch[:used]
    return top / np.linalg.norm(top), total


def _halve(sketch: Matrix, held: int) -> None:
    """Turn a sketch (2 held, d) so that its first rows are its top directions, and take the next one off each."""
    values, turn = np.linalg.eigh(sketch @ sketch.T)  # ascending
    values, turn = values[::-1], turn[:, ::-1]
    left = np.clip(values[:held] - values[held], 0, None)
    share = np.sqrt(np.divide(left, values[:held], out=np.zeros(held), where=values[:held] > 0))
    sketch[:held] = (turn[:, :held] * share).T @ sketch
    sketch[held:] = 0
