"""Padding-free passes: inside a model's body, the examples of a batch are one row of real tokens.

Linear layers, norms and embeddings work token by token, so they run on the row as it is. Attention alone
must keep the examples apart: queries, keys and values are laid out as a small padded batch for the
products, and what comes out is a row again. All around the body sees an ordinary padded batch.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
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

    def joined(self, count: int) -> "Segments":
        """The same tokens in the same row, with every `count` examples as one."""
        return self if count == 1 else Segments(self.mask.reshape(-1, count * self.mask.shape[1]))

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

    @cached_property
    def first(self) -> "torch.Tensor":
        """The first token of each example in the row, (examples,)."""
        return (self.positions[0] == 0).nonzero()[:, 0]

    def heads(self, count: int) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Where the heads of tokens, (tokens * heads), lie in a batch of (examples * heads, longest).

        Returns:
            For each cell of the batch the head of a token, that of the example's first for padding; and the cell
            of each head of a token.
        """
        import torch

        if count not in self._heads:
            examples, longest = self.mask.shape
            # Padding holds a token of its own example: 0 times what is not finite would reach the others.
            tokens = self.first.repeat_interleave(longest)
            tokens[self.cells] = torch.arange(len(self.cells), device=self.mask.device)
            head = torch.arange(count, device=self.mask.device)
            there = (tokens.view(examples, 1, longest) * count + head[:, None]).flatten()
            example, place = self.cells // longest, self.cells % longest
            back = ((example[:, None] * count + head) * longest + place[:, None]).flatten()
            self._heads[count] = there, back
        return self._heads[count]

    @cached_property
    def _heads(self) -> dict[int, tuple["torch.Tensor", "torch.Tensor"]]:
        return {}

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
    segments: Segments | None = None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: "torch.Tensor | None" = None,
    **_: object,
) -> tuple["torch.Tensor", None]:
    """Attention within each example of a row, as transformers calls it.

    Args:
        module: the attention layer; its `is_causal` holds where the argument does not say.
        query: (1, heads, tokens, width), or of the first token of each example alone.
        key: (1, key heads, tokens, width); each serves `heads / key heads` queries.
        value: as `key`.
        attention_mask: none is made for a row.
        segments: the examples of the row; by default those of the last pass.
        scaling: of the scores; `1 / sqrt(width)` by default.
        is_causal: whether a token sees only those before it.
        softcap: scores are bent to lie within it on both sides; None: they are not.
        s_aux: of each head a score that goes to no token.

    Returns:
        (1, tokens, heads, width) as queried, and no attention weights.
    """
    import torch

    segments = module.fedlora_packing.attended() if segments is None else segments
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    asked = segments if query.shape[2] == key.shape[2] else Segments(segments.mask[:, :1])
    plain = softcap is None and s_aux is None
    if plain and query.device.type == "cpu" and segments.mask.shape[1] <= _SHORT:
        rows = (x.transpose(1, 2).reshape(-1, x.shape[3]) for x in (query, key, value))  # (tokens * heads, width)
        out = _function().apply(*rows, asked, segments, causal, scale)
        return out.view(1, query.shape[2], query.shape[1], -1), None
    bias = segments.bias(causal).to(query.dtype)
    q = asked.batch(query.transpose(1, 2)).transpose(1, 2)
    k, v = (segments.batch(x.transpose(1, 2)).transpose(1, 2) for x in (key, value))
    if plain:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    else:
        scores = q @ k.transpose(2, 3) * scale  # (examples, heads, asked, seen)
        scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)) + bias
        if s_aux is not None:
            nowhere = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, nowhere.to(scores.dtype)], -1)
        out = scores.softmax(-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]] @ v
    return asked.row(out.transpose(1, 2)), None


@cache
def _function() -> Any:
    """Short attention as autograd sees it, with one copy into the batch and one out."""
    import torch

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            asked: Segments,
            seen: Segments,
            causal: bool,
            scale: float,
        ) -> torch.Tensor:
            """Heads of tokens, (tokens * heads, width)."""
            width, heads = query.shape[1], len(key) // len(seen.cells)
            (there, ctx.back), (over, ctx.over) = asked.heads(heads), seen.heads(heads)
            q = query.index_select(0, there).view(-1, asked.mask.shape[1], width).mul_(scale)
            k, v = (x.index_select(0, over).view(-1, seen.mask.shape[1], width) for x in (key, value))
            bias = seen.bias(causal).to(q.dtype).repeat_interleave(heads, 0)[:, 0]
            scores = torch.baddbmm(bias, q, k.transpose(1, 2))  # (examples * heads, asked, seen)
            p = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
            ctx.save_for_backward(q, k, v, p)
            ctx.scale = scale
            return torch.bmm(p, v).view(-1, width).index_select(0, ctx.back)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            """Padding asks nothing, so that its gradients are zero; those of the three inputs."""
            q, k, v, p = ctx.saved_tensors
            width = gradient.shape[1]
            g = gradient.new_zeros((q.shape[0] * q.shape[1], width)).index_copy_(0, ctx.back, gradient).view_as(q)
            dq = dk = dv = None
            if ctx.needs_input_grad[2]:
                dv = torch.bmm(p.transpose(1, 2), g).view(-1, width).index_select(0, ctx.over)
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                ds = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
                if ctx.needs_input_grad[0]:
                    dq = torch.bmm(ds, k).view(-1, width).index_select(0, ctx.back).mul_(ctx.scale)
                if ctx.needs_input_grad[1]:
                    dk = torch.bmm(ds.transpose(1, 2), q).view(-1, width).index_select(0, ctx.over)
            return dq, dk, dv, None, None, None, None

    return Attend


def asks_first(body: Any) -> bool:
    """Whether the last layer of a body is such that it can be asked for first tokens alone: as BERT's."""
    layers = getattr(getattr(body, "encoder", None), "layer", None)
    attention = getattr(layers[-1], "attention", None) if layers is not None else None
    inner = getattr(attention, "self", None)
    return all(hasattr(inner, name) for name in ("query", "key", "value", "num_attention_heads", "scaling"))


class _Replaced:
    """Another `forward` of a module, until it is removed."""

    def __init__(self, module: Any, forward: Callable[..., Any]) -> None:
        self._module, module.forward = module, forward

    def remove(self) -> None:
        """Put the module's own back."""
        del self._module.forward


class Packing:
    """Makes the body of a model run on rows.

    Attributes:
        rows: how the examples of the last pass lie in its rows, by the length of the row. There is more than
            one where a row was cut to some of its tokens; rows of one length hold the same tokens.
        cut: the same of what the next pass will cut its row to behind the body.
        whole: the sequences of the last pass.
        sequences: of an example: as many rows of the next batch are its own, one after another.
        attends: whether the layers of the body attend by `attention`.
    """

    whole: Segments

    def __init__(self, body: Any, *, unpack: bool, first_position: int = 0, cut: bool = False) -> None:
        """Hook into a body.

        Args:
            body: a transformers model without its head.
            unpack: whether what enters the body's pooler, and what leaves the body, is a padded batch again.
            first_position: the position id of an example's first token.
            cut: whether the last layer asks for the first token of each example alone, and goes on with it:
                a classifier that pools there reads no other. For a body of which `asks_first` is true.
        """
        import torch

        self.rows: Mapping[int, Segments] = {}
        self.cut: Mapping[int, Segments] = {}
        self.sequences, self.attends = 1, False
        self._body, self._before, self._first = body, body.config._attn_implementation, first_position
        self._hooks: list[Callable[[], Any]] = [
            lambda: body.register_forward_pre_hook(self._enter, with_kwargs=True)
        ]
        if cut:
            last = body.encoder.layer[-1].attention
            self._hooks.append(lambda: _Replaced(last.self, partial(self._ask_first, last.self)))
            self._hooks.append(lambda: last.output.register_forward_pre_hook(self._cut))
        if unpack:
            pooler = getattr(body, "pooler", None)
            behind = body.encoder if type(pooler) is torch.nn.Linear else body  # it gets what is pooled already
            self._hooks.append(lambda: behind.register_forward_hook(self._leave, prepend=True))
            if pooler is not None and behind is body:
                self._hooks.append(lambda: pooler.register_forward_pre_hook(self._pool))
        self._set()

    def _set(self) -> None:
        self._handles: list[Any] = []
        try:
            self._handles.extend(hook() for hook in self._hooks)
            for module in self._body.modules():
                vars(module)["fedlora_packing"] = self  # not every model hands on what its layers are to know
            self._body.set_attn_implementation(NAME)
        except Exception:  # a body that cannot: no hook may stay behind
            self._unhook()
            raise

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._body.modules():
            vars(module).pop("fedlora_packing", None)

    def remove(self) -> None:
        """Let the body run on padded batches again."""
        self._unhook()
        self._body.set_attn_implementation(self._before)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Padded batches for a while: a model that writes token by token keeps what it has seen, and no rows."""
        self.remove()
        try:
            yield
        finally:
            self._set()

    def attended(self) -> Segments:
        """The sequences of the last pass, for a layer that attends to them."""
        self.attends = True
        return self.whole

    def segments(self, tensor: "torch.Tensor") -> Segments | None:
        """The examples in a row of the last pass; None for what holds its examples in the first dimension.

        Raises:
            ContractError: it is a row of another pass.
        """
        examples = len(next(iter(self.rows.values())).mask) if self.rows else 0
        single = examples == self.sequences == 1  # whose row is its batch
        if not examples or single or len(tensor) > 1 or tensor.dim() < 3:
            return None
        if tensor.shape[1] not in self.rows:
            raise ContractError(f"a row of {tensor.shape[1]} tokens is none of the last pass")
        return self.rows[tensor.shape[1]]

    def _enter(self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        segments = Segments(ids.new_ones(ids.shape).bool() if mask is None else mask.bool())
        row = segments.row(ids)
        self.whole, lies = segments, {**self.cut, row.shape[1]: segments}
        self.rows, self.cut = {length: held.joined(self.sequences) for length, held in lies.items()}, {}
        changed = {"input_ids": row, "attention_mask": None}
        if (types := kwargs.get("token_type_ids")) is not None:
            changed["token_type_ids"] = segments.row(types)
        return (), {**kwargs, **changed, "position_ids": segments.positions + self._first}

    def _ask_first(self, layer: Any, row: "torch.Tensor", **_: object) -> tuple["torch.Tensor", None]:
        """Self-attention of a BERT-like layer for the first token of each example."""
        whole = self.rows[row.shape[1]]
        self.attends, self.rows = True, {len(whole.first): Segments(whole.mask[:, :1]), **self.rows}
        sides = (layer.query(row.index_select(1, whole.first)), layer.key(row), layer.value(row))
        q, k, v = (x.unflatten(-1, (layer.num_attention_heads, -1)).transpose(1, 2) for x in sides)
        told = {"scaling": layer.scaling, "is_causal": layer.is_causal}
        return attention(layer, q, k, v, None, segments=whole, **told)[0].flatten(2), None

    def _cut(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        answer, row = args
        return answer, row.index_select(1, self.rows[row.shape[1]].first)

    def _pool(self, pooler: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._padded(args[0]), *args[1:])

    def _leave(self, body: Any, args: tuple[Any, ...], output: Any) -> None:
        output.last_hidden_state = self._padded(output.last_hidden_state)

    def _padded(self, row: "torch.Tensor") -> "torch.Tensor":
        return self.rows[row.shape[1]].batch(row)
