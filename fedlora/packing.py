"""Padding-free passes: inside a model's body, the examples of a batch are one row of real tokens.

Linear layers, norms and embeddings work token by token, so they run on the row as it is. Attention alone
must keep the examples apart: queries, keys and values are laid out as a small padded batch for the
products, and what comes out is a row again. All around the body sees an ordinary padded batch.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fedlora.errors import ContractError

if TYPE_CHECKING:
    import torch

NAME = "fedlora_packed"  # of the attention function, as transformers registers it
_SHORT = 256  # tokens: up to here, the backward pass of torch's fused attention is slower than plain products


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the tokens of each example lie.

    Attributes:
        mask: which cells of the padded batch hold a token, (examples, longest).
    """

    mask: "torch.Tensor"

    @cached_property
    def cells(self) -> "torch.Tensor":
        """The cell of the flattened padded batch that each token of the row comes from, (tokens,)."""
        return self.mask.flatten().nonzero()[:, 0]

    @cached_property
    def positions(self) -> "torch.Tensor":
        """The place of each token in its own example, from 0, (1, tokens)."""
        return self.row(self.mask.long().cumsum(1) - 1)

    def row(self, batch: "torch.Tensor") -> "torch.Tensor":
        """The tokens of a padded batch: (examples, longest, ...) to (1, tokens, ...)."""
        return batch.flatten(0, 1).index_select(0, self.cells).unsqueeze(0)

    def batch(self, row: "torch.Tensor") -> "torch.Tensor":
        """The padded batch of a row, with zeros for padding: (1, tokens, ...) to (examples, longest, ...)."""
        shape = row.shape[2:]
        empty = row.new_zeros((self.mask.numel(), *shape))
        return empty.index_copy(0, self.cells, row[0]).view(*self.mask.shape, *shape)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        lengths: list[int] = self.mask.sum(1).tolist()
        return lengths

    def bias(self, causal: bool) -> "torch.Tensor":
        """What is added to attention scores: 0 or -inf, (examples, 1, 1 or longest, longest)."""
        return self._causal if causal else self._bidirectional

    @cached_property
    def _bidirectional(self) -> "torch.Tensor":
        return self._additive(self.mask[:, None, None, :])

    @cached_property
    def _causal(self) -> "torch.Tensor":
        longest = self.mask.shape[1]
        return self._additive(self.mask[:, None, None, :] & self.mask.new_ones((longest, longest)).tril())

    def _additive(self, seen: "torch.Tensor") -> "torch.Tensor":
        import torch

        return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)


def attention(
    module: Any,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: object,
    *,
    segments: Segments,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: object,
) -> tuple["torch.Tensor", None]:
    """Attention within each example of a row, as transformers calls it.

    Args:
        module: the attention layer; its `is_causal` holds where the argument does not say.
        query: (1, heads, tokens, width).
        key: (1, key heads, tokens, width); each serves `heads / key heads` queries.
        value: as `key`.
        attention_mask: none is made for a row.
        segments: the examples of the row.
        scaling: of the scores; `1 / sqrt(width)` by default.
        is_causal: whether a token sees only those before it.

    Returns:
        (1, tokens, heads, width), and no attention weights.
    """
    import torch

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bias = segments.bias(causal).to(query.dtype)
    q, k, v = (segments.batch(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if q.device.type == "cpu" and q.shape[2] <= _SHORT:
        scores = torch.matmul(q, k.transpose(2, 3)) * (q.shape[3] ** -0.5 if scaling is None else scaling) + bias
        out = torch.matmul(scores.softmax(-1), v)  # (examples, heads, longest, width)
    else:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling)
    return segments.row(out.transpose(1, 2)), None


class Packing:
    """Makes the body of a model run on rows.

    Attributes:
        rows: how the examples of the last pass lie in its rows, by the length of the row. There is more than
            one where a row was cut to some of its tokens; rows of one length hold the same tokens.
    """

    def __init__(self, body: Any, *, unpack: bool, first_position: int = 0, cut: bool = False) -> None:
        """Hook into a body.

        Args:
            body: a transformers model without its head.
            unpack: whether what enters the body's pooler, and what leaves the body, is a padded batch again.
            first_position: the position id of an example's first token.
            cut: whether the last layer goes on with the first token of each example alone, after attention:
                a classifier that pools there reads no other.

        Raises:
            AttributeError: the layers of the body are not where `cut` looks for them.
        """
        self.rows: Mapping[int, Segments] = {}
        self._body, self._before, self._first = body, body.config._attn_implementation, first_position
        self._hooks: list[Callable[[], Any]] = [
            lambda: body.register_forward_pre_hook(self._enter, with_kwargs=True)
        ]
        if cut:
            last = body.encoder.layer[-1].attention.output
            self._hooks.append(lambda: last.register_forward_pre_hook(self._cut))
        if unpack:
            self._hooks.append(lambda: body.register_forward_hook(self._leave))
            if (pooler := getattr(body, "pooler", None)) is not None:
                self._hooks.append(lambda: pooler.register_forward_pre_hook(self._pool))
        self._set()

    def _set(self) -> None:
        self._handles = [hook() for hook in self._hooks]
        self._body.set_attn_implementation(NAME)

    def remove(self) -> None:
        """Let the body run on padded batches again."""
        for handle in self._handles:
            handle.remove()
        self._body.set_attn_implementation(self._before)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Padded batches for a while: a model that writes token by token keeps what it has seen, and no rows."""
        self.remove()
        try:
            yield
        finally:
            self._set()

    def segments(self, tensor: "torch.Tensor") -> Segments | None:
        """The examples in a row of the last pass; None for what holds its examples in the first dimension.

        Raises:
            ContractError: it is a row of another pass.
        """
        examples = len(next(iter(self.rows.values())).mask) if self.rows else 1
        if examples == 1 or len(tensor) > 1:  # the row of a single example is its batch
            return None
        if tensor.shape[1] not in self.rows:
            raise ContractError(f"a row of {tensor.shape[1]} tokens is none of the last pass")
        return self.rows[tensor.shape[1]]

    def _enter(self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        segments = Segments(ids.new_ones(ids.shape).bool() if mask is None else mask.bool())
        row = segments.row(ids)
        self.rows = {row.shape[1]: segments}
        changed = {"input_ids": row, "attention_mask": None, "segments": segments}
        return (), {**kwargs, **changed, "position_ids": segments.positions + self._first}

    def _cut(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        (whole,) = self.rows.values()
        first = (whole.positions[0] == 0).nonzero()[:, 0]
        self.rows = {len(first): Segments(whole.mask[:, :1]), **self.rows}
        return tuple(row.index_select(1, first) for row in args)

    def _pool(self, pooler: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._padded(args[0]), *args[1:])

    def _leave(self, body: Any, args: tuple[Any, ...], output: Any) -> None:
        output.last_hidden_state = self._padded(output.last_hidden_state)

    def _padded(self, row: "torch.Tensor") -> "torch.Tensor":
        return self.rows[row.shape[1]].batch(row)
