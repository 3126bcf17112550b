"""Block-LoRA (Zhou et al., 2025, https://arxiv.org/abs/2501.16720): B in n blocks over one shared block of A.

    W' = W + alpha / r * sum_i B_i A0,   A0 (r / n x in) drawn as LoRA's, B_i (out x r / n) zero at first

The blocks of A that the paper shares are drawn once and frozen here, so that the change is linear in what travels.
With n = 2 blocks it equals a LoRA of rank r / 2 whose B is B_1 + B_2: it can write no more, and sends twice as
much as FFA-LoRA of rank r / 2. All blocks have the same gradient. Without privacy that is a learning rate n times
as high. Under privacy each block has noise of its own, so that the sum has sqrt(n) times the noise of FFA-LoRA of
rank r / n at the same factor; a clipped gradient, as long over all blocks, moves the sum by sqrt(n) as much too.

The columns of B over one row of A0 are neighbours, so that a client of a lower rank holds whole rows of A0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedlora.adapter import Change, Layout, Slot, Tensor, pairs
from fedlora.errors import SettingError
from fedlora.kinds.contract import Facts, Gradients
from fedlora.kinds.frames import Still


@dataclass(frozen=True)
class Block(Still):
    """A weight's change is `alpha / r * (B_1 + B_2) @ A0`: blocks of B over one frozen block of A."""

    ordinary: ClassVar[bool] = False
    gradients: ClassVar[Gradients] = "hooks"
    facts: ClassVar[Facts] = Facts("B (2 blocks)", "s sqrt(out r / 3)")
    blocks: ClassVar[int] = 2

    @property
    def width(self) -> int:
        """Rows of A0."""
        return self._rows(self.r)

    def _rows(self, rank: int) -> int:
        return max(1, rank // self.blocks)

    def wrap(self, model: Any, heads: Sequence[str], task_type: str | None) -> Any:
        """As LoRA, with each of A0's outputs given to every block.

        Raises:
            SettingError: r is no multiple of the blocks.
        """
        import torch

        from fedlora.kinds.modules import Copies

        if self.r % self.blocks:
            raise SettingError(
                "model.adapter.r", f"block shares a row of A among {self.blocks} columns of B: take r {self.r + 1}"
            )
        wrapped = super().wrap(model, heads, task_type)
        for name, module in list(wrapped.named_modules()):
            if name.endswith(".lora_B"):
                last = torch.nn.Linear(self.r, module["default"].out_features, bias=False)
                module["default"] = torch.nn.Sequential(Copies(self.blocks), last)
        return wrapped

    def shape(self, slot: Slot, rank: int) -> tuple[int, ...]:
        """Whole rows of A0, one at least, and the columns of B over them."""
        rows = self._rows(rank)
        return super().shape(slot, rows if slot.role == "A" else rows * self.blocks)

    def change(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Change:
        """The sum of B's blocks, and A0."""
        summed = {
            layout[b].module: (adapter[b].reshape(len(adapter[b]), -1, self.blocks).sum(2), adapter[a])
            for b, a in pairs(layout)
        }
        return summed

    def spread(self, b: Tensor) -> Tensor:
        """Each block as large."""
        return np.repeat(b, self.blocks, axis=1) / np.float32(self.blocks)

    def noise_gain(self, layout: Layout, adapter: Mapping[str, Tensor], moving: Any) -> dict[str, float]:
        """LoRA's, times the root of how many blocks are summed."""
        plain = super().noise_gain(layout, adapter, moving)
        return {module: gain * self.blocks**0.5 for module, gain in plain.items()}
