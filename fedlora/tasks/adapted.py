"""The resident model of a worker: a frozen base with an adapter in it, whose tensors are swapped in place.

Nothing is loaded or wrapped again from one client to the next.
"""

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Change, Layout, Slot
from fedlora.errors import ContractError, SettingError
from fedlora.kinds.contract import PREFIX, Kind, Saved, initial, layer_of, public, take_over, under
from fedlora.passes import quantized
from fedlora.passes.again import Again
from fedlora.passes.lowrank import LowRank
from fedlora.passes.packing import Packing
from fedlora.tasks import smaller
from fedlora.tasks.base_model import untie
from fedlora.tasks.heads import is_frozen, whole

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]

# Of a configuration, and no part of what it computes.
_TOLD = ("transformers_version", "dtype", "torch_dtype", "id2label", "label2id")


class Adapted:
    """A frozen base model with an adapter in it.

    Attributes:
        model: the `peft.PeftModel`, with all dropout off.
        layout: every tensor that could federate, by name.
        initial: the adapter that the seed stands for, or what it begins from instead, at the full rank.
        low_rank: how its layers with factors pass.
        packing: of the examples of a batch into one row without padding; None where the model does not allow it.
        own: whether the tensors that `begin` and `read` are about are the model's own.
        private: whether gradients are clipped example by example.
        again: whether a block is made again on the way back.
    """

    task_type: str | None = None  # of peft

    def __init__(
        self,
        model: Any,
        kind: Kind,
        *,
        heads: Mapping[str, bool],
        seed: int,
        device: str = "cpu",
        precision: Precision = "fp32",
        private: bool = False,
        fresh: Collection[str] | None = None,
        start: Saved | None = None,
        checkpointing: bool = False,
    ) -> None:
        """Wrap a loaded base model.

        Args:
            model: a transformers model in float32.
            kind: of the adapter to build in.
            heads: modules beside the adapter that federate, and whether each trains.
            seed: what the first adapter is drawn from.
            device: a torch device; on `meta` there are shapes and no weights.
            precision: of training; evaluation is in float32.
            private: whether gradients are clipped example by example, so that each must be its own.
            fresh: weights of the heads that nobody trained yet, by name; None: all of them.
            start: a saved adapter to begin from; None: what the seed stands for.
            checkpointing: whether blocks keep their inputs alone.

        Raises:
            SettingError: the model does not fit the adapter.
        """
        import torch
        from torch.nn.modules.batchnorm import _BatchNorm
        from torch.nn.modules.dropout import _DropoutNd

        self.kind, self.precision, self.seed, self.private = kind, precision, seed, private
        self.lost: Change = {}  # what an adapter for the whole weights has beside one for weights in few bits
        held = _kept(model, list(heads), fresh) if torch.device(device).type != "meta" else {}
        self.model = kind.wrap(model, list(heads), self.task_type)
        self.model.requires_grad_(False)
        self.again = Again()
        if checkpointing:
            self.again.enable(self.model.get_base_model())
        self._still = [m for m in self.model.modules() if isinstance(m, _BatchNorm)]
        for part in self.model.modules():
            if isinstance(part, _DropoutNd):
                part.p = 0.0  # an update must not depend on how its batch was cut
        self.device = torch.device(device)
        self.model.to(self.device)
        self._held = list(quantized.hold(self.model))
        self._parameters = {public(n): p for n, p in self.model.named_parameters() if kind.federates(n)}
        self.own = True
        for name in self._parameters:
            if (role := kind.role(name)) not in (*kind.parts, "head"):
                known = ", ".join([*kind.parts, "head"])
                raise SettingError(
                    "model.adapter.kind", f"{type(kind).__name__} gives {name} the role {role!r}: known: {known}"
                )
        self.layout: Layout = {
            name: Slot(
                name,
                tuple(p.shape),
                kind.role(name),
                layer_of(name),
                kind.trains(kind.role(name))
                and (kind.role(name) != "head" or any(t and under(name, head) for head, t in heads.items()))
                and not is_frozen(name),
            )
            for name, p in sorted(self._parameters.items())
        }
        self._layers = kind.held(self.model)
        for layer in self._layers.values():
            kind.rescale(layer, kind.r)
        for module, shape in self.weights.items():
            kind.check_rank(module, *shape)
        self.rank = kind.r
        self.weighs = self.device.type != "meta"  # has weights, and not only shapes
        weights = self.weight if self.weighs else None
        self._drawn = partial(initial, kind, self.layout, seed, weights=weights, held=held)
        self.initial = self._drawn()
        if start is not None and self.weighs:
            held |= take_over(kind, self.layout, self.initial, start)  # in every draw
            self.initial = self._drawn()
        self._start, self._held_draw = self.initial, (0, self.initial)
        self.write(self.initial)
        self.packing: Packing | None = None
        self.low_rank = LowRank(
            self.model,
            lambda tensor: self.packing.segments(tensor) if self.packing else None,
            kind.gradients == "product",
        )
        self._frozen = self._halve() if precision == "bf16" else []
        self._in_half = False

    def write(self, adapter: Mapping[str, NDArray[np.float32]]) -> None:
        """Copy tensors into the model in place.

        Raises:
            ContractError: an unknown name, or another shape.
        """
        import torch

        with torch.no_grad():
            for name, value in adapter.items():
                if name not in self._parameters:
                    raise ContractError(f"the model has no tensor {name!r}")
                if value.shape != (shape := self.kind.shape(self.layout[name], self.rank)):
                    raise ContractError(f"{name} has shape {value.shape}, and the model's is {shape}")
                if self._parameters[name].shape != shape:
                    self._parameters[name].data = torch.empty(shape, device=self.device)
                self._parameters[name].copy_(torch.from_numpy(np.require(value, requirements=["C", "W"])))

    def read(self, names: Sequence[str]) -> Adapter:
        """Copies of the named tensors, float32."""
        return {n: self._parameters[n].detach().float().cpu().numpy().copy() for n in names}

    @property
    def parameters(self) -> Mapping[str, "torch.nn.Parameter"]:
        """The tensors at hand, of every slot of the layout."""
        return self._parameters

    @contextlib.contextmanager
    def holding(self, parameters: dict[str, "torch.nn.Parameter"]) -> Iterator[None]:
        """Let `begin`, `write` and `read` be about other tensors than the model's own for a while."""
        before, self._parameters, self.own = self._parameters, parameters, False
        try:
            yield
        finally:
            self._parameters, self.own = before, True

    def become(self, rank: int | None = None, draw: int = 0) -> None:
        """Take on a client's rank, and a draw of first values, for what `begin` does next.

        Args:
            rank: of the factors; by default the server's.
            draw: of the seed, for tensors that are not given; 0 is `initial`.
        """
        rank = rank or self.kind.r
        self._start = self.drawn(draw)
        if rank != self.kind.r:
            cut = {n: tuple(slice(size) for size in self.kind.shape(s, rank)) for n, s in self.layout.items()}
            self._start = {name: tensor[cut[name]] for name, tensor in self._start.items()}
        if rank != self.rank:
            self.rank = rank
            for layer in self._layers.values():
                self.kind.rescale(layer, rank)

    def drawn(self, draw: int) -> Adapter:
        """The first values of a draw of the seed; 0 is `initial`."""
        if draw and draw != self._held_draw[0]:
            self._held_draw = draw, self._drawn(draw=draw)
        return self._held_draw[1] if draw else self.initial

    def off(self) -> contextlib.AbstractContextManager[None]:
        """The base without its adapter for a while, with what was merged into it."""
        return self.kind.off(self._layers.values())

    def weight(self, name: str) -> "torch.Tensor":
        """The frozen weight of a layer with factors, (out, in), with what was merged into it."""
        import torch
        from transformers.pytorch_utils import Conv1D

        base = self._layers[name].get_base_layer()
        if isinstance(base, torch.nn.Conv2d):
            return base.weight.flatten(1)
        return base.weight.T if isinstance(base, Conv1D) else quantized.weight(base)

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """The shape of each layer with factors, (out, in); of a convolution (out, in height width)."""
        return {module: _shape(layer.get_base_layer()) for module, layer in self._layers.items()}

    def merge(self, change: Change) -> None:
        """Add a change to the frozen weights, for good.

        Args:
            change: of each layer, as thin factors (out x m) and (m x in), scaling included.

        Raises:
            SettingError: they are held in few bits.
        """
        import torch

        if self._held:
            raise SettingError("model.quantize", "this strategy merges into the frozen weights: leave it out")
        smaller.check_merges(layer.get_base_layer() for layer in self._layers.values())
        self._use_half(False)
        with torch.no_grad():
            for module, (left, right) in change.items():
                if (own := untie(self.model, self._layers[module].get_base_layer())) is not None and self._frozen:
                    self._frozen.append((own, own.data, own.data.to(torch.bfloat16)))
                factors = (torch.from_numpy(np.asarray(f, np.float32)).to(self.device) for f in (left, right))
                self.weight(module).addmm_(*factors)
            for _, full, small in self._frozen:
                small.copy_(full)

    def base_fingerprint(self) -> str:
        """Differs where a weight, a running figure or a setting that no client changes does; before a merge."""
        config = self.model.get_base_model().config.to_dict()
        told = {key: value for key, value in config.items() if key not in _TOLD and not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
        held = {id(layer.weight): layer for layer in self._held}
        for name, parameter in self.model.named_parameters():
            if not self.kind.federates(name) and ".original_module." not in name:
                whole: Any = quantized.weight(held[id(parameter)]) if id(parameter) in held else parameter
                digest.update(f"{name} {tuple(whole.shape)}\n".encode())
                digest.update(whole.detach().float().cpu().contiguous().numpy())
        for name, module in self.model.named_modules():
            for key, buffer in module.named_buffers(name, recurse=False):
                if key.rsplit(".", 1)[-1] not in module._non_persistent_buffers_set and ".lora_" not in key:
                    digest.update(f"{key} {tuple(buffer.shape)}\n".encode())
                    digest.update(buffer.detach().double().cpu().contiguous().numpy())
        return digest.hexdigest()[:32]

    def begin(self, adapter: Mapping[str, NDArray[np.float32]], train: Sequence[str]) -> list["torch.Tensor"]:
        """Make the model a client's: every tensor as first made, then `adapter`, with `train` trainable.

        Returns:
            The parameters to train, in the order of `train`.
        """
        self.write({n: t for n, t in self._start.items() if n not in adapter})
        self.write({name: self._whole(name, tensor) for name, tensor in adapter.items()})
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in train)
            parameter.grad = None
        self.low_rank.singly = False
        self._use_half(self.precision == "bf16")
        self.model.train()  # Opacus's hooks only work in this mode; dropout is off all the same
        for module in self._still:
            module.eval()  # their running figures belong to the base: no client moves them
        return [self._parameters[name] for name in train]

    def _whole(self, name: str, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        """A tensor that came with a lower rank than the client's, with the rest of it as first made."""
        start = self._start.get(name)
        if start is None or tensor.shape == start.shape or self.layout[name].role == "head":
            return tensor
        whole = start.copy()
        try:
            whole[tuple(slice(size) for size in tensor.shape)] = tensor
        except ValueError:
            return tensor  # larger, which `write` refuses
        return whole

    def place(self, array: NDArray[Any]) -> "torch.Tensor":
        """An array on the device; to a GPU while that is still at work, from memory that does not move."""
        import torch

        made = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type != "cuda":
            return made.to(self.device)
        return made.pin_memory().to(self.device, non_blocking=True)

    @contextlib.contextmanager
    def precisely(self, half: bool) -> Iterator[None]:
        """Compute in bfloat16 or float32 for a while, whatever the precision of training."""
        before, self.precision = self.precision, "bf16" if half else "fp32"
        self._use_half(half)
        try:
            with self.autocast():
                yield
        finally:
            self.precision = before

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of training for the forward pass."""
        import torch

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def _halve(self) -> list[tuple[Any, "torch.Tensor", "torch.Tensor"]]:
        """bfloat16 copies of all frozen tensors, so that a pass casts neither weights nor what is between."""
        import torch

        halves = {}
        for name, module in self.model.named_modules():
            if "lora_" not in name and "modules_to_save" not in name and "original_module" not in name:
                for parameter in filter(lambda p: p.is_floating_point(), module.parameters(recurse=False)):
                    halves[id(parameter)] = (parameter, parameter.data, parameter.data.to(torch.bfloat16))
        return list(halves.values())

    def _use_half(self, half: bool) -> None:
        import torch

        if half is not self._in_half:
            for layer in self._held:
                quantized.compute_in(layer, torch.bfloat16 if half else torch.float32)
            for parameter, full, small in self._frozen:
                parameter.data = small if half else full
            self._in_half = half

    def export(self, adapter: Adapter, folder: Path, merged: Change | None) -> None:
        """Write an ordinary LoRA adapter of the untouched base, as peft reads it.

        Args:
            adapter: every tensor of the layout.
            folder: to make.
            merged: all that was folded into the base; it becomes part of the adapter, whose rank grows.
        """
        from safetensors.numpy import save_file

        tensors, rank = self.kind.export(self.layout, adapter, merged or self.lost or None)
        config = self.kind.saved_as(self.model.peft_config["default"], rank)
        folder.mkdir(parents=True)
        config.save_pretrained(str(folder))
        made = {n: np.ascontiguousarray(t) for n, t in whole(tensors).items()}
        save_file(made, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _shape(base: Any) -> tuple[int, int]:
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(base, torch.nn.Conv2d):
        return base.out_channels, base.weight[0].numel()
    return (base.nf, base.nx) if isinstance(base, Conv1D) else (base.out_features, base.in_features)


def _kept(model: Any, heads: Sequence[str], fresh: Collection[str] | None) -> Adapter:
    """What of a model's heads stays as it is, by its public name: all but the fresh weights of linear layers.

    Those are drawn by the kind of adapter; others, such as those of a norm, are as transformers drew them.
    """
    import torch

    kept: Adapter = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            drawn = type(module) is torch.nn.Linear and (fresh is None or name in fresh)
            if any(under(name, head) for head in heads) and not drawn:
                kept[PREFIX + name] = parameter.detach().float().cpu().numpy().copy()
    return kept
