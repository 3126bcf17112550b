"""WeLore (Jaiswal et al., 2024, https://arxiv.org/abs/2407.11239): ranks by the tails of singular values.

    k_l = #{ i : s_i(W_l) / s_1(W_l) >= t },    one threshold t for all layers

Layers whose singular values fall off soon lose much, those with a heavy tail little or nothing; a layer whose k
has more numbers in two factors than in one weight stays whole. t is the least whose ranks cost at most `keep` of
all numbers. It looks at the weights alone. The paper then trains the layers of low rank and rests the others:
`model.adapter.targets` is how a run says that here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedlora.compressors.contract import LowRank, Spectrum, under_budget


@dataclass(kw_only=True)
class WeLore(LowRank):
    """Ranks by the tails of singular values under one threshold; by the weights alone."""

    def ranks(self, layers: Mapping[str, Spectrum]) -> dict[str, int | None]:
        """Directions whose singular value is at least a part of the layer's largest."""
        tiny = np.finfo(float).tiny
        offers = {name: s.values / max(s.values.max(initial=0.0), tiny) for name, s in layers.items()}
        return under_budget(layers, self.keep, offers)
