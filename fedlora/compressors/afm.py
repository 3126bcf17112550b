"""AFM, atomic feature mimicking (Yu and Wu, 2023, https://ojs.aaai.org/index.php/AAAI/article/view/26304).

Features are of low rank where weights are not. So, as in the compression of ranking models that builds on it
(https://arxiv.org/abs/2405.18146), of each layer those directions are kept in which its outputs vary most,

    W -> Q Q^T W,   Q the top eigenvectors of W G W^T, G the second moments of the inputs

and layers share one budget: every layer keeps the same part of the energy of its outputs, the most that `keep`
pays for, so that layers with simple outputs get less. The paper centres outputs and puts their mean into the bias;
here they are not centred, and the mean is a direction like others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora.compressors.contract import Kind, LowRank, Spectrum, under_budget


@dataclass(kw_only=True)
class Afm(LowRank):
    """The directions of most energy in each layer's outputs, the same part of it in every layer."""

    takes: ClassVar[tuple[Kind, ...]] = ("gram",)
    needs: ClassVar[bool] = True

    def ranks(self, layers: Mapping[str, Spectrum]) -> dict[str, int | None]:
        """The least ranks that leave the same part of the energy of each layer out."""
        left = {}
        for name, s in layers.items():
            energy = s.values**2
            total = max(energy.sum(), np.finfo(float).tiny)
            # What is left out before each direction is taken: 1 before the first, and falling.
            left[name] = energy[::-1].cumsum()[::-1] / total
        return under_budget(layers, self.keep, left)
