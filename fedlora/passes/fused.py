"""Fused clients: one pass of the shared frozen base for the micro-batches of several clients.

Whatever is frozen in the model runs on all their examples at once. A linear layer that federates has a weight
for each client: for a token t of client k

    y_t = x_t W_k^T + b_k

as one batched product over clients, the tokens of each padded with zeros. No sum runs over tokens of two
clients, so that what is not finite with one reaches no other.

Clients run in lock step: each runs until it asks for a pass, and when all have, those passes are one.
"""

import contextlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from fedlora.client import Pass, Passes
from fedlora.errors import SettingError
from fedlora.passes import quantized
from fedlora.passes.lowrank import add_sample
from fedlora.passes.packing import Segments

if TYPE_CHECKING:
    import torch

    from fedlora.tasks.contract import Task

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Fused:
    """Clients that share the passes of a task's model, each with tensors of its own."""

    def __init__(self, task: "Task") -> None:
        """For a loaded model.

        Raises:
            SettingError: more than plain linear layers federates in it, it normalises over a batch, or a layer
                does not see examples one by one.
        """
        import torch
        from torch.nn.modules.batchnorm import _BatchNorm

        if task.mixed:
            raise SettingError("engine.fused", f"clients cannot share passes: {task.mixed}; leave this out")
        self.task = task
        self._names: dict[Any, list[str]] = {}  # of the tensors of each layer: weight, and bias if it has one
        known = {id(parameter): name for name, parameter in task.parameters.items()}
        for path, module in task.model.named_modules():
            held = {n: known[id(p)] for n, p in module.named_parameters(recurse=False) if id(p) in known}
            if isinstance(module, _BatchNorm) or (held and type(module) is not torch.nn.Linear):
                raise SettingError(
                    "engine.fused", f"clients cannot share {path}, a {type(module).__name__}: leave this out"
                )
            if held:
                self._names[module] = [held[n] for n in ("weight", "bias") if n in held]
        self._stacks: dict[str, torch.Tensor] = {}  # each tensor of all clients, (clients, *shape)
        self._sets: list[dict[str, torch.nn.Parameter]] = []  # the same, client by client
        self._examples: list[int] = []  # of each client in this pass
        self._lies: dict[tuple[bool, int], Segments] = {}

    def run(self, rank: int, work: "Sequence[Passes[T]]") -> list[T]:
        """Run clients of one rank to their ends, in lock step; what each returns.

        A pass that fails for one client is raised in it, where it asked.
        """
        made: dict[int, T] = {}
        with self._seated(rank, len(work)):
            answers: dict[int, torch.Tensor | Exception | None] = dict.fromkeys(range(len(work)))
            while answers:
                asked: dict[int, Pass] = {}
                for k, answer in answers.items():
                    with self.task.holding(self._sets[k]):
                        failed = isinstance(answer, Exception)
                        try:
                            asked[k] = (work[k].throw if failed else work[k].send)(answer)  # type: ignore[arg-type]
                        except StopIteration as end:
                            made[k] = end.value
                answers = {k: told for group in _alike(asked) for k, told in self._passed(group).items()}
        return [made[k] for k in range(len(work))]

    @contextlib.contextmanager
    def _seated(self, rank: int, clients: int) -> Iterator[None]:
        """Room for the tensors of some clients, and layers that use them."""
        import torch

        task = self.task
        for parameter in task.parameters.values():
            parameter.requires_grad_(False)
        shapes = {name: task.kind.shape(slot, rank) for name, slot in task.layout.items()}
        self._stacks = {n: torch.empty((clients, *shape), device=task.device) for n, shape in shapes.items()}
        self._sets = [{n: torch.nn.Parameter(t[k]) for n, t in self._stacks.items()} for k in range(clients)]
        before = {layer: vars(layer).get("forward") for layer in (*task.low_rank.layers, *self._names)}
        for layer in self._names:
            layer.forward = partial(self._linear, layer)
        for layer in task.low_rank.layers:
            layer.forward = partial(self._low_rank, layer)
        try:
            yield
        finally:
            for layer, forward in before.items():
                del layer.forward
                if forward is not None:
                    layer.forward = forward
            self._stacks, self._sets, self._lies = {}, [], {}

    def _passed(self, asked: Mapping[int, Pass]) -> "dict[int, torch.Tensor | Exception | None]":
        """The loss of each client's pass; where they cannot pass together, of its pass by itself, or its error."""
        try:
            return {**self._pass(asked)}
        except Exception as error:  # as with a client alone, anything may be wrong with its examples
            if len(asked) == 1:
                return dict.fromkeys(asked, error)
            logger.warning("%d clients pass one by one: %s: %s", len(asked), type(error).__name__, error)
        return {k: answer for k in asked for answer in self._passed({k: asked[k]}).values()}

    def _pass(self, asked: Mapping[int, Pass]) -> "dict[int, torch.Tensor]":
        """Forward and back with the examples of all who ask, in the order of clients; the loss of each."""
        import torch

        task, clients = self.task, sorted(asked)
        self._examples = [len(asked[k].batch["targets"]) if k in asked else 0 for k in range(len(self._sets))]
        self._lies = {}
        for name, stack in self._stacks.items():
            stack.requires_grad_(any(self._sets[k][name].requires_grad for k in clients))
            stack.grad = stack.grad_sample = None  # type: ignore[attr-defined]
        task.low_rank.singly = any(one.singly for one in asked.values())
        with task.autocast():
            losses = task.losses(task.join([asked[k].batch for k in clients]))  # (examples,)
        shares = [share for k in clients for share in [1 / asked[k].over] * self._examples[k]]
        weights = losses.new_tensor(shares)
        losses.backward(weights)  # type: ignore[no-untyped-call]
        for name, stack in self._stacks.items():
            self._deal(name, stack)
        parts = torch.split(losses.detach() * weights, [self._examples[k] for k in clients])
        return {k: part.sum() for k, part in zip(clients, parts, strict=True)}

    def _deal(self, name: str, stack: "torch.Tensor") -> None:
        """Give each client who passed its gradients of a tensor."""
        import torch

        samples: torch.Tensor | None = stack.grad_sample  # type: ignore[attr-defined]
        parts = [None] * len(self._sets) if samples is None else torch.split(samples, self._examples)
        for k, part in enumerate(parts):
            parameter = self._sets[k][name]
            if not self._examples[k] or not parameter.requires_grad:
                continue
            if part is not None:
                parameter.grad_sample = part  # type: ignore[attr-defined]
            elif stack.grad is not None:
                mine = stack.grad[k]
                parameter.grad = mine if parameter.grad is None else parameter.grad + mine

    def lies(self, x: "torch.Tensor", layer: Any) -> Segments:
        """Where the tokens of each client lie in a tensor of this pass.

        Raises:
            ContractError: the examples do not lie in it one by one.
        """
        import torch

        examples, tokens = self.task.low_rank.lie(x, layer), x.shape[:-1].numel()
        key = (examples is None, tokens)
        if key not in self._lies:
            count = self.task.low_rank.examples
            each = [tokens // count] * count if examples is None else examples.lengths
            it = iter(each)
            lengths = [sum(itertools.islice(it, count)) for count in self._examples]
            ends = torch.tensor(lengths, device=x.device)[:, None]
            self._lies[key] = Segments(torch.arange(max(lengths), device=x.device) < ends)
        return self._lies[key]

    def _linear(self, layer: Any, x: "torch.Tensor") -> "torch.Tensor":
        """A layer with a weight for each client."""
        stacks = [self._stacks[name] for name in self._names[layer]]
        y: torch.Tensor = _function().apply(x, *stacks, *[None] * (2 - len(stacks)), layer, self)
        return y

    def _low_rank(self, layer: Any, x: "torch.Tensor") -> "torch.Tensor":
        """A layer with factors for each client."""
        base = layer.base_layer
        x = x.to(quantized.dtype(base))
        if (copies := self.task.low_rank.copies(layer, x)) > 1:  # each client makes something else of it
            x = x.expand(copies, *x.shape[1:])
        change = self._linear(layer.lora_B["default"], self._linear(layer.lora_A["default"], x))
        y: torch.Tensor = base(x).add(change, alpha=layer.scaling["default"])
        return y


def _alike(asked: Mapping[int, Pass]) -> Iterator[dict[int, Pass]]:
    """Clients who pass together: one long text would give all others' examples as many sequences as it has."""
    groups: dict[int, dict[int, Pass]] = {}
    for k, one in asked.items():
        sequences = max((len(rows) for rows in one.batch.values()), default=1) // len(one.batch["targets"])
        groups.setdefault(sequences.bit_length(), {})[k] = one
    yield from groups.values()


@cache
def _function() -> Any:
    """The batched product as autograd sees it."""
    import torch

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: Any, fused: Fused
        ) -> torch.Tensor:
            """Of x (..., in) by (clients, out, in) and (clients, out), in the precision of training."""
            device = x.device.type
            half = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if half else weight.dtype
            flat, matrix = x.reshape(1, -1, x.shape[-1]).to(dtype), weight.to(dtype)
            lies = fused.lies(x, layer)
            wide = lies.batch(flat)  # (clients, longest, in)
            if bias is None:
                y = torch.bmm(wide, matrix.transpose(1, 2))
            else:
                y = torch.baddbmm(bias.to(dtype)[:, None], wide, matrix.transpose(1, 2))
            singly = fused.task.low_rank.singly
            kept = flat if singly else wide
            ctx.save_for_backward(matrix, kept if ctx.needs_input_grad[1] else None)
            ctx.fused, ctx.lies, ctx.singly, ctx.stacks, ctx.dtype = fused, lies, singly, (weight, bias), x.dtype
            ctx.layer = layer
            row: torch.Tensor = torch.ops.aten._unsafe_view(lies.row(y), (*x.shape[:-1], y.shape[-1]))
            return row

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            """For the input and what trains; of single examples in `grad_sample`."""
            matrix, kept = ctx.saved_tensors
            weight, bias = ctx.stacks
            flat = gradient.reshape(1, -1, gradient.shape[-1])  # (1, tokens, out)
            wide = ctx.lies.batch(flat)  # (clients, longest, out)
            dx = dw = db = None
            if ctx.needs_input_grad[0]:
                dx = ctx.lies.row(torch.bmm(wide, matrix)).view(*gradient.shape[:-1], -1).to(ctx.dtype)
            if ctx.singly:
                samples = partial(ctx.fused.task.low_rank.samples, ctx.layer, gradient)
                if ctx.needs_input_grad[1]:
                    narrow = weight.shape[1] <= weight.shape[2]
                    made = samples(flat[0], kept[0]) if narrow else samples(kept[0], flat[0]).transpose(1, 2)
                    add_sample(weight, made)
                if ctx.needs_input_grad[2]:
                    add_sample(bias, samples(flat.new_ones((flat.shape[1], 1)), flat[0])[:, 0])
            else:
                if ctx.needs_input_grad[1]:
                    dw = torch.bmm(wide.transpose(1, 2), kept).to(weight.dtype)
                if ctx.needs_input_grad[2]:
                    db = wide.sum(1).to(bias.dtype)
            return dx, dw, db, None, None

    return Product
