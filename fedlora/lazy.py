"""Matrices that are known by their products: the change of a weight that is no product of two thin factors.

A change of a layer (out x in) is never made whole where it can be had in parts: it is multiplied by a block of
columns at a time, and inner products in Frobenius's sense are sums over such blocks,

    <M, N>_F = sum over blocks X of the identity of <M X, N X>_F

All of it is done in float64.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora import factors
from fedlora.factors import Factors, Matrix

BLOCK = 512
"""Columns that are made at once."""


class Lazy(ABC):
    """A matrix (out x in) that need not be at hand."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @abstractmethod
    def times(self, columns: Matrix) -> Matrix:
        """The product with columns (in x k), (out x k)."""

    @abstractmethod
    def factors(self) -> Factors:
        """The same as a product of two, as thin as they are at hand: (out x m) and (m x in)."""

    def blocks(self) -> Iterator[Matrix]:
        """Its columns, some at a time, from the first on."""
        into = self.shape[1]
        for begin in range(0, into, BLOCK):
            count = min(BLOCK, into - begin)
            yield self.times(np.eye(into, count, -begin))


@dataclass(frozen=True)
class Thin(Lazy):
    """`left @ right`, of (out x m) and (m x in)."""

    left: NDArray[np.floating]
    right: NDArray[np.floating]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0], self.right.shape[1]

    def times(self, columns: Matrix) -> Matrix:
        """From the right, so that nothing large is made."""
        made: Matrix = self.left.astype(np.float64) @ (self.right.astype(np.float64) @ columns)
        return made

    def factors(self) -> Factors:
        """Itself."""
        return self.left, self.right


@dataclass(frozen=True)
class Scattered(Lazy):
    """Values at some places, and zeros.

    Attributes:
        rows: of the values, (n,).
        columns: of the values, (n,); no place twice.
        values: (n,).
        size: (out, in).
    """

    rows: NDArray[np.integer]
    columns: NDArray[np.integer]
    values: NDArray[np.floating]
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.size

    def times(self, columns: Matrix) -> Matrix:
        """A sum over the values alone."""
        from scipy.sparse import csr_array

        made: Matrix = csr_array((self.values.astype(np.float64), (self.rows, self.columns)), self.size) @ columns
        return made

    def factors(self) -> Factors:
        """The rows that hold any, each at its place; or the columns, where these are fewer."""
        out, into = self.size
        (rows, row), (columns, column) = (np.unique(x, return_inverse=True) for x in (self.rows, self.columns))
        if len(rows) <= len(columns):
            right = np.zeros((len(rows), into))
            right[row, self.columns] = self.values
            return np.eye(out)[:, rows], right
        left = np.zeros((out, len(columns)))
        left[self.rows, column] = self.values
        return left, np.eye(into)[columns]


@dataclass(frozen=True)
class Whole(Lazy):
    """A matrix that is at hand."""

    matrix: NDArray[np.floating]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def times(self, columns: Matrix) -> Matrix:
        """The plain product."""
        made: Matrix = self.matrix.astype(np.float64) @ columns
        return made

    def factors(self) -> Factors:
        """It and an identity."""
        return _whole(self.matrix)


@dataclass(frozen=True)
class Total(Lazy):
    """`sum_k w_k M_k`, of matrices of one shape.

    Attributes:
        terms: of each its weight and the matrix; one at least.
    """

    terms: Sequence[tuple[float, Lazy]]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.terms[0][1].shape

    @property
    def thin(self) -> bool:
        """Whether all terms are products of thin factors."""
        return all(isinstance(m, Thin) or (isinstance(m, Total) and m.thin) for _, m in self.terms)

    def times(self, columns: Matrix) -> Matrix:
        """Term by term."""
        made = np.zeros((self.shape[0], columns.shape[1]))
        for weight, term in self.terms:
            made += weight * term.times(columns)
        return made

    def factors(self) -> Factors:
        """Those of all terms, stacked; where that is wider than the matrix, it and an identity."""
        left, right = factors.stack((weight, *term.factors()) for weight, term in self.terms)
        if left.shape[1] < min(self.shape):
            return left, right
        return _whole(left @ right)


def _whole(matrix: NDArray[np.floating]) -> Factors:
    out, into = matrix.shape
    return (np.eye(out), matrix) if out < into else (matrix, np.eye(into))


def inner(one: Lazy, other: Lazy) -> float:
    """`<M, N>_F`, a block of columns at a time."""
    return float(sum((left * right).sum() for left, right in zip(one.blocks(), other.blocks(), strict=True)))


def norm(matrix: Lazy) -> float:
    """`|| M ||_F`; of thin factors by way of these, else a block of columns at a time."""
    if isinstance(matrix, Thin):
        return factors.norm(matrix.left, matrix.right)
    if isinstance(matrix, Total) and matrix.thin:
        return factors.norm(*factors.stack((weight, *term.factors()) for weight, term in matrix.terms))
    return float(np.sqrt(sum(float(np.square(block).sum()) for block in matrix.blocks())))
