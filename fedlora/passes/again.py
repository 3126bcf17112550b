"""Gradient checkpointing: of each block its input is kept, and what is inside is made again on the way back.

The gradient of each example stays what it was. Layers that leave it by a product of their own do so on the way
back, which is gone once; what Opacus's hooks note on the way there is not noted a second time.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from fedlora.errors import SettingError


class Again:
    """Whether a pass goes through a block for the second time.

    Attributes:
        now: it does.
    """

    def __init__(self) -> None:
        self.now = False

    def enable(self, model: Any) -> None:
        """Let the blocks of a model of transformers keep their inputs alone.

        Raises:
            SettingError: it has none that can.
        """
        from torch.utils.checkpoint import checkpoint

        function = partial(
            checkpoint,
            use_reentrant=False,
            preserve_rng_state=False,  # without dropout nothing is drawn
            context_fn=lambda: (contextlib.nullcontext(), self._second()),
        )
        try:
            if not model.supports_gradient_checkpointing:
                raise ValueError
            model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
        except ValueError:
            name = type(model).__name__
            raise SettingError(
                "model.checkpointing", f"transformers has no checkpoints for {name}: leave it out"
            ) from None

    @contextlib.contextmanager
    def _second(self) -> Iterator[None]:
        self.now = True
        try:
            yield
        finally:
            self.now = False
