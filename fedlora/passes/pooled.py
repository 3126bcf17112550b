"""What a classifier's head reads of a text: one of its tokens, or the mean over all of them.

`model.pooling: mean` has it read the mean, as sentence encoders were trained to (Reimers and Gurevych, 2019,
https://arxiv.org/abs/1908.10084):

    u = (1 / n) sum_t h_t

over the n tokens of a text, those that begin and end it too, in the last layer's states h. A pooler of the body is
left out. Models whose configuration has `classifier_pooling` do that by themselves.

T5 and BART read the token that ends a text. They look for it in all examples of a pass together, and refuse the
pass where they hold it in different numbers: one text that spells it would end everybody's. They read the last
one. So the head sees that one alone, and what is below the head sees the text as it is.
"""

from typing import TYPE_CHECKING, Any, Literal

from fedlora.errors import SettingError
from fedlora.tasks.base_model import body_of

if TYPE_CHECKING:
    import torch


Pooling = Literal["cls", "mean"]

_OWN = "classifier_pooling"  # in a configuration of transformers: the same, where a model has the choice


def tell(config: Any, pooling: Pooling | None) -> None:
    """Set it in the configuration of a model that has the choice; None leaves it as it is."""
    if pooling is not None and known(config):
        setattr(config, _OWN, pooling)


def known(config: Any) -> bool:
    """Whether transformers itself pools as a configuration says, or one as plain data."""
    return _OWN in config if isinstance(config, dict) else hasattr(config, _OWN)


def pool(model: Any, pooling: Pooling | None) -> None:
    """Have a classifier of transformers read the first token of a text, or the mean over its tokens.

    Args:
        model: without an adapter, of a configuration that was told.
        pooling: None: as the model does.

    Raises:
        SettingError: it is no encoder, such as a decoder that reads the last token.
    """
    import torch
    from transformers import AutoModelForMaskedLM

    if pooling is None or known(model.config):
        return
    if model.config.is_encoder_decoder or type(model.config) not in AutoModelForMaskedLM._model_mapping:
        raise SettingError(
            "model.pooling",
            f"{type(model).__name__} is no encoder whose head reads the first token: leave model.pooling out",
        )
    if pooling == "mean":
        body = body_of(model)[1]
        if isinstance(getattr(body, "pooler", None), torch.nn.Module) and type(body.pooler) is not torch.nn.Linear:
            body.pooler = torch.nn.Identity()
        Mean(body)


class Mean:
    """Gives the mean over the tokens of a text in the place of its first token, and of what the body pools."""

    def __init__(self, body: Any) -> None:
        """Hook into a body: it is given padded batches, and ends with them, whatever lies between."""
        self._mask: torch.Tensor | None = None
        body.register_forward_pre_hook(self._enter, with_kwargs=True)
        body.register_forward_hook(self._leave)

    def _enter(self, body: Any, args: tuple[Any, ...], told: dict[str, Any]) -> None:
        self._mask = told.get("attention_mask")

    def _leave(self, body: Any, args: tuple[Any, ...], output: Any) -> None:
        states = output.last_hidden_state  # (examples, longest, width)
        mask = states.new_ones(states.shape[:2]) if self._mask is None else self._mask
        own = mask.to(states.dtype).unsqueeze(-1)
        mean = ((states * own).sum(1, keepdim=True) / own.sum(1, keepdim=True)).to(states.dtype)
        output.last_hidden_state = mean  # (examples, 1, width)
        if "pooler_output" in output:
            output.pooler_output = mean[:, 0]


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
