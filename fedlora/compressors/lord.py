"""LoRD (Kaushal et al., 2023, https://arxiv.org/abs/2309.14021): the same share of every layer.

Of each layer the k directions in which its outputs vary most are kept, `W -> Q Q^T W` with Q the top eigenvectors
of `W G W^T`, G the second moments of its inputs; the two factors follow each other with nothing between. The paper
centres the outputs first; here they are not, so that no bias need change. Without a statistic G is the identity,
and what comes out is the plain truncated SVD.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedlora.compressors.contract import Kind, LowRank, Spectrum, alike


@dataclass(kw_only=True)
class Lord(LowRank):
    """The directions in which each layer's outputs vary most; by the weights alone the truncated SVD."""

    takes: ClassVar[tuple[Kind, ...]] = ("gram", "mean")

    def ranks(self, layers: Mapping[str, Spectrum]) -> dict[str, int | None]:
        """The same share of each layer's numbers."""
        return alike(layers, self.keep)
