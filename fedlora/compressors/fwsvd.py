"""FWSVD (Hsu et al., 2022, https://arxiv.org/abs/2207.00112): an SVD weighted by what the loss says.

With f_j the mean over examples of the squared gradient of the weights that input j meets, summed over outputs
(the paper keeps weights as in x out, and calls j a row), and D = diag(sqrt f):

    W -> U_k U_k^T W,   U_k the first left singular vectors of W D        (the paper: svd_k(W D) D^-1, the same)

It is the best of rank k where an error at input j counts f_j. With `mean` f_j is the mean square of input j: then
what counts is the error of the outputs, as far as inputs vary by themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedlora.compressors.contract import Kind, LowRank, Spectrum, alike


@dataclass(kw_only=True)
class Fwsvd(LowRank):
    """A truncated SVD in which each input counts as much as the loss feels it."""

    takes: ClassVar[tuple[Kind, ...]] = ("row_fisher", "mean")
    needs: ClassVar[bool] = True

    def ranks(self, layers: Mapping[str, Spectrum]) -> dict[str, int | None]:
        """The same share of each layer's numbers."""
        return alike(layers, self.keep)
