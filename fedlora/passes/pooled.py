"""Encoder-decoders that classify by the token that ends a text, where a text holds that token more than once.

T5 and BART look for it in all examples of a pass together, and refuse the pass where they hold it in different
numbers: one text that spells it would end everybody's. They read the last one. So the head sees that one alone,
and what is below the head sees the text as it is.
"""

from typing import TYPE_CHECKING, Any

from fedlora.tasks.base_model import body_of

if TYPE_CHECKING:
    import torch


class Ending:
    """Shows a classifier the last token that ends a text, and its body all of the text."""

    def __init__(self, model: Any) -> None:
        """Hook into a model of transformers that is an encoder-decoder with a head."""
        config = model.config
        self._end, self._other = int(config.eos_token_id), int(config.pad_token_id)
        self._whole: torch.Tensor | None = None
        model.register_forward_pre_hook(self._show, with_kwargs=True)
        body_of(model)[1].register_forward_pre_hook(self._restore, with_kwargs=True)

    def _show(self, model: Any, args: tuple[Any, ...], told: dict[str, Any]) -> Any:
        ids = self._whole = told["input_ids"]
        ends = ids == self._end
        later = ends.flip(1).cumsum(1).flip(1) > 1  # of which there is another further on
        return args, {**told, "input_ids": ids.masked_fill(ends & later, self._other)}

    def _restore(self, body: Any, args: tuple[Any, ...], told: dict[str, Any]) -> Any:
        import torch

        whole = self._whole
        if args:
            args = (whole, *args[1:])
        else:
            told = {**told, "input_ids": whole}
        if (moved := told.get("decoder_input_ids")) is not None and whole is not None:  # by one, after a start
            told = {**told, "decoder_input_ids": torch.cat([moved[:, :1], whole[:, :-1]], 1)}
        return args, told
