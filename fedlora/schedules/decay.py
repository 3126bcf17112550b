"""Rank decay (Trained Rank Pruning, Xu et al., 2020, https://arxiv.org/abs/2004.04576): small directions fade.

After every k-th round, of each layer's change with the singular values s_1 >= s_2 >= ...

    change = U diag(s) V^T  ->  U diag(s_1 .. s_m, f s_(m+1), f s_(m+2), ..) V^T

where m is the fewest directions that hold a share of the energy `sum_i s_i^2`, and f < 1 is what is left of the
others. So a rank that the change does not need goes away over the rounds, as in QVGen's training (2505.11497);
under privacy much of what is in small directions is noise. It is a function of the aggregate alone. The change
stays where the frozen parts can write it, because both sides of a direction do.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from fedlora import plugins
from fedlora.adapter import Tensor
from fedlora.factors import Matrix, energy_rank, single
from fedlora.kinds.contract import Kind, modules_of
from fedlora.schedules.contract import Schedule, Turned


@dataclass(kw_only=True)
class Decay(Schedule):
    """Every few rounds the directions of each layer's change that hold little of its energy are made smaller."""

    every: int = 1
    share: float = 0.9
    factor: float = 0.5

    def refuses(self, kind: Kind, trained: Collection[str]) -> str | None:
        """A matrix must train: one between orthonormal frames, or B before as many rows of A."""
        name, role = plugins.called(type(kind)), _role(kind)
        if role is None or not kind.thin:
            return f"{name} trains no matrix whose directions could fade"
        if {each for each in kind.parts if kind.trains(each)} - {"A", role}:
            return f"{name} trains more than one matrix beside a layer"
        if role == "B" and kind.beside("A", 2, 2)[0] != kind.beside("B", 2, 2)[1]:
            return f"{name} has columns of B that share a row of A, and these are no directions"
        return None

    def after(self, round: int, adapter: Mapping[str, Tensor]) -> Turned:
        """After every k-th round the matrices that train, with their small directions made smaller."""
        if round % self.every:
            return Turned({})
        role = _role(self.kind)
        assert role is not None
        rows = dict(modules_of(self.layout, "A"))
        after = {}
        for module, name in modules_of(self.layout, role):
            matrix = (
                adapter[name].astype(np.float64).reshape(len(adapter[name]), -1)
            )  # of a convolution's core too
            if role == "B":  # B A = (B R^T) Q^T, with Q's columns orthonormal
                upper = np.linalg.qr(adapter[rows[module]].T.astype(np.float64)).R
                after[name] = single(np.linalg.lstsq(upper, self.faded(matrix @ upper.T).T, rcond=None)[0].T)
            else:
                after[name] = single(self.faded(matrix)).reshape(adapter[name].shape)
        return Turned(after)

    def faded(self, matrix: Matrix) -> Matrix:
        """A matrix, with its small directions made smaller."""
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        s[energy_rank(s, self.share) :] *= self.factor
        made: Matrix = u * s @ vt
        return made


def _role(kind: Kind) -> str | None:
    """The role of the matrix that trains beside each layer; None where there is none."""
    return next((role for role in ("core", "B") if role in kind.parts and kind.trains(role)), None)
