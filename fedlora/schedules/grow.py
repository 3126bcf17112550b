"""Growth, after IncreLoRA (Zhang et al., 2023, https://arxiv.org/abs/2308.12043): begin small, and add parts.

After every k-th round the rank rises by a stated number, or the next blocks of the model begin to train:

    rank in round t = min(r, begin + floor((t - 1) / k) by)

A column that joins is zero in B, with its row of A from the seed, and a block that joins has a change of zero: the
function stays as it was. What does not train yet does not travel, so that early rounds send less; under privacy
one clipping bound and one noise for each number are over fewer numbers. At a lower rank the scaling is that of
clients of that rank, `alpha / rank`, and what was learnt is divided accordingly.

IncreLoRA adds where scores of importance are high. Here rounds and numbers are stated beforehand: nothing is
looked at, and the bytes are known before the run.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from fedlora.adapter import Layout, Tensor
from fedlora.errors import SettingError
from fedlora.kinds.contract import Kind
from fedlora.schedules.contract import Schedule, Shapes, Turned


@dataclass(kw_only=True)
class Grow(Schedule):
    """The rank, or the number of upper blocks that train, rises at stated rounds."""

    of: Literal["rank", "layers"] = "rank"
    begin: int = 1
    by: int = 1
    every: int = 5

    @property
    def unequal(self) -> bool:
        """Below the server's rank at first."""
        return self.of == "rank"

    @property
    def narrows(self) -> bool:
        """By blocks."""
        return self.of == "layers"

    def bind(self, layout: Layout, kind: Kind, seed: int, shapes: Shapes) -> None:
        """As every schedule; where blocks are to join they must have numbers.

        Raises:
            SettingError: a layer has none.
        """
        super().bind(layout, kind, seed, shapes)
        if self.narrows and (odd := next((m for m in shapes if block_of(m) is None), None)):
            raise SettingError(
                "model.adapter.schedule.of", f"layers: {odd} is in no numbered block: take rank, or leave it out"
            )

    def layers(self, round: int) -> Collection[str] | None:
        """Those of the last blocks, as many as have joined; None where all train."""
        if not self.narrows:
            return None
        blocks = sorted({block_of(module) or 0 for module in self.shapes})
        joined = blocks[-(self.begin + (round - 1) // self.every * self.by) :]
        return [module for module in self.shapes if block_of(module) in joined]

    def after(self, round: int, adapter: Mapping[str, Tensor]) -> Turned:
        """Nothing: what joins was zero all along."""
        return Turned({})


def block_of(module: str) -> int | None:
    """The number of the block that a layer is in: the first in its name; None without one."""
    found = re.search(r"(?:^|\.)(\d+)\.", module)
    return int(found.group(1)) if found else None
