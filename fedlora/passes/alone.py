"""The check at load: what a model makes of an example is what it makes of that example alone.

A few examples of random tokens, from the longest that the run will have down to two tokens, pass one by one and
without padding. Then they pass together, in the way that training will use: packed into a row where the model
allows it, else padded. Where logits differ, or under privacy the gradient of an example, an example's part depends
on who is beside it: clipping would not bound it, and a private run is refused.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Tensor
from fedlora.data.store import Examples
from fedlora.errors import ContractError, SettingError
from fedlora.kinds.contract import layer_of, under
from fedlora.passes import gradients
from fedlora.passes.packing import NAME, Packing, asks_first, attention
from fedlora.seeding import generator
from fedlora.tasks.base_model import body_of, quietly

if TYPE_CHECKING:
    import torch

    from fedlora.tasks.contract import Batch, Task

_FEW = 3  # of the shortest pass together first
_ROW = 512  # tokens at least of the packed row: positions that are computed over a row go wrong along it
_TOLERANCE = 1e-4  # of logits, relative to the largest
_GRADIENT = 1e-3  # of an example's gradient of a tensor, relative to the largest of that tensor
_FAINT = 1e-3  # of the largest gradient of all tensors: smaller ones are held to that
_AWAY = 0.02  # from the first adapter, in each number: with B = 0, A would have no gradient
_ROUNDING = 3.0  # times as far from float32 as examples alone are, those together may be in bfloat16

logger = logging.getLogger(__name__)

Rows = NDArray[np.int64]


class Alone:
    """Examples by themselves, to hold others against.

    Attributes:
        examples: from the shortest to the longest.
        rows: all of them.
    """

    def __init__(self, task: "Task", examples: Examples, adapter: Mapping[str, Tensor] | None = None) -> None:
        """Pass each by itself, the longest first: some models go on in another way after a short one.

        Args:
            task: with the model.
            examples: from the shortest to the longest.
            adapter: to pass them with; by default one near the first.

        Raises:
            SettingError: no tensor that trains takes part in the loss; under privacy that one does not, of any.
        """
        import torch

        self.task, self.examples, self.rows = task, examples, np.arange(len(examples))
        rng = generator(0, "check", "adapter")
        self.adapter = adapter or {
            name: (tensor + _AWAY * rng.standard_normal(tensor.shape)).astype(np.float32)
            for name, tensor in sorted(task.initial.items())
        }
        self.names = tuple(name for name, slot in task.layout.items() if slot.trainable)
        self._gradients: dict[int, list[torch.Tensor]] = {}  # of each trained tensor, for each example
        self._idle: set[str] = set()  # tensors that one of the examples does not reach
        self._exact = {int(i): self._pass(int(i)) for i in self.rows[::-1]}
        if self._idle:
            unused = _left_out(self._idle, self.names)
            if task.private or self._idle == set(self.names):
                raise SettingError("model.adapter.targets", unused)
            logger.warning("model.adapter.targets: %s", unused)  # an expert may be met by another example
        task.begin(self.adapter, ())
        self._noise = 0.0  # of the precision of training
        if task.precision == "bf16":
            rough = [self._logits(self.rows[i : i + 1], half=True) for i in self.rows]
            self._noise = _off(torch.cat(rough), torch.cat([self._exact[int(i)] for i in self.rows]))

    def _pass(self, i: int) -> "torch.Tensor":
        """An example's logits, and under privacy its gradients on the way; else those of the longest alone."""
        task, rows = self.task, self.rows[i : i + 1]
        reaches = task.private or i == self.rows[-1]
        parameters = task.begin(self.adapter, self.names if reaches else ())
        if not reaches:
            return self._logits(rows)
        made, logits = [], task.logits

        def kept(batch: "Batch") -> "torch.Tensor":
            made.append(logits(batch))
            return made[0]

        task.logits = kept  # type: ignore[method-assign]
        try:
            with task.precisely(False):
                loss = task.losses(self.batch(rows)).sum()
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
        finally:
            del task.logits
        self._idle |= {name for name, p in zip(self.names, parameters, strict=True) if p.grad is None}
        self._gradients[i] = [p.grad for p in parameters]  # type: ignore[misc]
        return made[0].detach()

    def _logits(self, rows: Rows, half: bool = False) -> "torch.Tensor":
        import torch

        with torch.no_grad(), self.task.precisely(half):
            return self.task.logits(self.batch(rows))

    def again(self) -> str:
        """How the shortest comes out otherwise a second time; empty where it does not."""
        off = _off(self._logits(self.rows[:1]), self._exact[0])
        told = f"logits are {off:.1g} of the largest apart"
        return "" if off <= _TOLERANCE else f"makes something else of the same example a second time: {told}"

    def batch(self, rows: Rows) -> "Batch":
        """Some of them together."""
        return self.task.batch(self.examples, rows)

    def differs(self, rows: Rows) -> str:
        """How logits of some of them together differ from those alone; empty where they do not."""
        import torch

        expected = torch.cat([self._exact[int(i)] for i in rows])
        for half in (False, True) if self.task.precision == "bf16" else (False,):
            off = _off(self._logits(rows, half), expected)
            if not off <= (max(_TOLERANCE, _ROUNDING * self._noise) if half else _TOLERANCE):
                return f"logits of examples together are {off:.1g} of the largest away from those of each alone"
        return ""

    def mixes(self) -> str:
        """How gradients as a private client makes them differ from those alone; empty where they do not."""
        import torch

        try:
            with self.task.precisely(False):
                found = gradients.apart(self.task, self.adapter, self.names, self.batch(self.rows))
        except SettingError:
            raise
        except Exception as error:  # of a model that was never written for this
            return _reason(error)
        alone = [torch.stack(parts) for parts in zip(*(self._gradients[int(i)] for i in self.rows), strict=True)]
        top = max(float(g.flatten(1).norm(dim=1).max()) for g in alone)
        for name, mine, right in zip(self.names, found, alone, strict=True):
            size = max(float(right.flatten(1).norm(dim=1).max()), _FAINT * top)
            off = float((mine - right).flatten(1).norm(dim=1).max())
            if not off <= _GRADIENT * size:
                return f"an example's gradient of {name} among others is {off / size:.1g} away from its own"
        return ""


def settle(task: "Task", max_length: int, special: Collection[int]) -> None:
    """Pack where that changes nothing; make sure that examples which share a pass stay apart.

    Raises:
        SettingError: the model is private, and they do not.
    """
    with quietly():
        try:
            _settle(task, max_length, special)
        finally:
            task.begin(task.initial, ())  # as the task was before the check
            task.model.eval()


def _settle(task: "Task", max_length: int, special: Collection[int]) -> None:
    try:
        task.trial = _mixed_targets(task, task.samples(max_length, special))
        alone = Alone(task, task.trial)
        if unfit := alone.again():
            _complain(task, unfit)
    except SettingError:
        raise
    except Exception as error:  # whatever a model says to an example
        return _complain(task, f"takes no example by itself: {_reason(error)}")
    task.mixed = _shared(alone)
    if not task.tokens:
        return _hold(alone)
    unfit = _unfit(task, max_length) or _pack(alone)
    if task.packing is not None and task.private and (unfit := alone.mixes()):
        task.packing.remove()
        task.packing = None
    if unfit:
        logger.warning("examples are padded, not packed: as exact, and slower; %s", unfit)
        _hold(alone)


def _left_out(idle: set[str], names: Sequence[str]) -> str:
    """Which layers take no part, by the largest parts of the model that hold them and no others."""
    used = [layer_of(name) for name in names if name not in idle]
    parts: dict[str, str] = {}  # by what is to be written
    for layer in sorted({layer_of(name) for name in idle}):
        steps = layer.split(".")
        heads = (".".join(steps[: n + 1]) for n in range(len(steps)))
        whole = next((head for head in heads if not any(under(f"{name}.", head) for name in used)), layer)
        last = whole.rsplit(".", 1)[-1]
        parts.setdefault(whole if last.isdigit() else last, layer)
    layer = next(iter(parts.values()))
    if not any(".lora_" in name for name in idle):
        return f"{layer} takes no part in the loss, so that it has nothing to learn: leave it frozen"
    if not any(".lora_" in name for name in set(names) - idle):
        return f"{layer} takes no part in the loss, nor does any other that is named: name layers that do"
    return (
        f"{layer} takes no part in the loss, so that it has nothing to learn: leave such layers out, with "
        f"model.adapter.exclude: [{', '.join(parts)}]"
    )


def _mixed_targets(task: "Task", examples: Examples) -> Examples:
    """Examples of several labels or scores: a loss that weighs an example by the labels beside it shows."""
    if not task.labelled:
        return examples
    count, labels = len(examples), max(int(getattr(task.model.get_base_model().config, "num_labels", 2)), 1)
    if task.target == "class":
        return replace(examples, targets=np.arange(count) % labels)
    drawn = generator(0, "check", "targets").random((count, labels))
    return replace(
        examples, targets=(drawn < 0.5).astype(np.uint8) if task.target == "many" else drawn.astype(np.float32)
    )


def mingle(task: "Task", adapter: Mapping[str, Tensor]) -> str:
    """How examples of a pass move each other with some tensors; empty where they stay apart.

    What a server sends may make a model so steep that the rounding of a batch, which depends on who is in it,
    changes the gradients of all: then clipping bounds nobody.
    """
    try:
        with quietly():
            alone = Alone(task, task.trial, adapter)
            return alone.differs(alone.rows) or alone.mixes()
    except Exception as error:  # whatever a model says to such tensors
        return _reason(error)
    finally:
        task.begin({}, ())


def _hold(alone: Alone) -> None:
    """Complain where examples of a batch are not what they are alone."""
    try:
        unfit = alone.differs(alone.rows)
    except Exception as error:
        unfit = _reason(error)
    if unfit:
        _complain(alone.task, f"makes of an example what depends on its padding or on those beside it: {unfit}")
    if alone.task.private and (unfit := alone.mixes()):
        _complain(alone.task, f"does not keep the gradients of examples apart: {unfit}")


def _complain(task: "Task", what: str) -> None:
    if task.private:
        raise SettingError("model.base", f"it {what}; DP-SGD cannot bound what one example does")
    logger.warning("results of this model are not to be relied on: it %s", what)


def _shared(alone: Alone) -> str:
    """Find layers that are given what all examples share; why layers with factors mix examples."""
    layers = alone.task.low_rank
    layers.singly = True
    try:
        alone.differs(alone.rows[:2])
    except ContractError as error:
        return str(error)
    except Exception:  # is found again where it matters
        return ""
    finally:
        layers.singly = False
    return ""


def _unfit(task: "Task", max_length: int) -> str:
    """Why examples cannot lie in one row, as far as the model's configuration and layers show."""
    body = _body(task)
    config = body.config.get_text_config() if hasattr(body, "config") else None
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder reads an example twice"
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if any(window and window < max_length for window in windows):
        return "this model attends within a window"
    if task.low_rank.shares:
        return "a layer of this model is given what all examples share"
    if getattr(config, "alibi", getattr(config, "model_type", "") in ("bloom", "mpt")):
        return "this model counts positions over the whole row"
    return ""


def _body(task: "Task") -> Any:
    """What packs: of decoders alone that stand in a body of their own, what their heads call themselves."""
    body = body_of(task.model.get_base_model())[1]
    return body.decoder if hasattr(body, "decoder") and not hasattr(body, "encoder") else body


def _pack(alone: Alone) -> str:
    """Pack in the first way that changes no logit; why none does, where none does."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    task, body = alone.task, _body(alone.task)
    table = task.model.get_base_model().get_input_embeddings()
    few = alone.rows[:_FEW]
    lengths = alone.examples.lengths(alone.rows)
    many = np.resize(alone.rows, int(np.searchsorted(np.resize(lengths, _ROW).cumsum(), _ROW)) + 1)
    after = (task.pad if table.padding_idx is None else table.padding_idx) + 1
    reasons = {}
    for cut, first in product((True, False) if task.pools and asks_first(body) else (False,), (0, after)):
        try:
            task.packing = Packing(body, unpack=task.pools, first_position=first, cut=cut)
            unfit = alone.differs(few) or alone.differs(many)
            if not task.packing.attends:
                unfit = "this model attends in a way of its own, to all of a row at once"
            if not unfit:
                return ""
        except Exception as error:  # whatever a model says to what it does not know
            unfit = f"this model takes no rows: {_reason(error)}"
        reasons[cut, first] = unfit
        if task.packing is not None:
            task.packing.remove()
            task.packing = None
    return reasons[False, 0]


def _off(found: "torch.Tensor", expected: "torch.Tensor") -> float:
    """The largest difference, relative to the largest that was expected; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines and not isinstance(error, KeyError) else type(error).__name__
